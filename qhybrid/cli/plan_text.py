"""The plan as a terminal shows it: a table, a bar, the verdict, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qhybrid.planner import constants
from qhybrid.planner.advise import Change, overrides_between, ways_to_fit, ways_to_spend
from qhybrid.planner.plan import Plan, make_plan
from qhybrid.planner.solve import asked_ranks, solve_rank
from qhybrid.planner.tasks import lower_ranks, plan_tasks, task_overrides_between, ways_to_fit_tasks
from qhybrid.planner.workload import checkpointed_layers, row_length
from qhybrid.recipe.tasks import task_recipes
from qhybrid.units import format_bytes, format_count

if TYPE_CHECKING:
    from qhybrid.architecture.spec import ModelSpec
    from qhybrid.base.facts import ModelFacts
    from qhybrid.recipe.schema import Recipe

_BAR_WIDTH = 72
_COLOURS = {
    "base weights": "blue",
    "unquantised weights": "cyan",
    "adapters and states": "magenta",
    "activations": "green",
    "loss": "yellow",
    "allocator and CUDA": "bright_black",
}
_MARKS = dict(zip(_COLOURS, "█▓▒░▞·", strict=True))
_STATES = ("adapters", "gradients", "optimizer", "AdaLoRA", "DoRA", "master weights")
_SYSTEM = ("cuBLAS workspace", "allocator margin", "CUDA context", "Python and libraries", "while loading")


def show(
    recipe: Recipe,
    plan: Plan,
    facts: ModelFacts,
    *,
    simulated: dict[str, Any] | None = None,
    quantity: str | None = None,
    asked: Recipe | None = None,
) -> None:
    """Print the plan of `recipe`; where a quantity was solved for, `asked` is the recipe before."""
    console = Console(highlight=False, soft_wrap=True)
    _say(console, _header(recipe, plan, facts))
    if quantity and asked is not None:
        _say(console, _solved_lines(quantity, asked, recipe, plan))
    _caps(console, plan)
    console.print(_table(plan, simulated))
    _bar(console, plan)
    _say(console, _verdict(plan))
    if quantity is None:
        _advice(console, recipe, plan, facts)
    for assumption in plan.prediction.assumptions:
        _say(console, [f"assumed: {assumption}"])


def show_recommendation(text: str, recipe: Recipe, plan: Plan, facts: ModelFacts) -> None:
    """Print a recommended recipe, and below it what it needs, as comments."""
    console = Console(highlight=False, soft_wrap=True)
    lines = text.rstrip().splitlines()
    lines += ["", "# The plan", *(f"# {line}" for line in _verdict(plan))]
    for cap in plan.caps:
        if cap.got != cap.asked:
            lines.append(f"# {cap.told}: more does not fit")
    _say(console, lines)


def solved(quantity: str, recipe: Recipe) -> Any:
    """The value that was solved for, as JSON."""
    match quantity:
        case "rank":
            return asked_ranks(recipe)
        case "micro_batch":
            return recipe.training.per_device_train_batch_size
        case "max_length":
            return recipe.training.max_length
    training = recipe.training
    newer = training.activation_checkpointing
    return {
        "gradient_checkpointing": training.gradient_checkpointing if newer is None else newer,
        "checkpoint_layers": recipe.memory.checkpoint_layers,
    }


def _say(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False)


def _header(recipe: Recipe, plan: Plan, facts: ModelFacts) -> list[str]:
    spec = facts.spec
    num_bands = len(plan.layout.bands)
    quantization = "NF4" if recipe.quantization.method == "nf4" else recipe.model.dtype
    return [
        f"model     {plan.model}: {format_count(spec.num_parameters)} parameters, {quantization} ({facts.source})",
        f"trained   {format_count(plan.layout.num_parameters)} parameters in {num_bands} "
        f"band{'s' if num_bands > 1 else ''}, {recipe.adapter_dtype}"
        + ("" if recipe.tasks else f", {recipe.training.optim}")
        + _growth(plan),
        *([] if recipe.tasks else [f"step      {_step(recipe, spec)}"]),
        *(
            f"task      {name}: {_step(own, spec)}; {own.training.optim}"
            for name, own in task_recipes(recipe).items()
        ),
    ]


def _step(recipe: Recipe, spec: ModelSpec) -> str:
    training = recipe.training
    checkpointed = len(checkpointed_layers(recipe, spec.num_layers))
    rows = f"{training.per_device_train_batch_size} x {format_count(row_length(recipe, spec))} tokens"
    times = training.gradient_accumulation_steps
    return (
        f"{rows}{f', {times} times' if times > 1 else ''}; {checkpointed} of {spec.num_layers} layers checkpointed"
    )


def _growth(plan: Plan) -> str:
    at_most = plan.largest.num_parameters
    if at_most == plan.layout.num_parameters:
        return ""
    return f"; stages may make them {format_count(at_most)}, which the plan is for"


def _solved_lines(quantity: str, asked: Recipe, recipe: Recipe, plan: Plan) -> list[str]:
    changed = overrides_between(asked, recipe)
    if plan.fits is False:
        least = "with every layer checkpointed" if quantity == "checkpointing" else f"at the smallest {quantity}"
        return [f"solved    it does not fit even {least}"]
    return [f"solved    {' '.join(changed) if changed else 'nothing is to be changed: it is as the recipe says'}"]


def _caps(console: Console, plan: Plan) -> None:
    for cap in plan.caps:
        word = "as asked for" if cap.got == cap.asked else f"{cap.asked} was asked for"
        what = f"{cap.band}: rank {cap.got}"
        if cap.is_budget:
            task = cap.band.rpartition(".")[0]
            what = f"{task}{': ' if task else ''}{cap.got:,} parameters of rank"
        _say(console, [f"band      {what} ({word})"])


def _table(plan: Plan, simulated: dict[str, Any] | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=False)
    table.add_column("\ncomponent")
    table.add_column("\nmemory", justify="right")
    table.add_column("\nshare", justify="right")
    for name, size in plan.components().items():
        table.add_row(name, format_bytes(size), f"{size / plan.needed:.1%}")
    if plan.device == "cuda":
        table.add_row("allocated at the peak", format_bytes(plan.allocated), "", style="bold")
        if simulated:
            ratio = plan.prediction.peak / simulated["allocated_bytes"]
            table.add_row(
                "  simulated", format_bytes(simulated["allocated_bytes"] + plan.workspace), f"{ratio:.3f}x"
            )
        table.add_row("reserved", format_bytes(plan.reserved), "", style="bold")
    elif simulated:
        ratio = plan.prediction.peak / simulated["allocated_bytes"]
        table.add_row("tensors at the peak", format_bytes(plan.allocated), "", style="bold")
        table.add_row("  simulated", format_bytes(simulated["allocated_bytes"]), f"{ratio:.3f}x")
    table.add_row("needed", format_bytes(plan.needed), "", style="bold")
    return table


def _groups(plan: Plan) -> dict[str, int]:
    groups = dict.fromkeys(_COLOURS, 0)
    for name, size in plan.components().items():
        if name in groups:
            groups[name] += size
        elif name.startswith(_STATES):
            groups["adapters and states"] += size
        elif name.startswith(_SYSTEM):
            groups["allocator and CUDA"] += size
        else:
            groups["activations"] += size
    return {name: size for name, size in groups.items() if size}


def _bar(console: Console, plan: Plan) -> None:
    """The components to scale; a line marks the limit."""
    limit = plan.budget.vram
    whole = max(plan.needed, limit or 0)
    bar = Text("\n  ")
    drawn = filled = 0
    for name, size in _groups(plan).items():
        filled += size
        width = round(_BAR_WIDTH * filled / whole) - drawn
        bar.append(_MARKS[name] * width, style=_COLOURS[name])
        drawn += width
    if limit is not None:
        at = round(_BAR_WIDTH * limit / whole)
        if at > drawn:
            bar.append(" " * (at - drawn))
        bar.append(f"│ {format_bytes(limit)}")
        if plan.fits is False:
            plain = Text("\n  ")
            plain.append_text(bar[3 : 3 + at])
            plain.append("│", style="bold red")
            plain.append_text(bar[3 + at : 3 + drawn])
            plain.append(f"  {format_bytes(limit)} at the line", style="red")
            bar = plain
    console.print(bar)
    legend = Text("  ")
    for name in _groups(plan):
        legend.append(_MARKS[name], style=_COLOURS[name])
        legend.append(f" {name}   ")
    console.print(legend)
    console.print()


def _verdict(plan: Plan) -> list[str]:
    limit = plan.budget.vram
    what = "memory" if plan.device == "cpu" else "GPU memory"
    lines = []
    if limit is None:
        none = "" if plan.device == "cpu" else "; no limit was given (--vram or --gpu)"
        lines.append(f"needs {format_bytes(plan.needed)} of {what}{none}")
    elif plan.fits:
        spare = format_bytes(limit - plan.needed)
        lines.append(
            f"fits: {format_bytes(plan.needed)} of {format_bytes(limit)} ({plan.budget.source}), {spare} left"
        )
    else:
        short = format_bytes(plan.needed - limit)
        lines.append(
            f"does not fit: {format_bytes(plan.needed)} of {format_bytes(limit)} ({plan.budget.source}), "
            f"{short} too much"
        )
        expandable = plan.needed - plan.margin + int(constants.RESERVED_MARGIN_EXPANDABLE * plan.allocated)
        if plan.device == "cuda" and expandable <= limit:
            lines.append("it may fit with PYTORCH_ALLOC_CONF=expandable_segments:True, which wastes less")
    lines.append(f"the peak comes in the part: {plan.moment}")
    rest = [] if plan.device == "cpu" else [f"host RAM {format_bytes(plan.host)}"]
    rest += [f"model on disk {format_bytes(plan.download)}", f"a checkpoint {format_bytes(plan.checkpoint)}"]
    if plan.prediction.unified:
        rest.append(f"paged optimizer states {format_bytes(plan.prediction.unified)} (GPU or host)")
    lines.append("; ".join(rest))
    return lines


def _advice(console: Console, recipe: Recipe, plan: Plan, facts: ModelFacts) -> None:
    if plan.budget.vram is None:
        return

    def replan(tried: Recipe) -> Plan:
        return (plan_tasks if tried.tasks else make_plan)(tried, facts.spec, plan.budget, device=plan.device)

    if plan.fits:
        changes = [] if recipe.tasks else ways_to_spend(recipe, facts.spec, replan)
        if changes:
            _say(console, ["", "what is left could buy one of these:"])
        for change in changes:
            _say(console, _change_lines(change, f"{format_bytes(-change.saves)} more"))
        return
    changes, enough = (ways_to_fit_tasks if recipe.tasks else ways_to_fit)(recipe, facts.spec, replan)
    _say(console, ["", "to make it fit:" if enough else "these changes help, but do not suffice:"])
    for change in changes:
        _say(console, _change_lines(change, f"saves {format_bytes(change.saves)}"))
    if not enough:
        what = "more memory" if plan.device == "cpu" else "a GPU with more memory"
        _say(console, [f"  then: a smaller model, or {what}"])
    if recipe.memory.on_exceed == "cap_rank":
        if recipe.tasks:
            capped, between = lower_ranks(recipe, facts.spec, replan), task_overrides_between
        else:
            capped = solve_rank(recipe, facts.spec, replan, no_more_than_asked=True)
            between = overrides_between
        if capped is not None and between(recipe, capped):
            words = " ".join(between(recipe, capped))
            _say(
                console,
                ["", "left as it is, qhybrid sft lowers the ranks (memory.on_exceed: cap_rank):", f"  {words}"],
            )


def _change_lines(change: Change, effect: str) -> list[str]:
    return [f"  {' '.join(change.overrides)}", f"      {effect}; {change.price}"]
