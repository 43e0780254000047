"""Combining beside peft's add_weighted_adapter, where both mean the same."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from test_combine import Q, adapter, delta, full, relative

from qhybrid.adapters.plain import PlainModule
from qhybrid.export.derive.combine import (
    combine,
)


def in_peft(parts, method, weights, density=None):
    """peft's add_weighted_adapter on one module of a tiny LLaMA; ΔW of the result at full rank."""
    model = None
    for index, part in enumerate(parts):
        config = LoraConfig(r=part.rank, lora_alpha=part.rank, target_modules=["layers.0.self_attn.q_proj"])
        if model is None:
            model = get_peft_model(tiny_model(num_hidden_layers=1), config, adapter_name="0")
        else:
            model.add_adapter(str(index), config)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        with torch.no_grad():
            layer.lora_A[str(index)].weight.copy_(part.a)
            layer.lora_B[str(index)].weight.copy_(part.b)
        layer.scaling[str(index)] = part.scaling
    names = [str(index) for index in range(len(parts))]
    model.add_weighted_adapter(names, list(weights), "merged", method, svd_rank=64, density=density)
    return layer.get_delta_weight("merged").double().detach().numpy()


@pytest.fixture(scope="module")
def square_parts():
    """Three modules of one rank, as peft needs them, for a 64×64 weight."""
    generator = torch.Generator().manual_seed(9)

    def values(*shape):
        return torch.randn(shape, generator=generator)

    return [PlainModule(Q.format(0), values(4, 64), values(64, 4), scaling) for scaling in (2.0, 0.5, 1.0)]


CASES = [
    ("cat", "cat", None, (0.7, 0.3, -1.5)),
    ("svd", "svd", None, (0.7, 0.3, -1.5)),
    ("linear", "svd", None, (0.7, 0.3, -1.5)),
    ("magnitude_prune", "magnitude_prune_svd", 0.25, (0.7, 0.3, -1.5)),
    ("ties", "ties_svd", 0.25, (1.0, 1.0, 1.0)),
    ("ties", "ties_svd", 0.5, (0.6, 0.6, 0.6)),
    ("ties", "ties_svd", 1.0, (2.0, 2.0, 2.0)),
]


@pytest.mark.parametrize(("method", "theirs", "density", "weights"), CASES)
def test_equal_to_peft_at_full_rank(method, theirs, density, weights, square_parts):
    sources = [
        (adapter(part, name=str(i)), w) for i, (part, w) in enumerate(zip(square_parts, weights, strict=True))
    ]
    found = combine(sources, full(method, density=density))[0].module
    # peft's SVD and products are fp32.
    assert relative(delta(found), in_peft(square_parts, theirs, weights, density)) <= 1e-5


@pytest.mark.parametrize("weights", [(0.7, 0.3, 2.0), (1.0, -0.5, 0.25)])
def test_ties_is_pefts_where_the_weights_are_part_of_the_adapters(weights, square_parts):
    """peft elects signs before it weights; with the weights in the scalings both elect among the same values."""
    sources = [
        (adapter(part, name=str(i)), w) for i, (part, w) in enumerate(zip(square_parts, weights, strict=True))
    ]
    folded = [
        PlainModule(part.module, part.a, part.b, part.scaling * weight)
        for part, weight in zip(square_parts, weights, strict=True)
    ]
    found = delta(combine(sources, full("ties", density=0.5))[0].module)
    assert relative(found, in_peft(folded, "ties_svd", (1.0, 1.0, 1.0), 0.5)) <= 1e-5
    assert relative(found, in_peft(square_parts, "ties_svd", weights, 0.5)) > 0.1


def test_dare_without_dropping_is_pefts(square_parts):
    sources = [(adapter(part, name=str(i)), 0.5) for i, part in enumerate(square_parts)]
    for method in ("dare_linear", "dare_ties"):
        found = combine(sources, full(method, density=1.0))[0].module
        assert relative(delta(found), in_peft(square_parts, f"{method}_svd", (0.5,) * 3, 1.0)) <= 1e-5
