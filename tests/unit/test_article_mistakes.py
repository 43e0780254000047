"""Mistakes that circulate in articles about these methods: the harm each does, and that it is not made here.

Others have their tests beside what they are about: `tfinal` as an end step (adapters/test_allocator_reference.py),
three wrappers on one base (integration/test_share.py), alpha kept on expansion (adapters/test_expand.py), PiSSA
the wrong way round (adapters/test_pissa.py), a projection from both sides (adapters/test_preconditioner.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import make_recipe, tiny_layout, tiny_model

from qhybrid.adapters.adalora import lora_factors
from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.int8 import dequantize_rows, quantize_rows
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config

IDS = torch.tensor([[5, 17, 99, 3, 42, 7]])


def test_dora_magnitudes_of_one_destroy_the_model_at_step_0():
    """m starts at the row norms of W, so that the function is the base's; with m = 1 it is another model."""
    layout = tiny_layout([{"kind": "dora", "rank": 4}])
    with torch.no_grad():
        expected = tiny_model()(IDS).logits
        model = attach(tiny_model(), layout, dtype=torch.float32)
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
        for _, module in adapted_modules(model, layout):
            module.lora_magnitude_vector[ADAPTER].weight.fill_(1.0)
        wrong = model(input_ids=IDS).logits
    assert float((wrong - expected).norm() / expected.norm()) > 0.5


def test_loraplus_gives_b_the_higher_rate_and_not_a():
    layout = tiny_layout([{"kind": "lora+", "rank": 4}])
    model = attach(tiny_model(), layout, dtype=torch.float32)
    groups = parameter_groups(model, layout, learning_rate=1e-3, weight_decay=0.0)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for _, module in adapted_modules(model, layout):
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        assert rate[id(b)] == pytest.approx(4 * rate[id(a)]) and rate[id(a)] == pytest.approx(1e-3)


def test_a_rank_that_grows_with_the_depth_without_a_budget_saturates():
    """min(64, 4 + 4·depth) is 64 from layer 15 on: of 32 layers the upper half would be uniform."""
    assert [min(64, 4 + 4 * depth) for depth in range(32)][15:] == [64] * 17
    spec = spec_from_config(
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000,
        }
    )  # fmt: skip
    layout = build_layout(make_recipe(adapters={"schedule": "increasing", "rank": 32}), spec)
    ranks = [row.rank for row in layout if row.target == "q_proj"]
    assert all(low < high for low, high in itertools.pairwise(ranks))


def test_int8_with_a_scale_of_one_rounds_everything_away():
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    assert int(matrix.round().count_nonzero()) == 0
    assert float((dequantize_rows(*quantize_rows(matrix)) - matrix).norm() / matrix.norm()) < 0.01


def test_pruning_small_values_depends_on_how_b_times_a_is_written():
    """A→cA, B→B/c is the same adapter; |w| < 1e-3 removes other values of it. A term's ‖a‖·‖b‖ stays."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=generator) * 2e-3 for shape in ((4, 32), (16, 4)))

    def pruned(matrix):
        return matrix.where(matrix.abs() >= 1e-3, 0)

    as_written, rescaled = (pruned(b / c) @ pruned(a * c) for c in (1.0, 30.0))
    assert float(as_written.norm()) > 0 and float(rescaled.norm()) == 0  # all of B/30 is below 1e-3
    one, other = (a.norm(dim=1) * b.norm(dim=0), (30 * a).norm(dim=1) * (b / 30).norm(dim=0))
    assert torch.allclose(one, other, rtol=1e-5)


def test_a_live_triplet_is_not_one_of_the_initial_rank():
    """peft's `ranknum` stays at the initial rank; what lives is what has a λ other than 0."""
    q, p = torch.eye(6), torch.eye(6)
    a, b = lora_factors(q, p, torch.tensor([0.5, 0.0, -0.1, 0.0, 0.0, 0.3]), 1.0)
    assert a.shape[0] == b.shape[1] == 3
