"""Merged weights against the formulas in float64, and NF4 rows against bitsandbytes bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qhybrid.adapters.plain import PlainModule
from qhybrid.errors import ExportError, ModelError
from qhybrid.export.merged import rows as merged_rows
from qhybrid.export.merged.rows import Nf4Rows, chunks, merge_into, merged_weight, rows_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that these weights are merged in several."""
    monkeypatch.setattr(merged_rows, "CHUNK_SIZE", 64 * 64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapter(shape: tuple[int, int], rank: int = 3, *, dora: bool = False) -> PlainModule:
    magnitude = random(shape[0], seed=3).abs() + 0.5 if dora else None
    a, b = random(rank, shape[1], seed=1), random(shape[0], rank, seed=2, scale=0.05)
    return PlainModule("model.layers.0.self_attn.q_proj", a, b, 0.7, magnitude)


def reference(weight: torch.Tensor, module: PlainModule) -> torch.Tensor:
    """In float64, from the papers."""
    merged = weight.double() + module.scaling * (module.b.double() @ module.a.double())
    if module.magnitude is not None:
        merged = module.magnitude.double()[:, None] * merged / merged.square().sum(1, keepdim=True).sqrt()
    return merged


def nf4(weight: torch.Tensor, double_quant: bool = True) -> torch.Tensor:
    """By bitsandbytes alone."""
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant))


@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (65, 64), (200, 96), (1000,), (300, 2, 5), (64, 5000), (0, 7)]
)
def test_pieces_cover_every_row_once(shape):
    pieces = list(chunks(shape))
    rows = [row for start, stop in pieces for row in range(start, stop)]
    assert rows == list(range(shape[0])) and all(start % 64 == 0 for start, _ in pieces)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_equals_the_formula(dora, quantized):
    weight, module = random(200, 128), adapter((200, 128), dora=dora)
    merged = merged_weight(
        weight, module, quantized=quantized, double_quant=True, dtype=torch.float32, out_dtype=torch.float32
    )
    expected = reference(nf4(weight) if quantized else weight, module)
    # fp32 has 24 bits, and a row of 128 values is summed for DoRA's norm.
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_rounded_once(dtype):
    """Where a value is not the nearest one, fp32 had the product not exactly enough to see on which side it is."""
    weight, module = random(200, 128).to(dtype), adapter((200, 128))
    merged = merged_weight(weight, module, quantized=False, double_quant=True, dtype=dtype, out_dtype=dtype)
    expected = reference(weight, module).to(dtype)
    assert (merged == expected).float().mean() > 0.999
    # Rounding the product first is what this must not be.
    twice = weight + (module.scaling * (module.b @ module.a)).to(dtype)
    assert (twice == expected).float().mean() < 0.95


@pytest.mark.parametrize("quantized", [False, True])
def test_the_cast_comes_before_the_quantisation(quantized):
    weight, module = random(128, 64), adapter((128, 64))
    merged = merged_weight(
        weight, module, quantized=quantized, double_quant=False, dtype=torch.bfloat16, out_dtype=torch.float32
    )
    seen = weight.bfloat16()
    expected = reference(nf4(seen, double_quant=False) if quantized else seen, module)
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (200, 128), (130, 320), (1, 192), (200, 96), (64, 33), (70, 100)])
def test_nf4_rows_are_what_bitsandbytes_gives(shape, double_quant, dtype):
    weight = random(*shape).to(dtype)
    rows = Nf4Rows(weight.clone(), double_quant=double_quant)
    ours = torch.cat([rows(start, stop) for start, stop in chunks(shape)])
    assert ours.dtype == dtype and torch.equal(ours, nf4(weight, double_quant))


def test_a_row_of_zeros_stays_zero_in_dora():
    weight, module = random(64, 64), adapter((64, 64), dora=True)
    weight[5], module.b[5] = 0, 0
    merged = merged_weight(
        weight, module, quantized=False, double_quant=True, dtype=torch.float32, out_dtype=torch.float32
    )
    assert merged.isfinite().all() and not merged[5].any() and merged[4].any()


def test_over_the_memory_that_is_read():
    weight, module = random(200, 64), adapter((200, 64), dora=True)
    expected = merged_weight(
        weight, module, quantized=True, double_quant=True, dtype=torch.float32, out_dtype=torch.float32
    )
    rows = rows_of(weight, quantized=True, double_quant=True, dtype=torch.float32)
    merge_into(weight, rows, module, "weight")
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_base_that_is_not_finite_is_named(bad, quantized):
    weight = random(200, 64)
    weight[150, 3] = bad
    with pytest.raises(ModelError, match=r"q_proj of the base model holds values that are not finite in float32"):
        merged_weight(
            weight,
            adapter((200, 64)),
            quantized=quantized,
            double_quant=True,
            dtype=torch.float32,
            out_dtype=torch.float32,
        )


def test_a_result_that_is_too_large_is_named():
    settings = {"quantized": False, "double_quant": True, "dtype": torch.float32}
    weight = random(64, 64) * 1e5
    with pytest.raises(ExportError, match="too large for float16"):
        merged_weight(weight, adapter((64, 64)), out_dtype=torch.float16, **settings)


def test_large_values_whose_sum_overflows_are_no_fault():
    weight = torch.full((64, 64), 3e38)
    settings = {"quantized": False, "double_quant": True, "dtype": torch.float32, "out_dtype": torch.float32}
    assert torch.equal(merged_weight(weight, None, **settings), weight)
