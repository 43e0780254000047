"""Writes an adapter as a GGUF file that llama.cpp applies to a base model's GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
from torch import Tensor

from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.errors import AdapterError
from qhybrid.export.folders import require_lora
from qhybrid.export.gguf.model import KINDS, add_name, announce, as_array, begin_tensors, writing
from qhybrid.export.gguf.names import GgufNames


def write_gguf_adapter(
    adapter: PlainAdapter,
    config: Mapping[str, Any],
    file: Path,
    *,
    dtype: Literal["f32", "f16"] = "f32",
    name: str | None = None,
) -> None:
    """Write the LoRA modules of an adapter for llama.cpp. On an exception no file is left.

    llama.cpp has one alpha for the whole file and multiplies the product of A and B by alpha / rank, with each
    module's own rank (llama-adapter.h). So alpha is the largest rank R, and B becomes B·s·r/R.

    Args:
        config: what the base model's config.json says.
        file: in a folder that exists; a file of that name is replaced.
        name: of the adapter, for people; the file's without its ending when left out.

    Raises:
        AdapterError: DoRA, or PiSSA of peft; no module at all, or one that the model or llama.cpp does not have.
        ExportError: a family that is not proven in llama.cpp, or values that the dtype does not hold.
        OSError: the disk is full or fails.
    """
    require_untouched_base(adapter)
    require_lora(adapter, "llama.cpp")
    if not adapter.modules:
        raise AdapterError(
            f"{adapter.source} changes no module", hint="the base model's own GGUF file is the same"
        )
    names = GgufNames(config)
    largest = max(module.rank for module in adapter)
    tensors: dict[str, Tensor] = {}
    for module in adapter:
        target = _target(module, names)
        factor = module.scaling * module.rank / largest
        tensors[f"{target}.lora_a"] = module.a
        tensors[f"{target}.lora_b"] = names.reordered(module.module, module.b.float() * factor)
    with writing(file, names.family.name) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        add_name(writer, name or file.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(largest))
        for target, value in tensors.items():
            announce(writer, target, tuple(value.shape), KINDS[dtype])
        begin_tensors(writer)
        for target, value in tensors.items():
            writer.write_tensor_data(as_array(value, KINDS[dtype], target))


def _target(module: PlainModule, names: GgufNames) -> str:
    target = names.of(f"{module.module}.weight")
    # Outside the layers, and in Gemma's norms, llama.cpp's tensors are not the model's.
    if target is None or not target.startswith("blk."):
        raise AdapterError(
            f"llama.cpp has no adapter for {module.module}",
            hint="the adapter belongs to another base model, or changes more than the layers: merge it "
            "(qhybrid export ADAPTER OUT --to gguf --onto 16bit)",
        )
    return target
