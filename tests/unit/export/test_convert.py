"""PiSSA and DoRA made into LoRA, against float64 references from the papers and against peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError
from qhybrid.export.convert import dora_to_lora, pissa_to_lora

TOKENS = torch.arange(4, 36)[None]
INFO = AdapterInfo("base", None, "none", True, "float32", "float32", "sdpa")


def weights(model):
    return lambda module: model.get_submodule(module).weight.detach()


@pytest.fixture(params=["lora", "rslora", "dora"])
def pissa(request, tmp_path):
    """A PiSSA folder as peft saves it after some training, and the logits of the model that peft trained."""
    kind = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(request.param, {})
    model = get_peft_model(
        tiny_model(),
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", **kind),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        logits = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path / "pissa")
    return tmp_path / "pissa", logits


def test_pissa_becomes_lora_on_the_untouched_base(pissa):
    folder, logits = pissa
    adapter = read_plain(folder)
    assert adapter.base_minus == "pissa"
    converted = pissa_to_lora(adapter, weights(tiny_model()))
    assert converted.base_minus is None and {module.rank for module in converted} == {8}
    with torch.no_grad():
        plain = tiny_model()(TOKENS).logits
        ours = attach_plain(tiny_model(), converted.modules, dtype=torch.float32)(TOKENS).logits
    assert (ours - logits).abs().max() <= 1e-5
    assert (plain - logits).abs().max() > 0.01  # a thousand times the mark


def test_reading_pissa_as_lora_would_be_another_model(pissa):
    """What the conversion is for: A and B alone, on the untouched base, hold the principal part twice."""
    folder, logits = pissa
    with torch.no_grad():
        wrong = attach_plain(tiny_model(), read_plain(folder).modules, dtype=torch.float32)(TOKENS).logits
    assert (wrong - logits).abs().max() > 0.01


def test_a_random_principal_part_is_refused(pissa):
    import dataclasses

    adapter = dataclasses.replace(read_plain(pissa[0]), base_minus="pissa_niter_4")
    with pytest.raises(AdapterError, match="pissa_niter_4, a random method") as caught:
        pissa_to_lora(adapter, weights(tiny_model()))
    assert "path_initial_model_for_weight_conversion" in caught.value.hint


def dora_module(out=24, inner=20, rank=3, seed=0) -> tuple[PlainModule, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight = normal(out, inner)
    magnitude = weight.norm(dim=1) * (1 + 0.2 * normal(out))
    module = PlainModule(
        "model.layers.0.mlp.up_proj", 0.3 * normal(rank, inner), 0.3 * normal(out, rank), 2.0, magnitude
    )
    return module, weight


@pytest.mark.parametrize("rank", [1, 5, 20, 100])
def test_dora_is_approximated_as_well_as_any_matrix_of_that_rank_can(rank):
    module, weight = dora_module()
    adapter, (told,) = dora_to_lora(PlainAdapter((module,), INFO, Path()), lambda name: weight, rank)
    # arXiv 2402.09353, eq. 5, in float64
    inner = weight.double() + 2.0 * module.b.double() @ module.a.double()
    delta = module.magnitude.double()[:, None] * inner / inner.norm(dim=1, keepdim=True) - weight.double()
    sigma = torch.linalg.svdvals(delta)
    best = float(sigma[rank:].norm() / sigma.norm())  # Eckart and Young
    (made,) = adapter.modules
    assert made.magnitude is None and made.rank == min(rank, 20)
    error = float((made.delta().double() - delta).norm() / delta.norm())
    assert abs(error - best) <= 1e-6 and abs(told.error - best) <= 1e-6


def test_dropping_the_magnitudes_would_be_far_worse():
    """What peft's convert_to_lora does in silence."""
    module, weight = dora_module()
    _, (told,) = dora_to_lora(PlainAdapter((module,), INFO, Path()), lambda name: weight, 8)
    inner = weight + module.delta()
    delta = module.magnitude[:, None] * inner / inner.norm(dim=1, keepdim=True) - weight
    dropped = float((module.delta() - delta).norm() / delta.norm())
    assert told.error < dropped / 2


def test_rows_of_zeros_stay_zero():
    module, weight = dora_module()
    weight[3] = 0
    module.b[3] = 0
    adapter, (told,) = dora_to_lora(PlainAdapter((module,), INFO, Path()), lambda name: weight, 20)
    assert torch.isfinite(adapter.modules[0].b).all()
    assert adapter.modules[0].delta()[3].abs().max() < 1e-5 and told.error < 1e-5
