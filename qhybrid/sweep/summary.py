"""From the outcomes of all runs to the results: means, intervals, differences to the control, and the front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import numpy as np

from qhybrid.sweep.arms import Arm
from qhybrid.sweep.budget import rounding
from qhybrid.sweep.measures import features_of, value_of
from qhybrid.sweep.outcome import Outcome
from qhybrid.sweep.results import LOWER_IS_BETTER, ArmResult, ModuleRank, RunResult, SweepResults
from qhybrid.sweep.setup import RunKey, Setup
from qhybrid.sweep.statistics import Compared, compare, pareto_front


def summarise(setup: Setup, best: Mapping[str, float | None], outcomes: Mapping[RunKey, Outcome]) -> SweepResults:
    """The results of a sweep whose runs have all ended.

    Args:
        best: by arm, the learning rate that the search chose.
    """
    sweep, labels = setup.sweep, setup.sweep.measure.labels or ()
    search = set(setup.search)

    def is_counted(key: RunKey) -> bool:
        return best[key.arm] == key.learning_rate and key.seed in sweep.seeds

    runs = tuple(
        RunResult(
            name=key.name,
            arm=key.arm,
            learning_rate=key.learning_rate,
            seed=key.seed,
            phase="search" if key in search else "final",
            counts=is_counted(key) and outcome.status == "finished",
            status=outcome.status,
            step=outcome.step,
            total_steps=outcome.total_steps,
            metrics={name: value_of(name, outcome.rows, len(labels)) for name in sweep.measure.metrics}
            if outcome.rows is not None
            else {},
            seconds=outcome.seconds,
            other_seconds=outcome.other_seconds,
            peak_bytes=outcome.peak_bytes,
            note=outcome.note,
        )
        for key, outcome in outcomes.items()
    )
    counted = {
        arm.name: {
            key.seed: outcome
            for key, outcome in outcomes.items()
            if key.arm == arm.name and is_counted(key) and outcome.rows is not None
        }
        for arm in setup.arms
    }
    compared = _compared(setup, counted)
    arms = tuple(
        _arm_result(setup, arm, best[arm.name], counted[arm.name], compared.get(arm.name, {}), runs)
        for arm in setup.arms
    )
    front = _front(arms, sweep.measure.metrics[0])
    return SweepResults(
        recipe=setup.loaded.path.name,
        model=setup.recipe.model.path,
        device="cuda" if setup.device == "cuda" else "cpu",
        control=sweep.control,
        parameters=setup.parameters,
        metrics=sweep.measure.metrics,
        learning_rates=tuple(sorted({rate for arm in setup.arms for rate in sweep.rates_of(arm.name)})),
        search_seeds=sweep.seeds_of_search,
        seeds=sweep.seeds,
        num_rows=setup.num_rows,
        jobs=setup.at_once,
        threads=setup.started.threads,
        arms=tuple(replace(arm, is_on_front=arm.name in front) for arm in arms),
        runs=runs,
        notes=_notes(setup, arms, runs, outcomes),
        versions=next(iter(outcomes.values())).versions,
        date=setup.started.date,
    )


def _compared(setup: Setup, counted: Mapping[str, Mapping[int, Outcome]]) -> dict[str, dict[str, Compared]]:
    """By arm and metric; of arms that have a run to count."""
    labels = setup.sweep.measure.labels or ()
    there = {name: of_seeds for name, of_seeds in counted.items() if of_seeds}
    found: dict[str, dict[str, Compared]] = {name: {} for name in there}
    if not there:
        return found
    for name in setup.sweep.measure.metrics:
        features: dict[str, dict[int, np.ndarray]] = {}
        for arm, of_seeds in there.items():
            features[arm] = {}
            for seed, outcome in of_seeds.items():
                assert outcome.rows is not None
                metric, features[arm][seed] = features_of(name, outcome.rows, len(labels))
        for arm, result in compare(metric, features, setup.sweep.control).items():
            found[arm][name] = result
    return found


def _arm_result(
    setup: Setup,
    arm: Arm,
    rate: float | None,
    counted: Mapping[int, Outcome],
    compared: Mapping[str, Compared],
    runs: tuple[RunResult, ...],
) -> ArmResult:
    rates = setup.sweep.rates_of(arm.name)
    planned = tuple(ModuleRank(row.layer, row.target, row.kind, row.target_rank) for row in arm.layout)
    peaks = [outcome.peak_bytes for outcome in counted.values() if outcome.peak_bytes is not None]
    gone = [run.status for run in runs if run.arm == arm.name and run.status != "finished"]
    ended = "finished" if counted else ("pruned" if "pruned" in gone else "diverged")
    return ArmResult(
        name=arm.name,
        description=f"{arm.description}; {arm.note}" if arm.note else arm.description,
        is_control=arm.is_control,
        status=ended,
        parameters=round(fmean(outcome.parameters for outcome in counted.values())) if counted else arm.parameters,
        trained_parameters=arm.layout.num_parameters,
        mean_rank=round(arm.mean_rank, 4),
        ranks=counted[min(counted)].ranks if counted else planned,
        best_learning_rate=rate,
        is_best_at_edge=len(rates) > 1 and rate in (min(rates), max(rates)),
        seeds=tuple(sorted(counted)),
        metrics={name: one.own for name, one in compared.items()},
        differences={name: one.difference for name, one in compared.items() if one.difference is not None},
        seconds=round(fmean(outcome.seconds for outcome in counted.values()), 3) if counted else None,
        peak_bytes=max(peaks, default=None),
        is_on_front=False,
    )


def _front(arms: tuple[ArmResult, ...], metric: str) -> set[str]:
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return pareto_front(
        {
            arm.name: (sign * arm.metrics[metric].mean, arm.peak_bytes, arm.seconds)
            for arm in arms
            if metric in arm.metrics and arm.peak_bytes is not None and arm.seconds is not None
        }
    )


def _notes(
    setup: Setup,
    arms: tuple[ArmResult, ...],
    runs: tuple[RunResult, ...],
    outcomes: Mapping[RunKey, Outcome],
) -> tuple[str, ...]:
    """What a reader of the table must know."""
    sweep, notes = setup.sweep, []
    edges = [f"{arm.name} ({arm.best_learning_rate:g})" for arm in arms if arm.is_best_at_edge]
    if edges:
        notes.append(
            f"the best learning rate is the lowest or highest that was tried, so a better one may lie beyond: "
            f"{', '.join(edges)}"
        )
    rates = {arm.name: sweep.rates_of(arm.name) for arm in arms}
    alone = [f"{name} ({tried[0]:g})" for name, tried in rates.items() if len(tried) == 1]
    if alone:
        notes.append(f"the learning rate was not searched for, so another may be better: {', '.join(alone)}")
    if len({len(tried) for tried in rates.values()}) > 1:
        notes.append("some arms were tried with more learning rates than others, and so are tuned better")
    if len(sweep.seeds) == 1:
        notes.append("one seed: the intervals are over rows alone, and tell nothing of another seed")
    if setup.at_once > 1:
        notes.append(f"up to {setup.at_once} runs at a time took time from each other")
        if sweep.prune:
            notes.append("with several runs at a time their speed decides what a run is pruned against")
    for status, words in (("pruned", "given up in the search"), ("diverged", "diverged (NaN)")):
        found = [run for run in runs if run.status == status]
        if found:
            notes.append(f"{words}: {len(found)} of {len(runs)} runs: {', '.join(run.name for run in found)}")
    for arm in arms:
        if abs(arm.parameters - setup.parameters) > rounding(setup.arm(arm.name).layout):
            share = arm.parameters / setup.parameters - 1
            notes.append(f"{arm.name} has {arm.parameters:,} parameters, {share:+.1%} of the budget")
    if len({tuple(sorted(outcome.versions.items())) for outcome in outcomes.values()}) > 1:
        notes.append("the runs were not all made with the same versions of the libraries")
    return tuple(notes)
