"""INT8 adapters: the error bound of each row, rows of zeros, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.adapters.int8 import dequantize_rows, int8_tensors, plain_tensors, quantize_rows
from qhybrid.adapters.plain import PlainModule
from qhybrid.errors import AdapterError


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 10), st.integers(0, 2**31))
def test_each_value_is_within_half_a_step_of_its_row(rows, columns, exponent, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q, scale = quantize_rows(matrix)
    assert q.dtype == torch.int8 and int(q.abs().max()) == 127  # the largest value of a row uses the range
    step = matrix.double().abs().amax(1, keepdim=True) / 127
    assert ((dequantize_rows(q, scale).double() - matrix).abs() <= step * 0.5001).all()


def test_rows_of_zeros_and_of_very_small_values_stay_finite():
    matrix = torch.stack([torch.zeros(4), torch.full((4,), 1e-42), torch.ones(4)])
    q, scale = quantize_rows(matrix)
    back = dequantize_rows(q, scale)
    assert torch.isfinite(back).all() and torch.equal(back[0], matrix[0]) and torch.equal(back[2], matrix[2])


def test_magnitudes_are_kept_and_a_value_is_a_byte_beside_a_scale_for_each_row():
    module = PlainModule(
        "model.layers.0.mlp.up_proj", torch.randn(8, 256), torch.randn(512, 8), 1.0, torch.rand(512)
    )
    tensors = int8_tensors([module])
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.lora_magnitude"], module.magnitude)
    scales = (8 + 512) * 4  # fp32, one for each row of A and of B
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored == 8 * 256 + 512 * 8 + scales + 512 * 4  # magnitudes stay fp32


def test_a_matrix_without_its_scales_is_refused():
    tensors = int8_tensors([PlainModule("layers.0.q_proj", torch.ones(2, 3), torch.ones(4, 2), 1.0)])
    for change in ({"layers.0.q_proj.lora_A_scale": None}, {"layers.0.q_proj.lora_A": torch.ones(2, 3)}):
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(AdapterError, match="lora_A is not INT8"):
            plain_tensors(changed, "file")
