"""A weight and its adapter made one, some rows at a time: W + s·B·A, of DoRA m ⊙ (W + s·B·A) / ||W + s·B·A||.

W is the weight in the dtype of the training, and onto "nf4" the dequantised form of its NF4, which is what the
4-bit layer multiplies with. PiSSA's W, onto both, is what is left without the principal part, as in training. All
that follows is fp32, and is rounded once, to the dtype of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from torch import Tensor

from qhybrid.adapters.plain import PlainModule
from qhybrid.base.nf4 import BLOCK_SIZE, quantize_nf4
from qhybrid.base.principal import PrincipalPart
from qhybrid.errors import ExportError, ModelError

Onto = Literal["16bit", "nf4"]
Rows = Callable[
    [int, int], Tensor
]  # the rows from the first number up to the second: (n, in), or (n,) of a vector

CHUNK_SIZE = 2**19  # weights that are merged at a time; their scratch memory, 12 bytes each, stays in the cache

_SMALLEST_NORM = 1e-12  # as in adapters/dora.py: the direction of a row of zeros is undefined and stays zero


def chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The first row and the one after the last of each piece of a tensor, in order.

    Pieces begin at multiples of 64 rows, so that no NF4 block lies in two of them.
    """
    assert shape, "a model has no tensor without dimensions"
    width = max(1, math.prod(shape[1:]))
    num_rows = max(1, CHUNK_SIZE // width // BLOCK_SIZE) * BLOCK_SIZE
    for start in range(0, shape[0], num_rows):
        yield start, min(start + num_rows, shape[0])


class Nf4Rows:
    """The rows of a weight after NF4 and back, bit-equal to `dequantize_4bit` of the whole.

    Holds the packed weight and its scales, 0.56 bytes per weight.

    Args:
        weight: (out, in) in the dtype of the training, on the device whose arithmetic counts. It is not kept.
        double_quant: as in training.
    """

    def __init__(self, weight: Tensor, *, double_quant: bool) -> None:
        self._width = weight.shape[1]
        self._packed, state = quantize_nf4(weight, double_quant=double_quant)
        self._whole = None
        if self._width % BLOCK_SIZE:
            # On CPUs with AVX-512, bitsandbytes 0.50.2 takes other blocks' scales for rows that are not a whole
            # number of blocks. That is what the layer multiplies with, and only the whole weight gives it.
            self._whole = dequantize_4bit(self._packed, state)
            return
        self._dtype, self._code, self._absmax = state.dtype, state.code, state.absmax
        if state.offset is not None:  # the scales are quantised themselves
            self._absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows (n, in) in the weight's dtype, on the CPU. `start` is a multiple of 64."""
        if self._whole is not None:
            return self._whole[start:stop].cpu()
        begin, end = start * self._width, stop * self._width
        state = QuantState(
            absmax=self._absmax[begin // BLOCK_SIZE : end // BLOCK_SIZE],
            shape=torch.Size((stop - start, self._width)),
            dtype=self._dtype,
            blocksize=BLOCK_SIZE,
            code=self._code,
            quant_type="nf4",
        )
        return dequantize_4bit(self._packed[begin // 2 : end // 2], state).cpu()


def rows_of(
    weight: Tensor,
    *,
    quantized: bool,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    without: PrincipalPart | None = None,
) -> Rows:
    """The rows of a weight as training saw it: cast to `dtype`, without `without`, through NF4; load_base's order.

    Args:
        weight: of any shape; (out, in) if `quantized` or `without`, and with both it is used up.
        device: where training quantised it. bitsandbytes' kernels may differ in a last bit.
    """
    if quantized:
        seen = weight.to(device=device, dtype=dtype)
        if without is not None:
            without.take_out_of(seen)
        return Nf4Rows(seen, double_quant=double_quant)

    def rows(start: int, stop: int) -> Tensor:
        seen = weight[start:stop].to(device="cpu", dtype=dtype)
        return seen if without is None else without.residual(seen, start)

    return rows


def widened(module: PlainModule) -> PlainModule:
    """The same module as it was trained, in fp32 on the CPU, for `merged_rows`."""
    module = module.native
    magnitude = None if module.magnitude is None else module.magnitude.float().cpu()
    return dataclasses.replace(module, a=module.a.float().cpu(), b=module.b.float().cpu(), magnitude=magnitude)


def merged_rows(rows: Tensor, start: int, module: PlainModule | None, dtype: torch.dtype) -> Tensor:
    """Rows of the merged weight.

    Args:
        rows: (n, in) of W as training saw it. Not changed.
        start: the number of the first of them.
        module: the adapter, from `widened`; None for a weight that has none.

    Returns:
        (n, in) in `dtype`.
    """
    if module is None:
        return rows.to(dtype)
    stop = start + rows.shape[0]
    merged = torch.addmm(rows.float(), module.b[start:stop], module.a, alpha=module.scaling)
    if module.magnitude is not None:
        norm = torch.linalg.vector_norm(merged, dim=1)
        merged *= (module.magnitude[start:stop] / norm.clamp_min(_SMALLEST_NORM))[:, None]
    return merged.to(dtype)


def require_finite(merged: Tensor, rows: Tensor, name: str) -> None:
    """Refuse a result with NaN or an infinity in it.

    Args:
        rows: what `merged` was made of, to tell whose fault it is.
        name: of the weight.

    Raises:
        ModelError: they come from the base model.
        ExportError: they come with the adapter, or the result's dtype is too narrow.
    """
    # The sum costs one pass without a copy and misses none; where it is only too large, all values are looked at.
    if merged.sum(dtype=torch.float32).isfinite() or merged.isfinite().all():
        return
    if not rows.isfinite().all():
        raise ModelError(
            f"{name} of the base model holds values that are not finite in {_name(rows.dtype)}",
            hint="download or copy the model again; if it is whole, train in the dtype that it is stored in",
        )
    raise ExportError(
        f"{name} would hold values that are not finite: the merged ones are too large for {_name(merged.dtype)}",
        hint="use the adapter beside the model",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def merge_into(target: Tensor, rows: Rows, module: PlainModule | None, name: str) -> None:
    """Write a merged weight over `target`, which may be the memory that `rows` reads.

    Raises:
        ModelError, ExportError: as `require_finite`.
    """
    wide = None if module is None else widened(module)
    for start, stop in chunks(tuple(target.shape)):
        seen = rows(start, stop)
        merged = merged_rows(seen, start, wide, target.dtype)
        require_finite(merged, seen, name)
        target[start:stop] = merged.to(target.device)


def merged_weight(
    weight: Tensor,
    module: PlainModule | None,
    *,
    quantized: bool,
    double_quant: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """One weight with its adapter in it, in new memory.

    Args:
        weight: as it is stored.
        module: its adapter, if it has one.
        quantized: whether training saw it through NF4. double_quant: with its scales in 8 bits.
        dtype: of the training. out_dtype: of the result.

    Raises:
        ModelError, ExportError: as `require_finite`.
    """
    merged = torch.empty(weight.shape, dtype=out_dtype)
    without = None if module is None else module.principal
    rows = rows_of(weight, quantized=quantized, double_quant=double_quant, dtype=dtype, without=without)
    merge_into(merged, rows, module, module.module if module else "the weight")
    return merged
