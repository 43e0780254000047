"""The order of stages: what begins, what is passed over, which rule stands, and what a budget leaves."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_recipe, randomize_adapters, tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.architecture.growth import rank_cost
from qhybrid.recipe.stage_checks import begin_steps
from qhybrid.training.stages import Stages, used_ranks

BANDS = [
    {"band": "low", "layers": "bottom", "rank": 4},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 4},
    {"band": "high", "layers": "top", "rank": 4},
]


class Rehearsal:
    """A run without training: gradients and losses are given by hand, and every step is saved and restored."""

    def __init__(self, *stages, total: int = 100):
        evaluated = {"sources": "rows.jsonl", "eval_sources": "rows.jsonl"}
        training = {"max_steps": total, "eval_strategy": "steps"}
        self.recipe = make_recipe(adapters=BANDS, stages=list(stages), training=training, data=evaluated)
        self.layout = tiny_layout(BANDS)
        self.model = attach(tiny_model(), self.layout, dtype=torch.float32)
        randomize_adapters(self.model)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], 0.1)
        self.steps = begin_steps(self.recipe.stages, total)
        self.stages = Stages(self.recipe, self.steps, self.model, self.layout)

    def advance(self, step: int):
        state = json.loads(json.dumps(self.stages.state()))
        self.stages = Stages(self.recipe, self.steps, self.model, self.layout)
        self.stages.load(state)
        self.layout, changes = self.stages.advance(step, self.model, self.layout, self.optimizer)
        return changes

    def names(self, step: int) -> list[str]:
        return [f"{'-' if change.passed_over else ''}{change.stage}" for change in self.advance(step)]

    def observe(self, gradients: dict[str, float]) -> None:
        """The same gradient for every value of a module; 1e-6 where none is given."""
        for row, module in adapted_modules(self.model, self.layout):
            for part in (module.lora_A, module.lora_B):
                weight = part[ADAPTER].weight
                weight.grad = torch.full_like(weight, gradients.get(row.module, 1e-6))
        self.stages.observe(1.0)
        for parameter in self.model.parameters():
            parameter.grad = None


def test_stages_come_in_their_order_and_waiting_ones_are_passed_over():
    flat = {"when": "plateau", "plateau": {"patience": 1}}
    run = Rehearsal(
        {"name": "first", "at": 10, "freeze": "low"},
        {"name": "flat", **flat, "unfreeze": "low"},
        {"name": "rule", "when": "spectrum", "expand": {"by": 1, "to": 9}},
        {"name": "later", "at": 0.5, "freeze": "mid"},
        {"name": "last", **flat, "unfreeze": "mid"},
    )
    for loss in (1.0, 1.0, 1.0):
        run.stages.take_evaluation(loss)  # nobody waits for a plateau yet
    assert run.names(9) == [] and run.names(10) == ["first"] and run.stages.frozen == {"low"}
    run.stages.take_evaluation(1.0)
    assert run.names(11) == []
    assert run.names(50) == ["-flat", "-rule", "later"] and run.stages.frozen == {"low", "mid"}
    for step, loss in ((51, 1.0), (52, 1.0)):
        run.stages.take_evaluation(loss)
        assert run.names(step) == (["last"] if step == 52 else [])
    assert run.stages.frozen == {"low"} and run.stages.begun == ["first", "later", "last"]


def test_a_plateau_that_comes_with_the_next_stage_is_not_passed_over():
    run = Rehearsal(
        {"name": "flat", "when": "plateau", "plateau": {"patience": 1}, "freeze": "low"},
        {"name": "rule", "when": "spectrum", "expand": {"by": 1, "to": 9}},
        {"name": "later", "at": 50, "freeze": "mid"},
    )
    for loss in (1.0, 1.0):
        run.stages.take_evaluation(loss)
    assert run.names(50) == ["flat", "-rule", "later"] and run.stages.frozen == {"low", "mid"}


def test_the_most_important_modules_grow():
    run = Rehearsal({"at": 3, "expand": {"top": 3, "times": 2}})
    chosen = ["model.layers.5.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.4.self_attn.k_proj"]
    for _ in range(3):
        run.observe(dict(zip(chosen, (0.3, 0.1, 0.2), strict=True)) | {"model.layers.2.mlp.up_proj": 9.0})
    (change,) = run.advance(3)
    assert [(m, g.before, g.after) for m, g in change.expanded.items()] == [
        (module, 4, 8) for module in (chosen[0], chosen[2], chosen[1])
    ]
    scores = [growth.score for growth in change.expanded.values()]
    assert scores == sorted(scores, reverse=True) and scores[2] > 0
    assert {row.module for row in run.layout if row.rank == 8} == set(chosen)
    assert change.num_parameters - change.num_parameters_before == sum(
        4 * rank_cost(row) for row in run.layout if row.module in chosen
    )


def test_a_budget_leaves_out_what_no_longer_fits():
    run = Rehearsal({"at": 3, "expand": {"by": 2, "budget": 800}})
    order = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj",
             "model.layers.1.self_attn.k_proj", "model.layers.5.self_attn.k_proj"]  # fmt: skip
    run.observe({module: 5.0 - number for number, module in enumerate(order)})
    (change,) = run.advance(3)  # 2 * 160 each; a third one would be 960, k_proj is 2 * 96 and too much, too
    assert list(change.expanded) == order[:2]
    run = Rehearsal({"at": 3, "expand": {"by": 2, "budget": 840}})
    run.observe({module: 5.0 - number for number, module in enumerate(order)})
    (change,) = run.advance(3)
    assert list(change.expanded) == [*order[:2], order[3]]


def test_frozen_bands_do_not_grow():
    run = Rehearsal({"at": 2, "freeze": "low"}, {"at": 3, "expand": {"top": 0.5, "by": 1}})
    run.advance(2)
    run.observe({row.module: 9.0 for row in run.layout.of_band("low")})
    (change,) = run.advance(3)
    bands = {row.module: row.band for row in run.layout}
    assert len(change.expanded) == 7 and {bands[module] for module in change.expanded} == {"high"}


def test_there_may_be_nothing_left_to_expand():
    run = Rehearsal({"at": 2, "expand": {"bands": "low", "to": 6}}, {"at": 3, "expand": {"bands": "low", "to": 5}})
    assert len(run.advance(2)[0].expanded) == 14
    (change,) = run.advance(3)
    assert change.expanded == {} and change.num_parameters == change.num_parameters_before


def flatten_spectrum(run: Rehearsal, modules: list[str], used: int) -> None:
    """Give some modules a product of exactly `used` equal singular values, and all others of one."""
    for row, module in adapted_modules(run.model, run.layout):
        rank = used if row.module in modules else 1
        a, b = torch.zeros(row.rank, row.in_features), torch.zeros(row.out_features, row.rank)
        a[:rank, :rank] = b[:rank, :rank] = torch.eye(rank)
        with torch.no_grad():
            module.lora_A[ADAPTER].weight.copy_(a), module.lora_B[ADAPTER].weight.copy_(b)


@pytest.mark.parametrize("measure", ["effective", "energy"])
def test_a_rule_expands_what_uses_its_rank_until_the_next_stage(measure):
    spectrum = {"measure": measure, "threshold": 0.74, "release": 0.7, "every": 5, "interval": 10}
    run = Rehearsal(
        {"name": "rule", "at": 7, "when": "spectrum", "spectrum": spectrum, "expand": {"by": 2, "to": 9}},
        {"name": "end", "at": 60, "freeze": "low"},
    )
    full = ["model.layers.0.self_attn.q_proj", "model.layers.5.mlp.down_proj"]
    shares = []
    flatten_spectrum(run, full, 3)
    shares.append(used_ranks(run.model, run.layout, run.recipe.stages[0].spectrum_settings)[full[0]])
    assert run.advance(5) == []  # it does not stand yet
    assert run.advance(7) == []  # now it does, but looks at steps that 5 divides
    (change,) = run.advance(10)
    assert set(change.expanded) == set(full) and all(
        (g.before, g.after) == (4, 6) for g in change.expanded.values()
    )
    shares.append(used_ranks(run.model, run.layout, run.recipe.stages[0].spectrum_settings)[full[0]])
    assert shares == pytest.approx([3 / 4, 3 / 6])
    flatten_spectrum(run, full, 5)
    assert run.advance(15) == []  # it was just changed
    flatten_spectrum(run, full, 3)
    assert run.advance(20) == []  # released
    flatten_spectrum(run, full[:1], 5)
    (change,) = run.advance(25)
    assert list(change.expanded) == full[:1] and change.expanded[full[0]].after == 8
    flatten_spectrum(run, full, 4)
    run.advance(30)  # released again
    flatten_spectrum(run, full, 6)
    (change,) = run.advance(40)
    assert {m: g.after for m, g in change.expanded.items()} == {full[0]: 9, full[1]: 8}  # not above `to`
    flatten_spectrum(run, full, 8)
    assert run.names(60) == ["end"] and run.advance(65) == []  # the rule no longer stands


def test_a_rule_keeps_to_its_budget_over_all_its_changes():
    spectrum = {"threshold": 0.7, "release": 0.6, "every": 1, "interval": 1}
    one = 64 + 64
    run = Rehearsal({"when": "spectrum", "spectrum": spectrum, "expand": {"by": 1, "to": 60, "budget": 2 * one}})
    module = ["model.layers.0.self_attn.q_proj"]
    grown = []
    for step in range(1, 12):
        flatten_spectrum(run, module, next(row.rank for row in run.layout if row.module == module[0]))
        grown += [change.expanded for change in run.advance(step)]
        flatten_spectrum(run, [], 1)
        grown += [change.expanded for change in run.advance(step)]
    assert len(grown) == 2 and run.layout.num_parameters - tiny_layout(BANDS).num_parameters == 2 * one
