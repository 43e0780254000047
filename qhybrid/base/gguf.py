"""Converts a GGUF file to a Hugging Face folder, once, and keeps the result in a cache."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from qhybrid.errors import ModelError

CACHE_VARIABLE = "QHYBRID_CACHE"
_MAGIC = b"GGUF"


def gguf_to_folder(path: Path) -> Path:
    """The Hugging Face folder (bfloat16 safetensors and tokenizer) that holds the content of a GGUF file.

    The folder is named after the file and the hash of its content, in $QHYBRID_CACHE or ~/.cache/qhybrid/gguf.
    It is written under another name and renamed when complete, so an interrupted conversion is never used,
    and of two processes that convert at the same time one result is kept.

    Raises:
        ModelError: the file cannot be read, is not GGUF, or has an architecture or a tensor type that
            transformers does not know.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{path} is not a GGUF file", hint="download or copy the file again")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        folder = _cache_root() / f"{path.stem}-{digest[:16]}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _convert_into(folder, path)
    except OSError as error:
        raise ModelError(
            f"cannot convert {path}: {error}", hint=f"${CACHE_VARIABLE} names the folder for conversions"
        ) from error
    return folder


def _cache_root() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "qhybrid" / "gguf"


def _convert_into(folder: Path, path: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # Alone in a folder of its own: files that happen to lie beside it must not get into the result.
        source = work / "source"
        source.mkdir()
        (source / path.name).symlink_to(path.resolve())
        _convert(source, path.name, work / "result", path)
        try:
            (work / "result").rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(source: Path, file_name: str, result: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=file_name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name, trust_remote_code=False)
            model.save_pretrained(result)
            tokenizer.save_pretrained(result)
    except OSError:
        raise
    except Exception as error:  # transformers raises whatever its parser stumbles over
        raise ModelError(
            f"transformers cannot read {path}: {type(error).__name__}: {error}",
            hint="use the model's safetensors form, or a GGUF file of an architecture that transformers knows",
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: the conversion is a detail that the user did not ask for."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # bars and Python warnings alike
            yield
    finally:
        logging.set_verbosity(verbosity)
