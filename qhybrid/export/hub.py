"""Uploading a finished folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, errors

from qhybrid.errors import ExportError
from qhybrid.export.names import is_hub_id


def require_repository(name: str) -> None:
    """Refuse a name that is no ORG/NAME.

    Raises:
        ExportError: with the form.
    """
    if not is_hub_id(name):
        raise ExportError(f"--push {name!r} is not of the form ORG/NAME")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository if it is not there, upload everything in `folder`, and return the commit's address.

    Raises:
        ExportError: the hub refuses it or cannot be reached; `folder` stays.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from qhybrid"))
    except Exception as error:  # its text may repeat a URL with a token
        status = getattr(getattr(error, "response", None), "status_code", None)
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        reason = (
            "HF_HUB_OFFLINE is set" if offline else type(error).__name__ + (f", status {status}" if status else "")
        )
        raise ExportError(
            f"{repository} was not uploaded: {reason}",
            hint=f"log in with `hf auth login`; {folder} is complete (`hf upload {repository} {folder}`)",
        ) from error
