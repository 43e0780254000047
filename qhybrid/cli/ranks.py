"""`qhybrid ranks sweep`: which ranks, in which layers, of which kind; measured against a uniform control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.cli.columns import columns

if TYPE_CHECKING:
    from qhybrid.sweep.results import SweepResults
    from qhybrid.sweep.setup import Setup


@click.group("ranks")
def command() -> None:
    """Which ranks, in which layers, of which kind: measure it."""


@command.command("sweep", short_help="Arms at equal parameters, compared to a uniform control.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--output", required=True, type=click.Path(), help="The folder of the sweep, new or to go on with.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time, at most; by cores and memory when left out.")
@click.option("--dry-run", is_flag=True, help="Show the arms at their budget and what they need, and stop.")
def sweep(recipe: str, overrides: tuple[str, ...], output: str, jobs: int | None, dry_run: bool) -> None:
    """Run every arm of RECIPE's section sweep at equal parameters, and compare them to the uniform control.

    Each arm gets the same search for its learning rate, and then several seeds at the best one. The same command
    goes on with a sweep that was interrupted. Writes results.json and results.md into the folder.
    """
    from rich.console import Console

    from qhybrid.cli.main import quiet_libraries
    from qhybrid.recipe.load import load_recipe
    from qhybrid.sweep.run import look_ahead, run_sweep

    loaded = load_recipe(recipe, overrides)
    for notice in loaded.notices:
        click.echo(f"note: {notice}")
    with loaded.placing():
        if dry_run:
            announce_arms(look_ahead(loaded, jobs=jobs, prepare=quiet_libraries))
            return
        console = Console()
        try:
            results = run_sweep(
                loaded, Path(output), jobs=jobs, console=console, prepare=quiet_libraries, announce=announce_arms
            )
        except KeyboardInterrupt:
            click.echo("\nnote: the same command goes on from here", err=True)
            raise
    show_results(results)
    click.echo(f"results  {Path(output) / 'results.json'}, results.md")


def announce_arms(setup: Setup) -> None:
    """The arms at their budget, and how many runs there will be."""
    from qhybrid.units import format_bytes, format_count

    header = ("arm", "adapters", "parameters", "of budget", "in training", "mean rank", "memory")
    rows = [
        (
            arm.name,
            f"{arm.description}; {arm.note}" if arm.note else arm.description,
            format_count(arm.parameters),
            f"{arm.parameters / setup.parameters - 1:+.2%}",
            format_count(arm.layout.num_parameters),
            f"{arm.mean_rank:.2f}",
            format_bytes(setup.needed_bytes[arm.name]),
        )
        for arm in setup.arms
    ]
    sweep, num_arms = setup.sweep, len(setup.arms)
    nums_rates = sorted({len(sweep.rates_of(arm.name)) for arm in setup.arms})
    rates = (
        _some(nums_rates[0], "learning rate")
        if len(nums_rates) == 1
        else (f"{nums_rates[0]} to {nums_rates[-1]} learning rates")
    )
    click.echo(f"{num_arms} arms of {format_count(setup.parameters)} parameters; control: {sweep.control}")
    for line in columns(header, rows, left=2):
        click.echo(line)
    click.echo(
        f"{len(setup.search)} runs to search {rates} with "
        f"{_some(len(sweep.seeds_of_search), 'seed')}; then {_some(len(sweep.seeds), 'seed')} at each arm's best"
    )
    click.echo(
        f"{setup.at_once} at a time, {_some(setup.started.threads, 'thread')} each; "
        f"{format_bytes(setup.free_bytes)} free; {setup.num_rows} held-out rows"
    )


def _some(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def show_results(results: SweepResults) -> None:
    from qhybrid.sweep.text import legend, table

    header, rows = table(results)
    first, *lines = columns(header, rows)
    click.echo(first)
    for row, line in zip(rows, lines, strict=True):
        click.secho(line, bold=row[0] == results.control)
    click.echo(legend(results))
    for note in results.notes:
        click.echo(f"note: {note}")
