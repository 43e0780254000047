"""Hashes of a base model's weight files: a bit that flipped since the run began is found, and its file named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from qhybrid.architecture.spec import read_config
from qhybrid.errors import ModelError

# Of a config.json: says nothing of what the model computes, or changes with the library that writes it.
_NOT_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
)

_MOST_THREADS = 8  # beyond that the disk decides


class FileFacts(TypedDict):
    """Size and SHA-256, in hex, of one file."""

    bytes: int
    sha256: str


def fingerprint(files: Sequence[Path]) -> dict[str, FileFacts]:
    """Size and hash of every file by its name, in the order given; ready for JSON.

    The Hugging Face cache names large files by their SHA-256. Where `files` are links to such, the content is
    held against the name.

    Raises:
        ModelError: a file cannot be read, or is not what the hub said it was.
    """
    assert len({file.name for file in files}) == len(files), "two files of one name"
    # hashlib lets other threads run while it works.
    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return {file.name: facts for file, facts in zip(files, pool.map(_facts, files), strict=True)}


def config_hash(folder: Path) -> str:
    """SHA-256, in hex, of what a model folder's config.json says of the model.

    Raises:
        ModelError: the file cannot be read.
    """
    config = read_config(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def compare(before: Mapping[str, FileFacts], now: Mapping[str, FileFacts]) -> str | None:
    """The first file that differs, and how: "model.safetensors: its content has changed"; None if none does."""
    for name, facts in before.items():
        if name not in now:
            return f"{name}: it is no longer part of the model"
        if now[name]["bytes"] != facts["bytes"]:
            return f"{name}: it has {now[name]['bytes']} bytes, and had {facts['bytes']}"
        if now[name]["sha256"] != facts["sha256"]:
            return f"{name}: its content has changed"
    added = next((name for name in now if name not in before), None)
    return None if added is None else f"{added}: it was not part of the model"


def _facts(file: Path) -> FileFacts:
    try:
        with file.open("rb") as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        blob = file.resolve()
    except OSError as error:
        raise ModelError(f"cannot read {file.name}: {error.strerror or error}") from error
    if _is_named_by_hash(blob) and blob.name != sha256:
        raise ModelError(
            f"{file.name} does not have the hash that the hub gave it: it is damaged on this machine",
            hint=f"delete {blob}, and the model is downloaded again",
        )
    return {"bytes": num_bytes, "sha256": sha256}


def _is_named_by_hash(file: Path) -> bool:
    """Whether this is a large file of the Hugging Face cache; small ones are named by git's shorter hash."""
    return file.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", file.name) is not None
