"""NF4 quantisation in small pieces: bit-equal to bitsandbytes on the CPU, without its copies of the weight."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

BLOCK_SIZE = 64  # weights that share one absmax (QLoRA, arXiv 2305.14314)
ABSMAX_BLOCK_SIZE = 256  # absmax values that share one second-level absmax

# Weights per piece, a multiple of the block size. Below, the interpreter rules the time; above, the scratch
# memory (10 bytes per weight and thread) leaves the processor's cache.
CHUNK_SIZE = 2**19

# Keeps the reciprocal of an all-zero block finite. The value is bitsandbytes' own.
_SMALLEST_ABSMAX = 1e-38


def quantize_nf4(
    weight: Tensor, *, double_quant: bool, quant_storage: torch.dtype = torch.uint8
) -> tuple[Tensor, QuantState]:
    """Quantise `weight` to 4-bit NormalFloat in blocks of 64.

    On the CPU the result equals `bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4",
    compress_statistics=double_quant, blocksize=64)` bit for bit, while the scratch memory is 5 MiB per thread
    instead of fp32 and int32 copies of the weight. On other devices bitsandbytes' own kernel runs.

    Args:
        weight: any shape; bfloat16, float16 or float32.
        double_quant: also quantise the block scales to 8 bits (QLoRA section 3, "Double Quantization").
        quant_storage: dtype that the packed bytes are viewed as.

    Returns:
        The packed weight, (ceil(weight.numel() / 2), 1) in bytes, with the first of two values in the high
        half of a byte; and the QuantState that turns it back into `weight.shape` and `weight.dtype`.
    """
    assert weight.dtype in (torch.bfloat16, torch.float16, torch.float32), weight.dtype
    if weight.device.type != "cpu":
        return quantize_4bit(
            weight,
            blocksize=BLOCK_SIZE,
            compress_statistics=double_quant,
            quant_type="nf4",
            quant_storage=quant_storage,
        )

    code = get_4bit_type("nf4", device=weight.device)  # [16], ascending
    packed, absmax = _quantize_blocks(weight.detach().reshape(-1), code)
    if quant_storage != torch.uint8:
        packed = packed.view(quant_storage)
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK_SIZE,
        code=code,
        quant_type="nf4",
    )
    if double_quant:
        state.offset = absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(absmax - state.offset, blocksize=ABSMAX_BLOCK_SIZE)
        state.nested = True
    return packed.unsqueeze(1), state


def fill_linear4bit(module: Linear4bit, weight: Tensor) -> None:
    """Give `module` the quantised form of `weight`, as bitsandbytes does when a Linear4bit is moved to a device.

    Args:
        module: an NF4 layer whose weight is still a placeholder (on the meta device, say).
        weight: [out_features, in_features] on the device where the module is to live, in the dtype that the
            layer dequantises to.
    """
    placeholder = module.weight
    assert placeholder.quant_type == "nf4" and placeholder.blocksize == BLOCK_SIZE
    packed, state = quantize_nf4(
        weight, double_quant=placeholder.compress_statistics, quant_storage=placeholder.quant_storage
    )
    module.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=placeholder.compress_statistics,
        quant_type="nf4",
        quant_storage=placeholder.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _quantize_blocks(flat: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes [ceil(n / 2)] uint8 and block scales [ceil(n / 64)] fp32 of `flat` [n]."""
    num_weights = flat.numel()
    midpoints = (code[:-1] + code[1:]) / 2  # [15], the boundaries between the 16 levels
    packed = torch.empty((num_weights + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-num_weights // BLOCK_SIZE), dtype=torch.float32)
    starts = range(0, num_weights, CHUNK_SIZE)

    # One thread per core with chunks of its own. torch's threads would meet at the end of every short
    # operation instead, and wait there for the slowest: on a busy machine that costs several times the work.
    num_workers = max(1, min(torch.get_num_threads(), len(starts)))
    with _single_threaded_torch(), ThreadPoolExecutor(num_workers) as pool:
        jobs = [
            pool.submit(_quantize_chunks, flat, midpoints, starts[worker::num_workers], packed, absmax)
            for worker in range(num_workers)
        ]
        for job in jobs:
            job.result()
    return packed, absmax


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Threads that start in this context run torch's operations on themselves alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _quantize_chunks(flat: Tensor, midpoints: Tensor, starts: range, packed: Tensor, absmax: Tensor) -> None:
    """Quantise the chunks of `flat` that begin at `starts` into their places in `packed` and `absmax`."""
    size = min(CHUNK_SIZE, flat.numel() + flat.numel() % 2)
    values, magnitudes = torch.empty(2, size, dtype=torch.float32)
    levels, flags = torch.empty(2, size, dtype=torch.uint8)
    for start in starts:
        stop = min(start + CHUNK_SIZE, flat.numel())
        count = stop - start
        padded = count + count % 2
        values[:count].copy_(flat[start:stop])
        values[count:padded] = 0.0
        scales = absmax[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)]
        _scale_to_unit(values[:count], magnitudes[:count], scales)
        _count_midpoints_below(values[:padded], midpoints, levels[:padded], flags[:padded])
        pairs = levels[:padded].view(torch.int16)  # little endian: the first of two levels is the low byte
        packed[start // 2 : (stop + 1) // 2] = (pairs << 4) | (pairs >> 8)


def _scale_to_unit(values: Tensor, magnitudes: Tensor, scales: Tensor) -> None:
    """Divide `values` [n] by their block's largest magnitude, in place, and write those to `scales`.

    Whole blocks are multiplied by a reciprocal and a last, shorter block is divided, as in bitsandbytes:
    the two round differently. It also stores the floor for a short block of zeros, but 0 for a whole one.
    """
    whole = values.numel() // BLOCK_SIZE * BLOCK_SIZE
    torch.abs(values, out=magnitudes)
    if whole:
        whole_scales = scales[: whole // BLOCK_SIZE]
        torch.amax(magnitudes[:whole].view(-1, BLOCK_SIZE), dim=1, out=whole_scales)
        values[:whole].view(-1, BLOCK_SIZE).mul_((1.0 / whole_scales.clamp(min=_SMALLEST_ABSMAX)).view(-1, 1))
    if whole < values.numel():
        scales[-1] = magnitudes[whole:].max().clamp(min=_SMALLEST_ABSMAX)
        values[whole:] /= scales[-1]


def _count_midpoints_below(values: Tensor, midpoints: Tensor, levels: Tensor, flags: Tensor) -> None:
    """Write to `levels` [n] uint8 how many midpoints lie below each of `values` [n]: the nearest level's index.

    numpy compares into bytes with vector instructions, where torch 2.13 goes value by value. Counted down
    from 15, so that NaN ends at 15 as in bitsandbytes. Values slightly outside [-1, 1] need no clamp, since
    every midpoint lies inside.
    """
    values_array, levels_array, flags_array = values.numpy(), levels.numpy(), flags.numpy()
    levels_array.fill(midpoints.numel())
    for midpoint in midpoints.numpy():
        np.less_equal(values_array, midpoint, out=flags_array.view(bool))
        np.subtract(levels_array, flags_array, out=levels_array)
