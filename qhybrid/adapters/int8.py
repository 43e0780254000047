"""Adapters in INT8: A with a scale for each row, B with one for each output channel, magnitudes as they are.

Of PiSSA also A0 and B0, exactly: the base is rebuilt with them.

x ≈ scale · q with q in −127…127 and scale = max|x| / 127 of the row; a row of A belongs to one rank term, a row of
B to one output channel. Half the bytes of bf16, a quarter of fp32, beside the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qhybrid.adapters.plain import PlainModule
from qhybrid.errors import AdapterError

WEIGHTS = "adapter_int8.safetensors"
_LEVELS = 127
_SUFFIXES = (".lora_A", ".lora_B")


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """q (rows, columns) int8 and the scales (rows,) in fp32; a row of zeros has scale 0."""
    wide = matrix.float()
    scale = wide.abs().amax(dim=1) / _LEVELS
    q = torch.where(scale[:, None] > 0, wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], 0)
    return q.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """(rows, columns) in fp32."""
    return q.float() * scale[:, None]


def int8_tensors(modules: Sequence[PlainModule]) -> dict[str, Tensor]:
    """The tensors of adapter_int8.safetensors."""
    tensors: dict[str, Tensor] = {}
    for whole in modules:
        module, part = whole.native, whole.principal
        if part is not None:
            tensors |= {f"{module.module}.lora_A0": part.a, f"{module.module}.lora_B0": part.b}
        for suffix, matrix in zip(_SUFFIXES, (module.a, module.b), strict=True):
            q, scale = quantize_rows(matrix)
            tensors[module.module + suffix] = q
            tensors[f"{module.module}{suffix}_scale"] = scale
        if module.magnitude is not None:
            tensors[f"{module.module}.lora_magnitude"] = module.magnitude.float()
    return tensors


def plain_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors in fp32 under the names of adapter.safetensors.

    Raises:
        AdapterError: a matrix without its scales, or of another form.
    """
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("_scale"):
            continue
        if not name.endswith(_SUFFIXES):
            plain[name] = value
            continue
        scale = tensors.get(f"{name}_scale")
        if value.dtype != torch.int8 or value.dim() != 2 or scale is None or scale.shape != value.shape[:1]:
            raise AdapterError(f"{name} is not INT8 with a scale for each row", where=where)
        plain[name] = dequantize_rows(value, scale)
    return plain
