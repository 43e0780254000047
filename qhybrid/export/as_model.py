"""Merged models as a result of `qhybrid export`: in safetensors or GGUF, proven before they are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhybrid.architecture.spec import read_config
from qhybrid.errors import ExportError, ProofError
from qhybrid.export.card import Artefact
from qhybrid.export.finish import Exported, finish, told_approximation
from qhybrid.export.gguf.model import GgufDtype, require_known_to_llama_cpp, write_gguf_model
from qhybrid.export.gguf.modelfile import write_modelfile
from qhybrid.export.job import Job, Say
from qhybrid.export.loading_code import model_code
from qhybrid.export.merged.bake import Baked, bake
from qhybrid.export.merged.rows import Onto
from qhybrid.export.probe import MeasuredRows, measured_rows
from qhybrid.export.proof import Proof, prove
from qhybrid.export.resumable import new_folder
from qhybrid.recipe.schema import SourceSection
from qhybrid.units import format_bytes, format_duration


@dataclass(frozen=True)
class ProofWanted:
    """What a merged model has to show.

    Attributes:
        data: the rows to measure on; None for the built-in probe.
        measure: False for no proof at all.
        min_agreement: the least share of equal top tokens; None for the default.
    """

    data: Path | None = None
    measure: bool = True
    min_agreement: float | None = None


def to_merged(job: Job, out: Path, onto: Onto, wanted: ProofWanted, say: Say) -> Exported:
    """A whole model in safetensors, for transformers and all that reads its folders.

    Raises:
        ExportError: `out` is not free, or the disk is too small.
        ModelError, AdapterError: the base cannot be read, or the adapter does not fit it.
        ProofError: the model is not what was trained.
    """
    rows = _rows(job, wanted)
    with _baked(job, out, onto, say) as baked:
        proof = _prove(job, baked.folder, onto, rows, wanted, say)
        figures = _figures(baked, proof)
        kind = f"A whole model, the adapter merged into {_WEIGHTS[onto]}."
        finish(
            job,
            baked.folder,
            "merged",
            figures,
            Artefact(out.name, kind, "transformers", (("python", model_code(job.section.dtype)),), proof=proof),
            baked.sha256,
        )
    return Exported(out, (_told(baked), *told_approximation(job), *_told_proof(proof)), figures)


def to_merged_gguf(job: Job, out: Path, onto: Onto, dtype: GgufDtype, wanted: ProofWanted, say: Say) -> Exported:
    """The same as one file for llama.cpp, with a Modelfile for Ollama.

    Raises:
        as `to_merged`, and ExportError for a model or a tokenizer that is not proven in llama.cpp.
    """
    require_known_to_llama_cpp(read_config(job.base / "config.json"), job.tokenizer, job.base)
    rows = _rows(job, wanted)
    with new_folder(out) as folder:
        merged = folder / "model"
        try:
            with _baked(job, merged, onto, say) as baked:
                proof = _prove(job, baked.folder, onto, rows, wanted, say)
        except ExportError as error:
            if isinstance(error.__cause__, OSError):  # its hint is to go on, but this folder goes as a whole
                raise ExportError(error.message) from error
            raise
        file = folder / f"{out.name}-{dtype.upper()}.gguf"
        notes = write_gguf_model(merged, file, dtype=dtype, name=out.name, progress=_bytes_told(say, "tensors"))
        write_modelfile(job, folder, file.name)
        shutil.rmtree(merged)
        figures = {**_figures(baked, proof), "bytes": file.stat().st_size}
        kind = f"A whole model for llama.cpp, the adapter merged into {_WEIGHTS[onto]}."
        finish(
            job,
            folder,
            "gguf",
            figures,
            Artefact(out.name, kind, "gguf", _gguf_code(file.name), notes=tuple(notes), proof=proof),
        )
    size = f"{file.name}: {format_bytes(figures['bytes'])}"
    told = (*told_approximation(job), *_told_proof(proof), *(f"note: {note}" for note in notes))
    return Exported(out, (size, *told), figures)


_WEIGHTS: dict[Onto, str] = {
    "16bit": "the 16-bit weights of the base",
    "nf4": "the base's weights dequantised from NF4, as training saw them",
}


@contextmanager
def _baked(job: Job, out: Path, onto: Onto, say: Say) -> Iterator[Baked]:
    if onto == "nf4" and job.quantization.method == "none":
        raise ExportError("the adapter was trained on an unquantised base", hint="leave --onto nf4 out")
    with bake(
        job.adapter,
        job.section,
        job.quantization,
        out,
        onto=onto,
        tokenizer=job.tokenizer,
        progress=lambda done, total: say(f"merging: {format_bytes(done)} of {format_bytes(total)}"),
    ) as baked:
        if baked.num_adapted and not baked.num_changed:
            raise ProofError(
                f"the merged model equals the base: none of {baked.num_adapted} changes survives the rounding",
                hint="the adapter is too light for the weights' dtype; serve it beside the base instead",
            )
        yield baked


def _rows(job: Job, wanted: ProofWanted) -> MeasuredRows | None:
    """Read before anything is written, so that a wrong file costs nothing."""
    if not wanted.measure:
        return None
    source = None if wanted.data is None else SourceSection.model_validate({"path": str(wanted.data)})
    return measured_rows(source, job.tokenizer, job.trained.info)


def _prove(
    job: Job, written: Path, onto: Onto, rows: MeasuredRows | None, wanted: ProofWanted, say: Say
) -> Proof | None:
    if rows is None:
        return None
    say("measuring the proof")
    return prove(
        job.trained,
        job.adapter,
        job.section,
        job.quantization,
        rows.rows,
        rows.name,
        onto=onto,
        written=written,
        mark=wanted.min_agreement,
    )


def _figures(baked: Baked, proof: Proof | None) -> dict[str, Any]:
    return {
        "bytes": baked.num_bytes,
        "shards": baked.num_shards,
        "resumed_shards": baked.num_resumed,
        "adapted_weights": baked.num_adapted,
        "changed_weights": baked.num_changed,
        "changed_share": baked.changed_share,
        "merge_seconds": round(baked.seconds, 1),
        **baked.settings,
        "proof": None if proof is None else proof.to_dict(),
    }


def _told(baked: Baked) -> str:
    resumed = f", {baked.num_resumed} of them finished before" if baked.num_resumed else ""
    shards = "1 file" if baked.num_shards == 1 else f"{baked.num_shards} files{resumed}"
    return (
        f"merged {baked.num_adapted} weights in {format_duration(baked.seconds)}: {format_bytes(baked.num_bytes)} "
        f"in {shards}"
    )


def _told_proof(proof: Proof | None) -> tuple[str, ...]:
    if proof is None:
        return ("not proven: nothing was measured",)
    rows, tokens = proof.rows, proof.tokens
    faithful = f"* has the top token of the same weights with the adapter beside them at {proof.faithful:.1%}"
    return (
        f"proof on {rows} rows ({proof.data}), {tokens} tokens; * is what was written",
        *proof.lines(),
        faithful,
    )


def _gguf_code(file: str) -> tuple[tuple[str, str], ...]:
    return (("bash", f"llama-cli -m {file}\nollama create NAME -f Modelfile"),)


def _bytes_told(say: Say, what: str):
    return lambda done, total: say(f"writing: {done} of {total} {what}")
