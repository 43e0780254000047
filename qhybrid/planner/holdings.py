"""What a run holds from its first step to its last: weights, adapters, optimizer states, scores and norms."""

from __future__ import annotations

from functools import lru_cache

from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.optimizers import Rule, state_bytes
from qhybrid.planner.tape import FP32
from qhybrid.planner.workload import Device

_NF4_BLOCK, _SCALE_BLOCK = 64, 256  # weights of a scale, and scales of a second-level scale
_MIB = 2**20


@lru_cache(maxsize=256)
def base_weights(spec: ModelSpec, *, nf4: bool, nested: bool, width: int, rounding: int) -> tuple[int, int]:
    """Bytes of the quantised linears with their scales, and of everything that is not quantised."""

    def rounded(num_bytes: float) -> int:
        return -(-int(num_bytes) // rounding) * rounding

    quantized = plain = 0
    for linear in spec.linears:
        num_weights = linear.in_features * linear.out_features
        if nf4:
            blocks = -(-num_weights // _NF4_BLOCK)
            scales = rounded(blocks * (1 if nested else FP32))
            if nested:  # second-level scales, their code of 256 values, and the offset
                scales += rounded(-(-blocks // _SCALE_BLOCK) * FP32) + rounded(256 * FP32) + rounded(FP32)
            quantized += rounded((num_weights + 1) // 2) + scales + rounded(16 * FP32)
        else:
            plain += rounded(num_weights * width)
        if linear.bias:
            plain += rounded(linear.out_features * width)
    quantized *= spec.num_layers
    plain *= spec.num_layers
    plain += rounded(spec.vocab_size * spec.hidden_size * width) * (1 if spec.tie_word_embeddings else 2)
    plain += spec.num_norm_parameters * width + 2 * rounded(spec.head_dim // 2 * FP32)
    return quantized, plain


def unsplit_remainders(spec: ModelSpec, *, nf4: bool, width: int) -> int:
    """What CUDA's allocator counts as allocated beyond the sizes of the base weights.

    From 10 MiB on a tensor gets a segment of its own, in steps of 2 MiB, and a remainder of up to 1 MiB is not
    split off (c10/cuda/CUDACachingAllocator.cpp, should_split).
    """
    sizes = []
    for linear in spec.linears:
        num_weights = linear.in_features * linear.out_features
        sizes += [(num_weights + 1) // 2 if nf4 else num_weights * width] * spec.num_layers
    sizes += [spec.vocab_size * spec.hidden_size * width] * (1 if spec.tie_word_embeddings else 2)
    total = 0
    for size in sizes:
        left = -size % (2 * _MIB)
        if size >= 10 * _MIB and left <= _MIB:
            total += left
    return total


def parameters_of(row: LayoutRow, adapter_width: int) -> list[tuple[int, int]]:
    """The trained tensors of one module: (number of values, bytes of one)."""
    tensors = [(row.rank * row.in_features, adapter_width), (row.rank * row.out_features, adapter_width)]
    if row.kind == "dora":
        tensors.append((row.out_features, FP32))
    elif row.kind == "adalora":
        tensors.append((row.rank, FP32))
    return tensors


def adapter_bytes(layout: Layout, adapter_width: int, rounding: int) -> dict[str, int]:
    """Bytes of the trained parameters, by band."""
    bands = dict.fromkeys(layout.bands, 0)
    for row in layout:
        for size, width in parameters_of(row, adapter_width):
            bands[row.band] += -(-size * width // rounding) * rounding
    return bands


def optimizer_states(
    layout: Layout, adapter_width: int, rule: Rule, rounding: int, device: Device
) -> tuple[int, int]:
    """Bytes of the states: (on the device, in unified memory)."""
    on_device = unified = 0
    for row in layout:
        for size, width in parameters_of(row, adapter_width):
            here, there = state_bytes(rule, size, width, rounding, on_cuda=device == "cuda")
            on_device += here
            unified += there
    return on_device, unified


def adalora_scores(layout: Layout, rounding: int) -> int:
    """Importance and uncertainty in fp32 for every value of P, Q and Λ, and the masks."""
    total = 0
    for row in layout.of_kind("adalora"):
        for size, _ in parameters_of(row, FP32):
            total += 2 * (-(-size * FP32 // rounding) * rounding)
        total += -(-row.rank // rounding) * rounding
    return total


def principal_bytes(layout: Layout, adapter_width: int) -> int:
    """What PiSSA's A and B were at the start: in main memory, and in every checkpoint."""
    rows = (row for row in layout if row.init == "pissa")
    return sum(row.rank * (row.in_features + row.out_features) * adapter_width for row in rows)


def dora_norms(layout: Layout, rounding: int) -> int:
    """Row norms of W, and those of W + s·B·A that are kept until the next optimizer step, in fp32."""
    return sum(2 * (-(-row.out_features * FP32 // rounding) * rounding) for row in layout.of_kind("dora"))
