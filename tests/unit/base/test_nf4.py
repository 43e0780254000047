"""NF4 on the CPU equals bitsandbytes bit for bit, whatever the weight looks like."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.base import nf4

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_same_bits(ours, theirs):
    """Equal as bytes, so that -0.0 is not 0.0; any NaN is like another."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    ours, theirs = ours.contiguous(), theirs.contiguous()
    if ours.is_floating_point():
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = (tensor[~tensor.isnan()].contiguous() for tensor in (ours, theirs))
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def assert_equals_bitsandbytes(weight, double_quant, quant_storage=torch.uint8):
    packed, state = nf4.quantize_nf4(weight, double_quant=double_quant, quant_storage=quant_storage)
    expected, reference = quantize_4bit(
        weight,
        blocksize=64,
        compress_statistics=double_quant,
        quant_type="nf4",
        quant_storage=quant_storage,
    )
    assert_same_bits(packed, expected)
    assert_same_bits(state.absmax, reference.absmax)
    assert_same_bits(state.code, reference.code)
    for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
        assert getattr(state, name) == getattr(reference, name), name
    if double_quant:
        assert_same_bits(state.offset.reshape(1), reference.offset.reshape(1))
        assert_same_bits(state.state2.absmax, reference.state2.absmax)
        assert_same_bits(state.state2.code, reference.state2.code)
        for name in ("blocksize", "dtype", "shape", "quant_type"):
            assert getattr(state.state2, name) == getattr(reference.state2, name), name
    else:
        assert state.offset is None and state.state2 is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1,), (63,), (65,), (7, 13), (96, 64), (3, 5, 7), (33, 4096)])
def test_equals_bitsandbytes_for_every_dtype_and_shape(shape, double_quant, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_equals_bitsandbytes(weight, double_quant)


@pytest.mark.parametrize("num_weights", [127, 128, 129, 191, 192, 321, 64 * 5 + 1, 64 * 6])
def test_chunk_boundaries_leave_no_trace(monkeypatch, num_weights):
    monkeypatch.setattr(nf4, "CHUNK_SIZE", 128)
    assert_equals_bitsandbytes(torch.randn(num_weights), True)


def test_a_weight_of_more_than_one_chunk():
    assert_equals_bitsandbytes(torch.randn(nf4.CHUNK_SIZE * 2 + 64 * 3 + 5).bfloat16(), True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_weights", [128, 130])
@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1e-45, 1e-39, 6e-8, 3e38, -6.5e4, 1.0, float("inf"), float("-inf"), float("nan")],
)
def test_extreme_values(value, num_weights, dtype):
    constant = torch.full((num_weights,), value).to(dtype)
    assert_equals_bitsandbytes(constant, False)
    mixed = torch.linspace(-1, 1, num_weights).to(dtype)
    mixed[[3, 70, -1]] = constant[0]
    assert_equals_bitsandbytes(mixed, False)


def test_values_on_the_midpoints_between_levels():
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    midpoints = (code[:-1] + code[1:]) / 2
    around = [midpoints, *(torch.nextafter(midpoints, torch.full_like(midpoints, end)) for end in (-1, 1))]
    weight = torch.cat([*around, code, torch.tensor([1.0, -1.0, 0.5])])
    assert weight.numel() == 64 and weight.abs().max() == 1
    assert_equals_bitsandbytes(weight, False)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
)
def test_equals_bitsandbytes_for_arbitrary_values(values, dtype, double_quant):
    weight = torch.tensor(values, dtype=torch.float32).to(dtype)
    # Scales at the edge of fp32 overflow their own mean, and NaN has no one bit pattern.
    assert_equals_bitsandbytes(weight, double_quant and bool((weight.float().abs() < 1e30).all()))


def test_a_transposed_weight_is_read_in_its_own_order():
    assert_equals_bitsandbytes(torch.randn(64, 32).t(), True)


@pytest.mark.parametrize("quant_storage", [torch.bfloat16, torch.float32, torch.int8])
def test_other_storage_dtypes(quant_storage):
    assert_equals_bitsandbytes(torch.randn(32, 64), True, quant_storage)


def test_the_weight_itself_is_not_changed():
    weight = torch.randn(256)
    before = weight.clone()
    nf4.quantize_nf4(weight, double_quant=True)
    assert torch.equal(weight, before)


def test_a_filled_layer_is_the_layer_that_bitsandbytes_makes():
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    kwargs = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(64, 48, **kwargs)
    nf4.fill_linear4bit(layer, weight)
    reference = bnb.nn.Linear4bit(64, 48, **kwargs)
    reference.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=reference)
    reference.to("cpu")

    assert layer.weight.bnb_quantized and layer.quant_state is layer.weight.quant_state
    assert layer.weight.module is layer and not layer.weight.requires_grad
    theirs = reference.state_dict()
    assert layer.state_dict().keys() == theirs.keys()
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, theirs[name])
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, dequantize_4bit(layer.weight, layer.quant_state)))
