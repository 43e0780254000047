"""Expansion keeps the function, carries the optimizer, and gives new ranks that can learn."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import torch
from helpers import randomize_adapters, tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.expand import expand, freeze, take_ranks
from qhybrid.adapters.folder import load_weights, save_weights, trained_tensors
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.architecture.growth import grown

KINDS = ("lora", "rslora", "dora")
SGD = torch.optim.SGD


def banded(kind: str, dtype=torch.float64, **band):
    layout = tiny_layout([{"band": "all", "kind": kind, "rank": 4, "alpha": 6, **band}])
    model = attach(tiny_model(dtype=dtype), layout, dtype=dtype)
    randomize_adapters(model)
    return model, layout


def all_to(layout, rank: int) -> dict[str, int]:
    return {row.module: rank for row in layout}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13)[None]).logits.double()


def reference(kind: str, w, a, b, alpha: float, magnitude=None) -> torch.Tensor:
    """The module's weight from the papers: LoRA 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353; in float64."""
    rank = a.shape[0]
    s = alpha / rank**0.5 if kind == "rslora" else alpha / rank
    changed = w.double() + s * b.double() @ a.double()
    if kind != "dora":
        return changed
    return magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)


def weights_of(model, layout, alphas: dict[str, float]) -> list[torch.Tensor]:
    found = []
    for row, module in adapted_modules(model, layout):
        magnitude = module.lora_magnitude_vector[ADAPTER].weight.detach() if row.kind == "dora" else None
        a, b = (part[ADAPTER].weight.detach() for part in (module.lora_A, module.lora_B))
        found.append(reference(row.kind, module.get_base_layer().weight, a, b, alphas[row.module], magnitude))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_expansion_keeps_the_function(kind):
    """Held against the papers' formulas with the layout's alpha, and against the model's own output."""
    model, layout = banded(kind)
    before, output = weights_of(model, layout, {row.module: row.alpha for row in layout}), logits(model)
    after_layout = expand(model, layout, all_to(layout, 7), SGD(model.parameters(), 0.1), seed=0)
    after = weights_of(model, after_layout, {row.module: row.alpha for row in after_layout})
    assert all(
        torch.allclose(one, other, rtol=1e-12, atol=1e-14) for one, other in zip(before, after, strict=True)
    )
    assert all(row.rank == 7 for row in after_layout) and after_layout == grown(layout, all_to(layout, 7))
    exact = 1e-12 if kind != "dora" else 1e-5  # DoRA's norms are computed in fp32
    assert (logits(model) - output).abs().max() < exact * output.abs().max()


def test_alpha_kept_on_expansion_changes_the_function():
    """The seed article's mistake: with alpha kept, s = alpha/r falls, and with it what the module has learnt."""
    model, layout = banded("lora")
    before, output = weights_of(model, layout, {row.module: row.alpha for row in layout}), logits(model)
    after_layout = expand(model, layout, all_to(layout, 8), SGD(model.parameters(), 0.1), seed=0)
    wrong = weights_of(model, after_layout, {row.module: row.alpha for row in layout})
    right = weights_of(model, after_layout, {row.module: row.alpha for row in after_layout})
    for row, w, kept, grew in zip(layout, before, wrong, right, strict=True):
        base = model.get_base_model().get_submodule(row.module).get_base_layer().weight.double()
        assert torch.allclose(grew, w, rtol=1e-12)
        assert torch.allclose(kept - base, (w - base) / 2, rtol=1e-9)  # half of the change is gone
    for row, module in adapted_modules(model, after_layout):
        module.scaling[ADAPTER] = 6 / row.rank
    assert (logits(model) - output).abs().max() > 0.01 * output.abs().max()


def test_the_new_halves_are_not_both_zero():
    """New columns of B are zero, new rows of A are kaiming's as at the start: so B learns at once, and then A."""
    model, layout = banded("lora", torch.float32)
    layout = expand(model, layout, all_to(layout, 10), SGD(model.parameters(), 0.1), seed=0)
    model(input_ids=torch.arange(1, 13)[None], labels=torch.arange(1, 13)[None]).loss.backward()
    for row, module in adapted_modules(model, layout):
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        new = a[4:].detach()
        bound = row.in_features**-0.5  # kaiming_uniform with a = sqrt 5
        assert 0.9 * bound < new.abs().max() <= bound and float(new.std()) == pytest.approx(
            bound / 3**0.5, rel=0.1
        )
        assert not b[:, 4:].any() and bool(b.grad[:, 4:].any()) and not a.grad[4:].any()


def test_new_rows_are_drawn_by_seed_and_module_alone():
    def rows_with(seed: int, noise: int):
        model, layout = banded("lora", torch.float32)
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        expand(model, layout, all_to(layout, 6), SGD(model.parameters(), 0.1), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)  # dropout goes on as without a stage
        return [module.lora_A[ADAPTER].weight[4:].detach() for _, module in adapted_modules(model, layout)]

    one, again, other = rows_with(0, 1), rows_with(0, 2), rows_with(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    same_shape = [rows for rows in one if rows.shape == one[0].shape]
    assert len(same_shape) > 5 and not any(torch.equal(same_shape[0], rows) for rows in same_shape[1:])


def test_gaussian_bands_stay_gaussian():
    model, layout = banded("lora", torch.float32, init="gaussian")
    expand(model, layout, all_to(layout, 32), SGD(model.parameters(), 0.1), seed=0)
    rows = torch.cat([module.lora_A[ADAPTER].weight[4:].flatten() for _, module in adapted_modules(model, layout)])
    assert float(rows.detach().std()) == pytest.approx(1 / 32, rel=0.05)


OPTIMIZERS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, momentum=0.5),
    "lion_32bit": lambda groups: bnb.optim.Lion(groups, lr=1e-3, optim_bits=32),
    "rmsprop_bnb_32bit": lambda groups: bnb.optim.RMSprop(groups, lr=1e-3, optim_bits=32),
}


