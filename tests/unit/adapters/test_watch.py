"""What is told of adapters in training, against torch's SVD of the float64 product and the gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import randomize_adapters, tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.spectrum import factor, gram, singular_values
from qhybrid.adapters.watch import importance, spectra

BANDS = [
    {"band": "lora", "layers": "0-1", "kind": "lora", "rank": 4},
    {"band": "rslora", "layers": "2", "kind": "rslora", "rank": 6, "alpha": 5},
    {"band": "ada", "layers": "3-4", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 6}},
    {"band": "dora", "layers": "5", "kind": "dora", "rank": 32},
]
LAYOUT = tiny_layout(BANDS)


def random_model(dtype):
    model = attach(tiny_model(), LAYOUT, dtype=dtype)
    randomize_adapters(model, scale=0.1)
    for row, module in adapted_modules(model, LAYOUT):
        if row.kind == "adalora":  # as the allocator leaves it
            module.lora_lambda[ADAPTER].data[1:4] = 0
    return model


def product(row, module):
    """s·B·A, or s·P·Λ·Q, in float64."""
    a, b = (part[ADAPTER].weight.detach().double() for part in (module.lora_A, module.lora_B))
    if row.kind == "adalora":
        b = b @ torch.diag(module.lora_lambda[ADAPTER].detach().double())
    return row.scaling * b @ a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectra_are_those_of_the_product(dtype):
    model = random_model(dtype)
    found = spectra(model, LAYOUT)
    assert list(found) == [row.module for row in LAYOUT]
    for row, module in adapted_modules(model, LAYOUT):
        sigma, dense = found[row.module].sigma, product(row, module)
        expected = torch.linalg.svdvals(dense)[: row.rank]
        assert sigma.shape == (row.rank,) and sigma.dtype == torch.float64
        # Roots of squares in fp64: half the digits. Dropped triplets leave zeros, to that.
        assert (sigma - expected).abs().max() < 1e-7 * expected[0], row.module
        large = expected > 1e-3 * expected[0]
        assert ((sigma - expected).abs()[large] < 1e-9 * expected[large]).all()
        assert found[row.module].norm == pytest.approx(float(dense.norm()), rel=1e-10)


def test_of_a_new_adapter_all_is_zero():
    for spectrum in spectra(attach(tiny_model(), LAYOUT, dtype=torch.float32), LAYOUT).values():
        assert not spectrum.sigma.any()
        assert set(spectrum.figures().values()) == {0}


def test_gram_matrices_and_qr_agree_on_values_far_apart():
    generator = torch.Generator().manual_seed(0)
    falling = torch.logspace(0, -6, 16)
    b, a = torch.randn(200, 16, generator=generator) * falling, torch.randn(16, 300, generator=generator)
    one, other = singular_values(4.0 * gram(b.T), gram(a)), factor(b, a, 2.0).sigma
    assert other[-1] < 1e-5 * other[0]
    assert ((one - other).abs() < 1e-8 * other[0]).all()
    # In batches as one by one, and a product of zeros.
    both = singular_values(torch.stack([gram(b.T), 0 * gram(b.T)]), torch.stack([gram(a), gram(a)]))
    torch.testing.assert_close(2 * both[0], one, rtol=1e-9, atol=1e-8 * float(one[0]))
    assert not both[1].any()


def test_importance_is_the_mean_of_value_times_gradient():
    model = random_model(torch.float32)
    ids = (torch.arange(60) * 7 % 128).view(3, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    found = importance(model, LAYOUT)
    assert list(found) == [row.module for row in LAYOUT]
    for row, module in adapted_modules(model, LAYOUT):
        parts = [part[ADAPTER].weight for part in (module.lora_A, module.lora_B)]
        each = torch.cat([(part.detach().double() * part.grad.double()).abs().flatten() for part in parts])
        assert found[row.module] == pytest.approx(float(each.mean()), rel=1e-5) and found[row.module] > 0
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1024)
    assert importance(model, LAYOUT, gradient_scale=1024) == pytest.approx(found, rel=1e-6)


def test_what_has_no_gradient_has_no_importance():
    model = random_model(torch.float32)
    assert importance(model, LAYOUT) == {}
    frozen = {row.module for row in LAYOUT.of_band("lora")}
    for row, module in adapted_modules(model, LAYOUT):
        module.lora_A[ADAPTER].weight.requires_grad_(row.module not in frozen)
        module.lora_B[ADAPTER].weight.requires_grad_(row.module not in frozen)
    ids = (torch.arange(60) * 7 % 128).view(3, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    assert importance(model, LAYOUT).keys() == {row.module for row in LAYOUT} - frozen
