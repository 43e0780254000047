"""Liger's layer kernels: the closed form against the simulation, and what the stand-ins keep and overwrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_recipe
from torch import Tensor

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.planner.memory import predict
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.simulation.liger import GatedUnit, RMSNorm, Rotation
from qhybrid.simulation.step import simulate

# Wide layers, so that a layer and not the loss makes the peak.
WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 3000,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def recipe_for(length: int, *, attention: str = "sdpa", **training: Any) -> Recipe:
    return resolve(
        make_recipe(
            model={"path": "x", "dtype": "bfloat16", "attn_implementation": attention},
            adapters=[{"rank": 16}],
            training={
                "per_device_train_batch_size": 1,
                "max_length": length,
                "gradient_checkpointing": False,
                "use_liger_kernel": True,
                **training,
            },
        )
    )


CASES = {
    "llama": ("llama", recipe_for(3000)),
    "qwen3, checkpointed": ("qwen3", recipe_for(3000, gradient_checkpointing=True)),
    "gemma2 eager, checkpointed": ("gemma2", recipe_for(1000, attention="eager", gradient_checkpointing=True)),
}


@pytest.mark.parametrize(("model_type", "recipe"), CASES.values(), ids=CASES)
def test_the_closed_form_agrees_with_the_simulation(model_type: str, recipe: Recipe) -> None:
    config = {**WIDE, "model_type": model_type}
    spec = spec_from_config(config)
    simulated = simulate(recipe, config)
    ratio = predict(recipe, spec, build_layout(recipe, spec)).peak / simulated.peak_bytes
    assert 0.99 <= ratio <= 1.01
    without = recipe.training.model_copy(update={"use_liger_kernel": False})
    plain = simulate(recipe.model_copy(update={"training": without}), config)
    assert simulated.peak_bytes < 0.97 * plain.peak_bytes, "the kernels save memory"
    assert simulated.reserved_bytes >= simulated.peak_bytes


def test_no_kernel_is_assumed_on_a_cpu_or_where_all_are_switched_off() -> None:
    config = {**WIDE, "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    recipe, plain = recipe_for(64), recipe_for(64, use_liger_kernel=False)
    off = recipe_for(64, liger_kernel_config={"rope": False, "rms_norm": False, "swiglu": False})
    assert simulate(recipe, config, device="cpu").peak_bytes == simulate(plain, config, device="cpu").peak_bytes
    assert simulate(off, config).peak_bytes == simulate(plain, config).peak_bytes


@pytest.mark.parametrize("in_place", [True, False])
def test_a_norm_keeps_its_input_and_one_value_for_each_token(in_place: bool) -> None:
    """Its gradient takes the place of the incoming one, but not where the residual stream still needs that."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, weight = torch.ones(2, 3, 8, requires_grad=True), torch.ones(8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = RMSNorm.apply(x, weight, in_place)
    assert [(tensor.numel(), tensor.dtype) for tensor in saved] == [
        (48, torch.float32),
        (8, torch.float32),
        (6, torch.float32),
    ]
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].data_ptr() == weight.data_ptr()
    incoming = torch.ones(2, 3, 8)
    (gradient,) = torch.autograd.grad(out, x, incoming)
    assert out.shape == gradient.shape == x.shape
    assert (gradient.data_ptr() == incoming.data_ptr()) is in_place


def test_a_gated_unit_overwrites_its_inputs_with_their_gradients() -> None:
    gate, up = (torch.ones(2, 3, 8, requires_grad=True) for _ in range(2))
    out = GatedUnit.apply(gate, up)
    of_gate, of_up = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    assert out.data_ptr() not in (gate.data_ptr(), up.data_ptr())
    assert (of_gate.data_ptr(), of_up.data_ptr()) == (gate.data_ptr(), up.data_ptr())


def test_a_rotation_copies_only_what_does_not_lie_in_the_order_of_tokens() -> None:
    in_order = torch.ones(2, 5, 4, 8, requires_grad=True).transpose(1, 2)
    by_head = torch.ones(2, 4, 5, 8, requires_grad=True)
    q, k = Rotation.apply(in_order, by_head, torch.ones(1, 5, 8), torch.ones(1, 5, 8))
    assert q.shape == k.shape == (2, 4, 5, 8)
    assert q.data_ptr() == in_order.data_ptr()
    assert k.data_ptr() != by_head.data_ptr()
