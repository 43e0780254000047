"""GoRA against a float64 reference written from arXiv 2502.12171, on plain and on NF4 weights."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import TINY, make_recipe, nf4_config, tiny_model
from torch import nn

from qhybrid.adapters.dora import dequantized_weight
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.base.load import keep_exact_on_cpu
from qhybrid.data.tokenize import EncodedRow
from qhybrid.errors import NonFiniteError
from qhybrid.ranks import gora
from qhybrid.ranks.groups import in_groups

SPEC = spec_from_config(TINY)


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(3)
    found = []
    for length in (9, 17, 12, 5):
        ids = generator.integers(3, 128, length)
        labels = ids.copy()
        labels[: length // 3] = -100
        found.append(EncodedRow(ids, labels))
    return found


def layout_of(**adapters):
    return build_layout(make_recipe(adapters={"ranks": "gora", **adapters}), SPEC)


def reference_gradients(model, rows):
    """dL/dW in float64 by autograd with trainable weights, L the mean loss of all scored tokens."""
    wide = copy.deepcopy(model).double().requires_grad_(True)
    total = sum(int((row.labels[1:] != -100).sum()) for row in rows)
    for row in rows:
        ids, labels = torch.tensor(row.input_ids)[None], torch.tensor(row.labels)[None]
        logits = wide(input_ids=ids).logits[0, :-1]
        (nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum") / total).backward()
    return {name: (module.weight.detach(), module.weight.grad) for name, module in wide.named_modules()
            if isinstance(module, nn.Linear)}  # fmt: skip


@pytest.mark.parametrize("memory", [1, 60_000, 2**30])
def test_importance_and_initial_values(rows, memory):
    model = tiny_model().requires_grad_(False)
    layout = layout_of(kind="rslora", rank=5, alpha=7)
    largest = {row.module: 9 for row in layout}
    passes = []
    probes = gora.probe_gradients(
        model, lambda: gora.token_losses(model, rows, 2), layout.rows, largest, memory=memory, seed=1,
        progress=lambda done, total: passes.append((done, total)),
    )  # fmt: skip
    assert passes[-1] == {1: (42, 42), 2**30: (1, 1)}.get(memory, passes[-1])
    assert not model.training and not model.is_gradient_checkpointing
    reference = reference_gradients(model, rows)
    for row in layout:
        weight, gradient = reference[row.module]
        probe = probes[row.module]
        assert probe.importance == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-4)
        a, b = gora.initial_values(probe, row, gamma=0.05)
        assert a.shape == (5, row.in_features) and torch.equal(a, probe.a[:5])
        # eq. 10 to 13: B = −ξ·G·A⁺, so that s·B·A is −ξ·s times the projection of G onto A's rows
        s, xi = 7 / math.sqrt(5), 0.05 * math.sqrt(row.in_features) / 7
        assert row.scaling == pytest.approx(s)
        projected = gradient @ torch.linalg.pinv(a.double()) @ a.double()
        assert torch.allclose(s * b.double() @ a.double(), -xi * s * projected, rtol=1e-3, atol=1e-9)
        assert float(s * (b @ a).norm()) == pytest.approx(0.05 * float(gradient.norm()), rel=0.5)


def test_the_first_step_goes_downhill(rows):
    """The repository of the paper has lost the minus sign of B; with plus the loss rises."""
    model = tiny_model().requires_grad_(False)
    layout = layout_of(rank=8)
    probes = gora.probe_gradients(
        model, lambda: gora.token_losses(model, rows, 4), layout.rows,
        dict.fromkeys((row.module for row in layout), 8), memory=2**30, seed=0,
    )  # fmt: skip

    def loss(sign):
        moved = copy.deepcopy(model)
        for row in layout:
            a, b = gora.initial_values(probes[row.module], row, gamma=0.05)
            moved.get_submodule(row.module).weight.add_(sign * row.scaling * b @ a)
        with torch.no_grad():
            return float(sum(gora.token_losses(moved, rows, 4)))

    assert loss(1) < loss(0) < loss(-1)


def test_on_nf4_the_dequantised_weight_counts(rows, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=nf4_config(torch.float32), dtype=torch.float32
    )
    keep_exact_on_cpu(model)
    plain = tiny_model()
    layout = layout_of(rank=4)
    with torch.no_grad():
        for row in layout:
            plain.get_submodule(row.module).weight.copy_(dequantized_weight(model.get_submodule(row.module)))
    largest = dict.fromkeys((row.module for row in layout), 4)
    probes = gora.probe_gradients(
        model, lambda: gora.token_losses(model, rows, 4), layout.rows, largest, memory=2**30, seed=0
    )
    for module, (weight, gradient) in reference_gradients(plain, rows).items():
        if module in probes:
            assert probes[module].importance == pytest.approx(float((weight * gradient).abs().mean()), rel=1e-3)


def test_wishes_are_importance_over_the_root_of_the_size():
    layout = layout_of(rank=4)
    one = torch.ones(1, 1)
    probes = {row.module: gora.Probe(float(row.layer + 1), 1.0, one, one) for row in layout}
    found = gora.wishes(probes, layout.rows)
    assert found == [(row.layer + 1) / math.sqrt(row.in_features + row.out_features) for row in layout]


def test_gradients_that_are_not_finite_are_refused(rows):
    model, layout = tiny_model().requires_grad_(False), layout_of()
    largest = {row.module: 4 for row in layout}
    with pytest.raises(NonFiniteError, match=r"gradient of model\.layers\.0\..* is not finite"):
        gora.probe_gradients(
            model,
            lambda: (loss * math.nan for loss in gora.token_losses(model, rows, 2)),
            layout.rows, largest, memory=2**30, seed=0,
        )  # fmt: skip


def test_groups():
    assert list(in_groups({"a": 3, "b": 3, "c": 9, "d": 1}, 6)) == [["a", "b"], ["c"], ["d"]]
