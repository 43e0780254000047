"""LoRA+ groups: which parameter is in which group, by identity, and at which rate (arXiv 2402.12354)."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.parameter_groups import parameter_groups

BANDS = [
    {"band": "plus", "layers": "0-1", "kind": "lora", "rank": 4, "loraplus_lr_ratio": 4},
    {"band": "plain", "layers": "2", "kind": "rslora", "rank": 4},
    {"band": "ada", "layers": "3", "kind": "adalora", "rank": 2},
    {"band": "dora", "layers": "4-5", "kind": "dora", "rank": 4, "loraplus_lr_ratio": 2},
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
        ratio = {"plus": 4, "plain": 1, "ada": 1, "dora": 2}[row.band]
        assert rate[id(a)] == (1e-3, 0.1)
        assert rate[id(b)] == (pytest.approx(ratio * 1e-3), 0.1)  # B gets the higher rate, not A
        seen += 2
        if row.kind == "dora":  # peft's own LoRA+ puts magnitudes into B's group
            assert rate[id(module.lora_magnitude_vector[ADAPTER].weight)] == (1e-3, 0.0)
            seen += 1
        if row.kind == "adalora":
            assert rate[id(module.lora_lambda[ADAPTER])] == (1e-3, 0.0)
            seen += 1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert seen == len(rate) == len(trained) and {id(p) for p in trained} == set(rate)
