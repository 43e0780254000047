"""Adapters as a result of `qhybrid export`: for peft, vLLM and llama.cpp, and in INT8; tried, and then kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qhybrid.adapters.folder import read_plain, save_int8
from qhybrid.adapters.int8 import WEIGHTS as INT8_WEIGHTS
from qhybrid.adapters.plain import PlainModule
from qhybrid.adapters.spectrum import difference, factor_module
from qhybrid.architecture.spec import read_config
from qhybrid.export.card import Artefact
from qhybrid.export.finish import Exported, finish, told_approximation
from qhybrid.export.folders import SERVE_SCRIPT, fold_scaling, require_lora, write_peft, write_vllm
from qhybrid.export.gguf.adapter import write_gguf_adapter
from qhybrid.export.gguf.modelfile import write_modelfile
from qhybrid.export.job import Job, Say
from qhybrid.export.loading_code import peft_code, vllm_command
from qhybrid.export.names import public_name
from qhybrid.export.parity import require_parity
from qhybrid.export.resumable import new_folder
from qhybrid.units import format_bytes


def to_peft(job: Job, out: Path, say: Say) -> Exported:
    """An ordinary peft folder, or one of each kind below `out`; loaded by peft and compared before it is kept.

    Raises:
        ExportError: `out` is not free.
        ProofError: the logits are not the source's.
    """
    with new_folder(out) as folder:
        folders = write_peft(job.adapter, folder)
        figures = _compare_folders(job, folders, say)
        names = [one.relative_to(folder).as_posix() for one in folders]
        kind = "A peft adapter." if len(names) == 1 else "Two peft adapters, to be active together."
        told = _told(job, figures)
        finish(
            job,
            folder,
            "peft",
            figures,
            Artefact(out.name, kind, "peft", (("python", peft_code(job.adapter.info, names)),), found=told),
        )
    active = "" if len(names) == 1 else f"; load and activate both: {' and '.join(names)}"
    return Exported(out, (f"peft loads it{active}", *told), figures)


def to_vllm(job: Job, out: Path, say: Say) -> Exported:
    """A LoRA folder with one scaling for vLLM, and the command that serves it.

    Raises:
        ExportError, ProofError: as `to_peft`.
        AdapterError: it has DoRA modules.
    """
    with new_folder(out) as folder:
        limit = write_vllm(job.adapter, folder, out.name, has_template=bool(job.tokenizer.chat_template))
        figures = {**_compare_folders(job, [folder], say), "max_lora_rank": limit}
        loading = (
            ("bash", vllm_command(job.adapter.info, SERVE_SCRIPT)),
            ("python", peft_code(job.adapter.info, ["."])),
        )
        kind = f"A LoRA adapter for vLLM, which needs `--max-lora-rank {limit}`, and for peft."
        told = _told(job, figures)
        finish(job, folder, "vllm", figures, Artefact(out.name, kind, "peft", loading, found=told))
    command = f"{out / SERVE_SCRIPT} serves it: vllm serve … --enable-lora --max-lora-rank {limit}"
    return Exported(out, (command, *told), figures)


def to_int8(job: Job, out: Path, say: Say) -> Exported:
    """A and B in INT8, for small machines: a quarter of fp32's bytes, with an error that is told.

    Raises:
        ExportError: `out` is not free.
    """
    with new_folder(out) as folder:
        # Of PiSSA s·B0·A0 must stay what was taken out of the base.
        modules = tuple(m if m.magnitude is not None or m.num_principal else fold_scaling(m) for m in job.adapter)
        save_int8(modules, job.adapter.info, folder)
        say("comparing logits")
        read = read_plain(folder)
        errors = [_relative_error(one, other) for one, other in zip(job.adapter, read, strict=True)]
        figures = {
            "logits_difference": job.parity().difference_of_modules(read.modules),
            "largest_error": max(errors),
            "mean_error": sum(errors) / len(errors),
            "bytes": (folder / INT8_WEIGHTS).stat().st_size,
            "bytes_before": job.adapter.num_bytes,
        }
        before, after = figures["bytes_before"], figures["bytes"]
        told = (
            f"{format_bytes(before)} became {format_bytes(after)} ({after / before:.0%})",
            f"ΔW differs by {figures['mean_error']:.2%} of a module's norm on average, {max(errors):.2%} at most",
            f"logits differ by at most {figures['logits_difference']:.1e} of the largest",
        )
        code = f"qhybrid generate 'Hello' --adapter {out.name} --base {public_name(job.adapter.info.base_model)}"
        kind = "An adapter of qhybrid in INT8."
        finish(job, folder, "int8", figures, Artefact(out.name, kind, "qhybrid", (("bash", code),), found=told))
    return Exported(out, told, figures)


def to_gguf(job: Job, out: Path, dtype: Literal["f32", "f16"], say: Say) -> Exported:
    """A LoRA file that llama.cpp applies to the base model's GGUF file.

    Raises:
        ExportError: `out` is not free, or llama.cpp is not known to take the model's family.
        AdapterError: it has DoRA modules.
        ProofError: as LoRA it computes something else.
    """
    require_lora(job.adapter, "llama.cpp")  # before a folder is begun
    with new_folder(out) as folder:
        file = folder / f"{out.name}-{dtype.upper()}.gguf"
        say("writing")
        write_gguf_adapter(job.adapter, read_config(job.base / "config.json"), file, dtype=dtype, name=out.name)
        say("comparing logits")  # of the modules in memory: what llama.cpp makes of the file, the tests hold
        whole = job.adapter.on_whole_base.modules
        found = job.parity_on_whole_base().difference_of_modules(whole)
        figures = {**_judged(job, found, "LoRA of this adapter"), "bytes": file.stat().st_size}
        if job.trained.principal_parts:
            figures["logits_difference_as_trained"] = job.parity().difference_of_modules(whole)
        code = (
            f"llama-server -m BASE.gguf --lora {file.name}\nollama create NAME -f Modelfile    # beside BASE.gguf"
        )
        kind = "A LoRA adapter for llama.cpp, beside the base model's GGUF file."
        write_modelfile(job, folder, "BASE.gguf", file.name)
        told = _told(job, figures)
        finish(job, folder, "gguf", figures, Artefact(out.name, kind, "gguf", (("bash", code),), found=told))
    return Exported(out, (f"{file.name}: {format_bytes(figures['bytes'])}", *told), figures)


def _relative_error(one: PlainModule, other: PlainModule) -> float:
    norm = factor_module(one).norm
    return difference(one, other) / norm if norm else 0.0


def _compare_folders(job: Job, folders: Sequence[Path], say: Say) -> dict[str, Any]:
    """The difference of logits when peft loads `folders`; it must be none, unless DoRA was approximated."""
    say("comparing logits")
    figures = _judged(job, job.parity_on_whole_base().difference_of_folders(folders), "what peft loads")
    if job.trained.principal_parts:
        figures["logits_difference_as_trained"] = job.parity().difference_of_folders(folders)
    return figures


def _judged(job: Job, found: float, what: str) -> dict[str, Any]:
    if not job.approximated:
        require_parity(found, what)
        return {"logits_difference": found}
    errors = {one.module.module: {"rank": one.module.rank, "error": one.error} for one in job.approximated}
    return {"logits_difference": found, "dora_to_lora": errors}


def _told(job: Job, figures: dict[str, Any]) -> tuple[str, ...]:
    told = f"logits differ from the source's by {figures['logits_difference']:.1e} of the largest, in fp32"
    lines = [*told_approximation(job), told if job.approximated else f"{told} (the mark is 1e-5)"]
    if job.trained.principal_parts:
        base = "NF4" if job.quantization.method == "nf4" else job.section.dtype
        lines.append(
            f"PiSSA became LoRA of twice the rank, for the whole base; on that in {base}, as in training, logits "
            f"differ by {figures['logits_difference_as_trained']:.1e}, because {base} rounds another weight: what "
            "was trained is kept by --to merged" + (" --onto nf4" if base == "NF4" else "")
        )
    return tuple(lines)
