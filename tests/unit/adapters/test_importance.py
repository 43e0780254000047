"""Module importance against a float64 reference: the mean of AdaLoRA's sensitivity (arXiv 2303.10512, eq. 8)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qhybrid.adapters.importance import ModuleImportance


def modules(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (3, 50, 20), "small": (3, 8, 8), "still": (2, 8, 8)}
    return {
        name: (
            nn.Parameter(torch.randn(r, i, generator=generator).to(dtype)),
            nn.Parameter(torch.randn(o, r, generator=generator).to(dtype)),
        )
        for name, (r, i, o) in shapes.items()
    }


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 1024.0)]
)
def test_it_is_the_running_mean_of_the_sensitivity(dtype, scale):
    pairs = modules(dtype)
    importance = ModuleImportance(pairs)
    expected = dict.fromkeys(pairs, 0.0)
    generator = torch.Generator().manual_seed(1)
    for count in range(12):
        for name, pair in pairs.items():
            values = []
            for w in pair:
                w.grad = (scale * torch.randn(w.shape, generator=generator)).to(dtype)
                pairs_of = zip(w.double().flatten().tolist(), w.grad.double().flatten().tolist(), strict=True)
                values += [abs(value * gradient / scale) for value, gradient in pairs_of]
            if name == "still" and count >= 4:  # frozen: it keeps what it had
                pair[0].grad = pair[1].grad = None
            else:
                expected[name] = 0.85 * expected[name] + 0.15 * sum(values) / len(values)
        importance.observe(scale)
    assert importance.averages() == pytest.approx(expected, rel=1e-6)


def test_a_step_that_the_loss_scaler_skips_is_left_out():
    pairs = modules()
    importance = ModuleImportance(pairs)
    for w in (w for pair in pairs.values() for w in pair):
        w.grad = torch.ones_like(w)
    importance.observe(2.0)
    before = importance.averages()
    pairs["wide"][0].grad[0, 0] = float("inf")
    importance.observe(2.0)
    assert importance.averages() == before and all(value > 0 for value in before.values())


def test_it_is_restored_to_the_bit():
    pairs = modules()
    one, other = ModuleImportance(pairs), ModuleImportance(pairs)
    for w in (w for pair in pairs.values() for w in pair):
        w.grad = torch.randn_like(w)
    one.observe()
    other.load(one.averages())
    one.observe(), other.observe()
    assert one.averages() == other.averages()


def test_no_modules_and_no_gradients():
    ModuleImportance({}).observe()
    importance = ModuleImportance(modules())
    importance.observe()
    assert importance.averages() == {"wide": 0, "small": 0, "still": 0}
