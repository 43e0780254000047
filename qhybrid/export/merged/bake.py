"""The merged model, written shard by shard whatever its size; and the same of a model in memory.

Every name, shape and dtype is checked before anything is written. Then each shard of the base becomes one of the
same name, and what is finished survives a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qhybrid import __version__
from qhybrid.adapters.plain import PlainAdapter, require_untouched_base
from qhybrid.base.fingerprint import config_hash
from qhybrid.base.load import resolve_device
from qhybrid.disk import write_bytes
from qhybrid.evaluation.models import tokenizer_of
from qhybrid.export.merged.base_tensors import (
    BaseFiles,
    modules_by_weight,
    open_base,
    quantized_weights,
    shell_like,
)
from qhybrid.export.merged.model_files import read_generation, write_model_files
from qhybrid.export.merged.rows import Onto, merge_into, rows_of
from qhybrid.export.merged.shard import MergeJob, plan_shard, write_shard
from qhybrid.export.merged.shard_writer import TensorPlan
from qhybrid.export.output import require_free
from qhybrid.export.resumable import PartialFolder, resumable_folder, sha256_of
from qhybrid.recipe.schema import Dtype, ModelSection, QuantizationSection

_FORMAT_VERSION = 1  # of what is written: another one does not go on from this one's shards
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Baked:
    """A merged model.

    Attributes:
        folder: where it lies within the block of `bake`.
        num_bytes: of all weight files. num_shards: how many these are, `num_resumed` of an earlier attempt.
        num_adapted: weights that the adapter changes. num_changed: those in which that shows after rounding.
        changed_share: the share of their values that are others than without the adapter.
        seconds: that reading, merging and writing took.
        sha256: of all files, by name.
        settings: how it was made, ready for JSON.
    """

    folder: Path
    num_bytes: int
    num_shards: int
    num_resumed: int
    num_adapted: int
    num_changed: int
    changed_share: float
    seconds: float
    sha256: dict[str, str] = field(repr=False)
    settings: dict[str, str | bool | None]


@contextlib.contextmanager
def bake(
    adapter: PlainAdapter,
    section: ModelSection,
    quantization: QuantizationSection,
    out: Path,
    *,
    onto: Onto,
    dtype: Dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Baked]:
    """Merge an adapter into its base model: a folder that stock transformers, vLLM and llama.cpp read.

    The model is whole when the block begins, and has the name `out` when it ends; so the block may try it, add
    files, or refuse it with an exception. A call that was killed, interrupted or stopped by a full disk has left
    its finished shards beside `out`, and the same call goes on from there.

    Args:
        adapter: not PiSSA of peft, whose principal part is not known.
        section, quantization: the base, as it was in training.
        out: where nothing is.
        onto: "16bit" for the weights of the base, "nf4" for what they are after NF4.
        dtype: of the merged weights, the training's by default.
        device: where to quantise; as in `load_base`.
        tokenizer: to write beside it, by default the adapter's own or else the base's.
        progress: told how many bytes of weights are written, and of how many.

    Raises:
        ExportError: `out` is not free, the disk is too small or fails, or values overflow.
        ModelError: the base cannot be read, does not fit its config.json, is stored quantised, or is not finite.
        AdapterError: the adapter is PiSSA of peft, or does not fit the base.
    """
    began = time.perf_counter()
    require_free(out)
    require_untouched_base(adapter)
    out_dtype = dtype or section.dtype
    job = MergeJob(onto, quantization.double_quant, section.dtype, out_dtype, resolve_device(device))
    with open_base(section, quantization, adapter, onto) as base:
        generation = read_generation(base.folder)
        if tokenizer is None:
            tokenizer = tokenizer_of(adapter.source, section)
        with resumable_folder(out, _key(adapter, base, job)) as part:
            resumed = _write_weights(part, base, job, progress)
            write_model_files(
                part.folder,
                base.raw_config,
                generation,
                tokenizer,
                architecture=base.architecture,
                dtype=out_dtype,
            )
            num_values = sum(math.prod(module.shape) for module in adapter)
            yield Baked(
                folder=part.folder,
                num_bytes=_sum(part, "bytes"),
                num_shards=len(part.finished),
                num_resumed=resumed,
                num_adapted=len(adapter.modules),
                num_changed=_sum(part, "changed_weights"),
                changed_share=_sum(part, "changed_values") / max(1, num_values),
                seconds=time.perf_counter() - began,
                sha256=_hashes(part),
                settings=job.settings() | {"adapter_sha256": _adapter_hash(adapter)},
            )


def merge_in_place(
    model: PreTrainedModel,
    adapter: PlainAdapter,
    *,
    onto: Onto,
    section: ModelSection,
    quantization: QuantizationSection,
) -> None:
    """Merge an adapter into a loaded model, to the same values as `bake` does in files.

    Args:
        model: the base, not quantised; its parameters' dtype is the result's.
        section, quantization, onto: as in `bake`.

    Raises:
        AdapterError, ModelError, ExportError: as `bake`.
    """
    require_untouched_base(adapter)
    shell = shell_like(model, section, quantization, onto)
    modules, quantized = modules_by_weight(shell, adapter), quantized_weights(shell)
    with torch.no_grad():
        for name in sorted(modules.keys() | quantized):
            weight, module = model.get_parameter(name), modules.get(name)
            rows = rows_of(
                weight.detach(),
                quantized=name in quantized,
                double_quant=quantization.double_quant,
                dtype=getattr(torch, section.dtype),
                device=weight.device,
                without=None if module is None else module.principal,
            )
            merge_into(weight.detach(), rows, module, name)


def _key(adapter: PlainAdapter, base: BaseFiles, job: MergeJob) -> str:
    """Equal for equal results: a hash of the adapter, the base's files by size and time, and the settings."""
    files = []
    for shard in base.shards:
        status = os.fstat(shard.descriptor)
        files.append((shard.path.name, status.st_size, status.st_mtime_ns))
    versions = [_FORMAT_VERSION, __version__, torch.__version__]
    facts = [versions, files, config_hash(base.folder), job.settings(), str(job.device), _adapter_hash(adapter)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _adapter_hash(adapter: PlainAdapter) -> str:
    """SHA-256, in hex, of what an adapter does to its base."""
    digest = hashlib.sha256()
    for module in sorted(adapter, key=lambda module: module.module):
        digest.update(f"{module.module} {module.scaling!r} {module.num_principal}".encode())
        for values in (module.a, module.b, module.magnitude):
            if values is not None:
                digest.update(f" {values.dtype} {tuple(values.shape)} ".encode())
                digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_weights(
    part: PartialFolder, base: BaseFiles, job: MergeJob, progress: Callable[[int, int], None]
) -> int:
    """Write every shard that is not finished, and the index of several; how many were finished before."""
    shards = {shard.path.name: shard for shard in base.shards if shard.tensors}
    plans = {name: plan_shard(shard, job) for name, shard in shards.items()}
    sizes = {name: sum(tensor.num_bytes for tensor in plan) for name, plan in plans.items()}
    total = sum(sizes.values())
    part.require_space(total)
    done = resumed = 0
    for name, shard in shards.items():
        if part.is_finished(name):
            resumed += 1
        else:
            told = partial(_told, progress, done, total)
            part.finish(name, write_shard(part.folder / name, shard, plans[name], job, told))
        done += sizes[name]
        progress(done, total)
    if list(plans) != ["model.safetensors"]:
        _write_index(part.folder, plans, total)
    return resumed


def _told(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _write_index(folder: Path, plans: dict[str, list[TensorPlan]], total: int) -> None:
    weight_map = {tensor.name: name for name, plan in plans.items() for tensor in plan}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes(folder / _INDEX, (json.dumps(content, indent=2) + "\n").encode())


def _sum(part: PartialFolder, fact: str) -> int:
    return sum(facts[fact] for facts in part.finished.values())


def _hashes(part: PartialFolder) -> dict[str, str]:
    """SHA-256, in hex, of all files by name."""
    found = {file.name: sha256_of(file) for file in part.others()}
    found |= {name: facts["sha256"] for name, facts in part.finished.items()}
    return dict(sorted(found.items()))
