"""Parameter groups: which parameter is in which, by identity, and at which rate (LoRA+: arXiv 2402.12354)."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.parameter_groups import parameter_groups

BANDS = [
    {"band": "plus", "layers": "0-1", "kind": "lora", "rank": 4, "loraplus_lr_ratio": 4, "lr_ratio": 0.5},
    {"band": "plain", "layers": "2", "kind": "rslora", "rank": 4},
    {"band": "ada", "layers": "3", "kind": "adalora", "rank": 2, "lr_ratio": 3},
    {"band": "dora", "layers": "4-5", "kind": "dora", "rank": 4, "loraplus_lr_ratio": 2, "lr_ratio": 5},
]


def test_every_parameter_has_its_rate_and_decay():
    layout = tiny_layout(BANDS)
    model = attach(tiny_model(), layout, dtype=torch.float32)
    groups = parameter_groups(model, layout, learning_rate=1e-3, weight_decay=0.1)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups)  # none twice
    assert all(group["params"] for group in groups)  # none empty
    seen = 0
    for row, module in adapted_modules(model, layout):
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        assert a.shape == (row.rank, row.in_features) and b.shape == (row.out_features, row.rank)
        of_band, of_b = {"plus": (5e-4, 4), "plain": (1e-3, 1), "ada": (3e-3, 1), "dora": (5e-3, 2)}[row.band]
        assert rate[id(a)] == (pytest.approx(of_band), 0.1)
        assert rate[id(b)] == (pytest.approx(of_b * of_band), 0.1)  # B gets the higher rate, not A
        seen += 2
        if row.kind == "dora":  # peft's own LoRA+ puts magnitudes into B's group
            assert rate[id(module.lora_magnitude_vector[ADAPTER].weight)] == (pytest.approx(of_band), 0.0)
            seen += 1
        if row.kind == "adalora":
            assert rate[id(module.lora_lambda[ADAPTER])] == (pytest.approx(of_band), 0.0)
            seen += 1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert seen == len(rate) == len(trained) and {id(p) for p in trained} == set(rate)
