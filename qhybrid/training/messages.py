"""What the user is told of events in a run, and of what it left when it stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import TrainingError
from qhybrid.planner.plan import Plan
from qhybrid.recipe.schema import Recipe
from qhybrid.training.checkpoint import newest_sealed
from qhybrid.training.claim import has_replaced
from qhybrid.training.data_ranks import told_ranks
from qhybrid.training.planning import smaller_plan
from qhybrid.training.run import Run
from qhybrid.units import format_bytes, format_count

_BACK = "no step was taken: the run that was to be replaced is back as it was"


def what_is_left(run: Run) -> str:
    """What a run that stopped can go on from."""
    if has_replaced(run):
        return _BACK
    checkpoint = newest_sealed(run.checkpoints)
    if checkpoint is None:
        return "stopped before the first checkpoint: --resume auto starts from the beginning"
    return f"stopped; {checkpoint.name} is whole: go on with --resume auto"


def out_of_memory(
    recipe: Recipe,
    spec: ModelSpec,
    expected: Plan,
    longest: int,
    run: Run,
    error: Exception,
    as_override: Callable[[str], str] = str,
) -> TrainingError:
    """What to change: the plan that expected this to fit was wrong here, so one is named that takes less.

    Args:
        as_override: the command line's word for what a word changes in `recipe`.
    """
    message = f"out of memory; the plan expected {format_bytes(expected.needed)}: {str(error).splitlines()[0]}"
    smaller = smaller_plan(recipe, spec, expected, longest, as_override)
    if has_replaced(run):
        return TrainingError(message, hint=f"{_BACK}; start again with --overwrite and {smaller}")
    return TrainingError(message, hint=f"try {smaller}; {what_is_left(run)}")


def stage_told(facts: dict[str, Any]) -> str:
    """What a stage did, in a line."""
    name, step = facts["stage"], facts["step"]
    if facts["passed_over"]:
        return f"stage    {name} is passed over after step {step}: what it waited for has not come"
    parts = []
    grown = [(growth["before"], growth["after"]) for growth in facts["expanded"].values()]
    if grown:
        before, after = (_range(ranks) for ranks in zip(*grown, strict=True))
        count = f"{len(grown)} module{'s' if len(grown) > 1 else ''} from rank {before} to {after}"
        parts.append(
            f"{count}, {format_count(facts['num_parameters_before'])} to {format_count(facts['num_parameters'])} "
            "parameters"
        )
        if not any(growth["score"] for growth in facts["expanded"].values()):
            parts.append("their scores are all 0 yet")
    if facts["froze"] or facts["unfroze"]:
        words = [("frozen", facts["froze"]), ("trained again", facts["unfroze"])]
        parts += [f"{word}: {', '.join(bands)}" for word, bands in words if bands]
        parts.append(f"the backward pass ends at layer {facts['lowest_trained_layer']}")
    return f"stage    {name} after step {step}: {'; '.join(parts) or 'there is nothing that it could expand'}"


def _range(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"


def told(event: str, facts: dict[str, Any], expected: Plan) -> str:
    """An event in words, for the console."""
    if event == "out_of_memory":
        return (
            f"out of memory at step {facts['step']} with micro-batches of {facts['rows']} rows (the plan expected "
            f"{format_bytes(expected.needed)}): taking the step again, {facts['rows_from_now_on']} at a time"
        )
    if event == "ranks":
        return told_ranks(facts)
    if event == "ranks_pass":
        what = "gradients" if facts["method"] == "gora" else "inputs"
        return f"ranks    looking at {what}, pass {facts['number']} of {facts['total']}"
    if event == "stage":
        return stage_told(facts)
    rows = ", ".join(facts["rows"][:8]) + (" …" if len(facts["rows"]) > 8 else "")
    if event == "loss_spike":
        return f"note: the loss leapt to {facts['loss']:.4f} at step {facts['step']}; its rows: {rows}"
    return f"the {facts['what']} is {facts['value']} at step {facts['step']}; its rows: {rows}"
