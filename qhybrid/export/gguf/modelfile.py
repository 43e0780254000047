"""The Modelfile that lies beside a result's GGUF file."""

from __future__ import annotations

from pathlib import Path

from qhybrid.disk import write_bytes
from qhybrid.export.gguf.ollama import ollama_modelfile
from qhybrid.export.gguf.tokenizer import end_token_ids
from qhybrid.export.job import Job

MODELFILE = "Modelfile"


def write_modelfile(job: Job, folder: Path, model_file: str, adapter_file: str | None = None) -> None:
    """Write `Modelfile` into `folder`.

    Args:
        model_file: the name of the model's GGUF file. adapter_file: of an adapter's, beside it.

    Raises:
        ExportError: a system prompt that no Modelfile can hold, or a tokenizer without an end token.
        OSError: the disk is full or fails.
    """
    ends = job.tokenizer.convert_ids_to_tokens(end_token_ids(job.tokenizer, job.base))
    text = ollama_modelfile(
        model_file,
        job.tokenizer,
        adapter_file=adapter_file,
        end_tokens=ends,
        system_prompt=job.adapter.info.system_prompt,
    )
    write_bytes(folder / MODELFILE, text.encode())
