"""DoRA against the paper's formula, written in float64 with explicit weights (arXiv 2402.09353, eq. 5 and 11)."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from helpers import randomize_adapters, tiny_layout, tiny_model
from torch import nn

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.dora import DoraMagnitude, DoraVariant, dequantized_weight, hold_norms, refresh_norms

DORA = [{"layers": "all", "kind": "dora", "rank": 4, "alpha": 12, "target_modules": ["q_proj", "down_proj"]}]


def reference(x, weight, bias, a, b, m, scaling):
    """y = x W'ᵀ + bias with W' = m ⊙ (W + sBA) / ||W + sBA||, the norm a constant; all in float64."""
    x, weight, a, b, m = (t.detach().double() for t in (x, weight, a, b, m))
    for t in (x, a, b, m):
        t.requires_grad_()
    directed = weight + scaling * (b @ a)
    merged = (m / directed.norm(dim=1).detach())[:, None] * directed
    y = x @ merged.T
    if bias is not None:
        y = y + bias.double()
    return y, (x, a, b, m)


def parts(module):
    return (
        module.lora_A[ADAPTER].weight,
        module.lora_B[ADAPTER].weight,
        module.lora_magnitude_vector[ADAPTER].weight,
    )


@pytest.fixture
def dora_model():
    model = attach(tiny_model(attention_bias=True), tiny_layout(DORA, attention_bias=True), dtype=torch.float32)
    randomize_adapters(model)
    return model


def dora_modules(model):
    return [module for _, module in adapted_modules(model, tiny_layout(DORA))]


def test_forward_and_gradients_match_the_paper(dora_model):
    torch.manual_seed(3)
    for module in dora_modules(dora_model)[:4]:
        a, b, m = parts(module)
        base = module.get_base_layer()
        x = torch.randn(5, 7, module.in_features, requires_grad=True)
        y = module(x)
        expected, leaves = reference(x, base.weight, base.bias, a, b, m, module.scaling[ADAPTER])
        assert torch.allclose(y.double(), expected, rtol=0, atol=2e-6)
        upstream = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, a, b, m), upstream)
        wanted = torch.autograd.grad(expected, leaves, upstream.double())
        for one, other in zip(got, wanted, strict=True):
            assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_starts_as_the_base_model():
    """m starts at ||W||, so step 0 is the base model. The seed articles start m at ones, which destroys it."""
    base = tiny_model()
    tokens = torch.arange(20)[None]
    before = base(tokens).logits
    model = attach(base, tiny_layout(DORA), dtype=torch.float32)
    assert torch.allclose(model(tokens).logits, before, atol=1e-6)
    for module in dora_modules(model):
        norms = module.get_base_layer().weight.double().norm(dim=1)
        assert torch.allclose(parts(module)[2].double(), norms, rtol=1e-6)


def test_on_nf4_the_dequantised_weight_is_w():
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.to("cpu")
    weight = dequantized_weight(linear).double()
    assert weight.shape == (96, 128)
    magnitude = DoraMagnitude(linear)
    assert torch.allclose(magnitude.weight.double(), weight.norm(dim=1), rtol=1e-6)
    a, b = torch.randn(8, 128), torch.randn(96, 8) * 0.1
    expected = (weight + 1.5 * b.double() @ a.double()).norm(dim=1)
    assert torch.allclose(magnitude.norm(linear, a, b, 1.5).double(), expected, rtol=2e-6)


def test_a_row_of_zeros_stays_zero_and_finite(dora_model):
    module = dora_modules(dora_model)[0]
    base = module.get_base_layer()
    with torch.no_grad():
        base.weight[3] = 0
        module.lora_B[ADAPTER].weight[3] = 0
    module.lora_magnitude_vector[ADAPTER] = DoraMagnitude(base)
    x = torch.randn(2, module.in_features, requires_grad=True)
    y = module(x) - base.bias
    assert torch.all(y[:, 3] == 0)
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in parts(module))


def test_merge_is_the_forward_pass_and_unmerge_takes_it_back(dora_model):
    module = dora_modules(dora_model)[0]
    base = module.get_base_layer()
    original = base.weight.detach().clone()
    x = torch.randn(4, module.in_features)
    expected = module(x)
    merged = DoraVariant.merge_safe(module, ADAPTER, original)
    assert torch.allclose(nn.functional.linear(x, merged, base.bias), expected, atol=1e-5)
    assert torch.allclose(DoraVariant.unmerge(module, ADAPTER, merged), original, atol=1e-6)


def test_held_norms_are_computed_once_and_refreshed(dora_model, monkeypatch):
    module = dora_modules(dora_model)[0]
    magnitude = module.lora_magnitude_vector[ADAPTER]
    x = torch.randn(2, module.in_features)
    with hold_norms(dora_model):
        before = module(x)
        with torch.no_grad():
            module.lora_B[ADAPTER].weight.mul_(2)
        stale = magnitude.norm(module.get_base_layer(), *parts(module)[:2], module.scaling[ADAPTER])
        refresh_norms(dora_model)
        fresh = magnitude.norm(module.get_base_layer(), *parts(module)[:2], module.scaling[ADAPTER])
        assert not torch.allclose(stale, fresh)
    assert not torch.allclose(module(x), before)
    assert magnitude._held is None