def step(model, optimizer, rows: int) -> float:
    ids = torch.arange(1, 13)[None] + torch.arange(rows)[:, None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_padded_with_zeros(name):
    """The values that were there keep their past, and go on as if nothing had happened."""
    model, layout = banded("dora", torch.float32, loraplus_lr_ratio=4)
    groups = parameter_groups(model, layout, learning_rate=1e-2, weight_decay=0.01)
    optimizer = OPTIMIZERS[name](groups)
    for rows in (1, 2, 3):
        step(model, optimizer, rows)
    members = [list(group["params"]) for group in optimizer.param_groups]
    before = {
        p: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for g in members for p in g
    }
    grows = {row.module: 6 for row in layout if row.target in ("q_proj", "down_proj")}
    after = expand(model, layout, grows, optimizer, seed=0)
    assert [list(group["params"]) for group in optimizer.param_groups] == members  # and with them LoRA+'s rates
    for parameter, states in before.items():
        for key, value in states.items():
            now = optimizer.state[parameter][key]
            if value.dim() == 0 or value.shape == now.shape:
                assert torch.equal(now, value)
                continue
            assert now.shape == parameter.shape != value.shape and now.dtype == value.dtype
            kept = now[: value.shape[0], : value.shape[1]]
            assert torch.equal(kept, value)
            assert int(now.count_nonzero()) == int(kept.count_nonzero())
    assert all(math.isfinite(step(model, optimizer, 3)) for _ in range(2))
    for row, module in adapted_modules(model, after):
        if row.module in grows:
            assert bool(module.lora_B[ADAPTER].weight[:, 4:].any())


def test_adam_moves_the_old_values_as_if_nothing_had_grown():
    """Against AdamW's formula (Loshchilov and Hutter, 1711.05101) in float64, for old and new values alike."""
    model, layout = banded("lora")
    name = layout.rows[0].module
    b = model.get_base_model().get_submodule(name).lora_B[ADAPTER].weight
    optimizer = torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    w = b.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        if count == 5:
            expand(model, layout, {name: 6}, optimizer, seed=0)
            w, m, v = (torch.cat([x, x.new_zeros(x.shape[0], 2)], dim=1) for x in (w, m, v))
        gradient = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
        b.grad = gradient
        optimizer.step()
        assert torch.allclose(b.detach(), w, rtol=1e-10, atol=1e-13), count


def test_an_optimizer_without_states_yet_is_expanded_too():
    model, layout = banded("lora", torch.float32)
    optimizer = OPTIMIZERS["adamw_torch"](list(trained_tensors(model, layout).values()))
    expand(model, layout, all_to(layout, 6), optimizer, seed=0)
    step(model, optimizer, 2)


def test_states_of_another_shape_are_a_mistake_of_the_caller():
    model, layout = banded("lora", torch.float32)
    optimizer = torch.optim.Adafactor(list(trained_tensors(model, layout).values()))
    step(model, optimizer, 2)
    for state in optimizer.state.values():
        for key in ("row_var", "col_var"):
            state[key] = state[key].flatten()
    with pytest.raises(AssertionError, match="in another shape"):
        expand(model, layout, all_to(layout, 6), optimizer, seed=0)


def test_a_frozen_band_stands_still_to_the_bit():
    """No gradient, no weight decay, no momentum; when it is freed its momentum is what it was."""
    layout = tiny_layout()
    model = attach(tiny_model(), layout, dtype=torch.float32)
    randomize_adapters(model)
    groups = parameter_groups(model, layout, learning_rate=1e-2, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    step(model, optimizer, 2)
    named = trained_tensors(model, layout)
    bands = {name: next(r.band for r in layout if name.startswith(f"{r.module}.")) for name in named}

    def content():
        states = {f"{n}:{k}": v.clone() for n, p in named.items() for k, v in optimizer.state[p].items()}
        return {n: p.detach().clone() for n, p in named.items()} | states

    freeze(model, layout, {"low", "mid"})
    before = content()
    for _ in range(3):
        step(model, optimizer, 2)
    after = content()
    for key, value in before.items():
        moved = not torch.equal(after[key], value)
        assert moved == (bands[key.partition(":")[0]] == "high"), key
    freeze(model, layout, ())
    step(model, optimizer, 2)
    for name, value in content().items():
        if not name.endswith(":step"):
            assert not torch.equal(after[name], value), name


def test_a_model_takes_the_ranks_of_an_earlier_layout(tmp_path):
    model, layout = banded("dora", torch.float32)
    save_weights(model, layout, tmp_path)
    output = logits(model)
    expand(model, layout, all_to(layout, 9), SGD(model.parameters(), 0.1), seed=0)
    randomize_adapters(model, seed=5)
    take_ranks(model, layout)
    load_weights(model, layout, tmp_path)
    assert torch.equal(logits(model), output)
