"""The stages of a run: which one begins now, which modules it expands, which bands stand still.

They begin in the order of the list. An `at` stage begins at its step in any case, and those above it that still
wait are passed over. `when: plateau` is watched from the moment the stage above has begun. `when: spectrum` is a
rule that stands from then on, or from its `at` on, until the next stage begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel

from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.expand import expand
from qhybrid.adapters.importance import ModuleImportance
from qhybrid.adapters.watch import spectra
from qhybrid.architecture.growth import candidates, rank_cost
from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.stages import SpectrumSection, StageSection
from qhybrid.training.triggers import Plateau, Saturation

_ENERGY = 0.99


@dataclass(frozen=True)
class Growth:
    """A module's rank before and after, and what it was chosen by: importance, or the share of rank in use."""

    before: int
    after: int
    score: float


@dataclass(frozen=True)
class Change:
    """What a stage did after an optimizer step; or that it was passed over."""

    step: int
    stage: str
    passed_over: bool = False
    expanded: dict[str, Growth] = field(default_factory=dict)
    froze: tuple[str, ...] = ()
    unfroze: tuple[str, ...] = ()
    num_parameters_before: int = 0  # trained or frozen, of all bands
    num_parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Stages:
    """Where a run is in its list of stages. To be told of every step, and of every evaluation."""

    def __init__(self, recipe: Recipe, steps: Sequence[int | None], model: PeftModel, layout: Layout) -> None:
        """
        Args:
            steps: after which optimizer step each stage begins, as `recipe.stage_checks.begin_steps` says.
        """
        self.frozen: frozenset[str] = frozenset()  # bands
        self.begun: list[str] = []  # stages that were not passed over
        self._stages, self._steps, self._seed = recipe.stages, tuple(steps), recipe.training.seed
        self._next = 0  # the stage that is waited for
        self._spent = 0  # parameters that the rule that stands has added
        self._importance = ModuleImportance(
            {
                row.module: (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
                for row, module in adapted_modules(model, layout)
                if row.kind != "adalora"
            }
        )
        self._saturation = Saturation()
        self._watch()

    def _watch(self) -> None:
        """Begin to watch what the next stage waits for."""
        waiting = self._stages[self._next] if self._next < len(self._stages) else None
        self._plateau = Plateau(waiting.plateau_settings) if waiting and waiting.when == "plateau" else None

    @property
    def _rule(self) -> StageSection | None:
        """The `when: spectrum` stage that stands."""
        last = self._stages[self._next - 1] if self._next else None
        return last if last is not None and last.when == "spectrum" and last.name in self.begun else None

    # ---- what is observed ----

    def observe(self, gradient_scale: float) -> None:
        """Gradients of a step are complete, and the weights not yet updated."""
        if any(stage.expand is not None and stage.when != "spectrum" for stage in self._stages[self._next :]):
            self._importance.observe(gradient_scale)

    def take_step(self, loss: float) -> None:
        """An optimizer step was taken."""
        if self._plateau is not None:
            self._plateau.take_step(loss)

    def take_evaluation(self, loss: float) -> None:
        """An evaluation ended."""
        if self._plateau is not None:
            self._plateau.take_evaluation(loss)

    # ---- what is done ----

    def advance(
        self, step: int, model: PeftModel, layout: Layout, optimizer: torch.optim.Optimizer
    ) -> tuple[Layout, list[Change]]:
        """Do what is due after optimizer step `step`, before the next one. There are no gradients then.

        `frozen` says which bands are to stand still from now on; that is the caller's part.

        Returns:
            The layout from now on, and what was done.
        """
        changes: list[Change] = []

        def grow(growing: dict[str, Growth], change: Change, *, by_rule: bool = False) -> None:
            nonlocal layout
            before = layout.num_parameters
            if growing:
                ranks = {module: growth.after for module, growth in growing.items()}
                layout = expand(model, layout, ranks, optimizer, seed=self._seed)
            for module in growing:
                self._saturation.expanded(step, module, by_rule=by_rule)
            now = layout.num_parameters
            changes.append(replace(change, expanded=growing, num_parameters_before=before, num_parameters=now))

        for stage, begins in self._beginning(step):
            if not begins:
                grow({}, Change(step, stage.name, passed_over=True))
            elif stage.when != "spectrum":
                before = self.frozen
                self.frozen = (before | {*stage.freeze}) - {*stage.unfreeze}
                froze, unfroze = tuple(sorted(self.frozen - before)), tuple(sorted(before - self.frozen))
                growing = self._most_important(stage, layout) if stage.expand else {}
                grow(growing, Change(step, stage.name, froze=froze, unfroze=unfroze))
        rule = self._rule
        if rule is not None and step > 0 and step % rule.spectrum_settings.every == 0:
            growing = self._fullest(rule, step, model, layout)
            if growing:
                grow(growing, Change(step, rule.name), by_rule=True)
                self._spent += changes[-1].num_parameters - changes[-1].num_parameters_before
        return layout, changes

    def _beginning(self, step: int) -> Iterator[tuple[StageSection, bool]]:
        """The stages that begin now, in order; with False those that are passed over."""
        while self._next < len(self._stages):
            stage = self._stages[self._next]
            due = [n for n, at in enumerate(self._steps) if n >= self._next and at is not None and at <= step]
            stands = stage.when == "spectrum" and stage.at is None
            begins = self._next in due or self._is_reached() or (stands and not due)
            if not begins and not due:
                return
            self._next += 1
            self._spent = 0
            if begins:
                self.begun.append(stage.name)
            self._watch()
            yield stage, begins

    def _is_reached(self) -> bool:
        return self._plateau is not None and self._plateau.is_reached

    def _growable(self, stage: StageSection, layout: Layout) -> list[LayoutRow]:
        assert stage.expand is not None
        rows = [row for row in candidates(stage.expand, layout) if row.band not in self.frozen]
        return [row for row in rows if stage.expand.rank_after(row.rank) > row.rank]

    def _most_important(self, stage: StageSection, layout: Layout) -> dict[str, Growth]:
        assert stage.expand is not None
        importance = self._importance.averages()
        rows = sorted(self._growable(stage, layout), key=lambda row: -importance[row.module])  # stable
        return self._within_budget(stage, rows[: stage.expand.how_many(len(rows))], importance)

    def _fullest(self, rule: StageSection, step: int, model: PeftModel, layout: Layout) -> dict[str, Growth]:
        rows = {row.module: row for row in self._growable(rule, layout)}
        used = used_ranks(model, Layout(tuple(rows.values())), rule.spectrum_settings)
        chosen = [rows[module] for module in self._saturation.choose(step, used, rule.spectrum_settings)]
        return self._within_budget(rule, chosen, used)

    def _within_budget(
        self, stage: StageSection, rows: Sequence[LayoutRow], scores: Mapping[str, float]
    ) -> dict[str, Growth]:
        """The new ranks of `rows`, which are taken in their order, as far as the stage's budget goes."""
        assert stage.expand is not None
        growing = {}
        left = None if stage.expand.budget is None else stage.expand.budget - self._spent
        for row in rows:
            rank = stage.expand.rank_after(row.rank)
            cost = (rank - row.rank) * rank_cost(row)
            if left is None or cost <= left:
                growing[row.module] = Growth(row.rank, rank, scores[row.module])
                left = None if left is None else left - cost
        return growing

    # ---- to be saved ----

    def state(self) -> dict[str, Any]:
        """All that a resume needs, as JSON."""
        return {
            "next": self._next,
            "begun": list(self.begun),
            "frozen": sorted(self.frozen),
            "spent": self._spent,
            "importance": self._importance.averages(),
            "plateau": self._plateau and self._plateau.state(),
            "saturation": self._saturation.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._next, self.begun, self._spent = state["next"], list(state["begun"]), state["spent"]
        self.frozen = frozenset(state["frozen"])
        self._importance.load(state["importance"])
        self._watch()
        if self._plateau is not None:
            self._plateau.load(state["plateau"])
        self._saturation.load(state["saturation"])


def used_ranks(model: PeftModel, layout: Layout, settings: SpectrumSection) -> dict[str, float]:
    """The share of its rank that each module of `layout` uses, from the singular values of s·B·A; from 0 to 1."""
    found = spectra(model, layout)
    return {
        row.module: (
            found[row.module].energy_rank(_ENERGY)
            if settings.measure == "energy"
            else found[row.module].effective_rank
        )
        / row.rank
        for row in layout
    }
