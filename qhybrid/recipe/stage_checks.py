"""Stages that cannot happen are refused: with the place in the recipe, before anything is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qhybrid.recipe.stages import StageSection, expandable

if TYPE_CHECKING:
    from qhybrid.recipe.schema import Recipe


class StageError(ValueError):
    """A stage that cannot happen; `path` is where it stands in the recipe."""

    def __init__(self, message: str, *path: str | int, hint: str | None = None) -> None:
        super().__init__(message)
        self.path = ("stages", *path)
        self.hint = hint


def begin_steps(stages: Sequence[StageSection], total_steps: int) -> tuple[int | None, ...]:
    """After which optimizer step each stage begins; None for those that wait for something else.

    Raises:
        StageError: a step outside of the run, or stages that are not in the order of their steps.
    """
    steps: list[int | None] = []
    last = 0
    for number, stage in enumerate(stages):
        if stage.at is None:
            steps.append(None)
            continue
        step = round(stage.at * total_steps) if isinstance(stage.at, float) else stage.at
        if step >= total_steps:
            raise StageError(
                f"stage {stage.name!r} would begin after step {step}, and the run ends with step {total_steps}",
                number, "at", hint="let it begin earlier, or train longer",
            )  # fmt: skip
        if step <= last:
            before = f"the stage before it begins after step {last}" if last else "there is no step before it"
            raise StageError(
                f"stage {stage.name!r} would begin after step {step}, but {before}",
                number, "at", hint="write the stages in the order in which they begin",
            )  # fmt: skip
        last = step
        steps.append(step)
    return tuple(steps)


def check_stages(recipe: Recipe) -> None:
    """Refuse stages that name no bands, contradict each other, or need what the recipe does not give.

    Raises:
        StageError: with the place in the recipe.
    """
    stages, kinds = recipe.stages, {band.band: band.kind for band in recipe.adapters}
    if not stages:
        return
    if not recipe.distributed.is_single:
        raise StageError(
            "stages need one process without ZeRO: others would hold gradients of shapes that change",
            hint="set distributed.processes to 1 and distributed.zero_stage to 0, or leave stages out",
        )
    names = [stage.name for stage in stages]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise StageError(f"two stages are called {name!r}; give each its own name", number, "name")
    for number, stage in enumerate(stages):
        evaluated = recipe.training.eval_strategy != "no"
        if stage.when == "plateau" and stage.plateau_settings.metric == "eval_loss" and not evaluated:
            raise StageError(
                f"stage {stage.name!r} waits for a plateau of eval_loss, and nothing is evaluated",
                number, "when", hint="set training.eval_strategy, or plateau.metric: train_loss",
            )  # fmt: skip
        if stage.expand and recipe.ranks:
            raise StageError(
                f"stage {stage.name!r} expands ranks that {recipe.ranks.method} chooses from data: no plan "
                "knows how large they become",
                number, "expand", hint="leave out adapters.ranks, or expand; stages may freeze beside it",
            )  # fmt: skip
        _check_bands(number, stage, kinds)
    _check_frozen(stages, kinds)
    if recipe.training.max_steps > 0:
        begin_steps(stages, recipe.training.max_steps)


def _check_bands(number: int, stage: StageSection, kinds: dict[str, str]) -> None:
    expand = stage.expand
    named: dict[tuple[str, ...], tuple[str, ...]] = {("freeze",): stage.freeze, ("unfreeze",): stage.unfreeze}
    named["expand", "bands"] = expand.bands if expand else ()
    for path, bands in named.items():
        for band in bands:
            if band not in kinds:
                raise StageError(
                    f"stage {stage.name!r}: there is no band {band!r}",
                    number, *path, hint=f"the bands are: {', '.join(itertools.islice(kinds, 20))}",
                )  # fmt: skip
            if path[0] == "expand" and kinds[band] == "adalora":
                raise StageError(
                    f"stage {stage.name!r}: band {band!r} is adalora, whose allocator decides its ranks",
                    number, *path, hint="raise its adalora.init_rank, or make it lora, rslora or dora",
                )  # fmt: skip
    if expand and not expand.bands and set(kinds.values()) == {"adalora"}:
        raise StageError(
            f"stage {stage.name!r}: no band can be expanded: all are adalora, whose allocator decides the ranks",
            number, "expand", hint="raise adalora.init_rank",
        )  # fmt: skip


def _check_frozen(stages: Sequence[StageSection], kinds: dict[str, str]) -> None:
    """Follow which bands are surely, and which may be, frozen: a plateau may not come before the next `at`."""
    surely: set[str] = set()
    maybe: set[str] = set()
    for number, stage in enumerate(stages):
        for band in stage.freeze:
            if band in surely:
                raise StageError(
                    f"stage {stage.name!r}: freeze has no effect: {band!r} is frozen already", number, "freeze"
                )
        for band in stage.unfreeze:
            if band not in maybe:
                raise StageError(
                    f"stage {stage.name!r}: unfreeze has no effect: {band!r} is not frozen", number, "unfreeze"
                )
        before = surely, maybe
        surely, maybe = ((bands | {*stage.freeze}) - {*stage.unfreeze} for bands in before)
        if maybe == kinds.keys():
            raise StageError(
                f"stage {stage.name!r} may leave nothing to train: every band would be frozen",
                number, "freeze" if stage.freeze else "unfreeze", hint="leave one band out of freeze",
            )  # fmt: skip
        if stage.expand and expandable(stage.expand, kinds) <= surely:
            raise StageError(
                f"stage {stage.name!r} expands bands that are frozen, so the new ranks would not be trained",
                number, "expand", hint="unfreeze one of them in the same stage",
            )  # fmt: skip
        if stage.when == "plateau" and any(later.at is not None for later in stages[number + 1 :]):
            surely, maybe = surely & before[0], maybe | before[1]
