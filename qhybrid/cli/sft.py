"""`qhybrid sft RECIPE [overrides]`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qhybrid.recipe.schema import Recipe


@click.command("sft", context_settings={"ignore_unknown_options": False})
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option(
    "--resume",
    type=click.Choice(["auto"]),
    metavar="auto",
    help="--resume auto goes on from the newest whole checkpoint, or starts if there is none.",
)
@click.option("--dry-run", is_flag=True, help="Show the memory plan for this machine, and stop.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
def command(recipe: str, overrides: tuple[str, ...], resume: str | None, dry_run: bool, overwrite: bool) -> None:
    """Fine-tune the model that RECIPE names, as it says.

    RECIPE is a YAML file or the name of a shipped recipe. OVERRIDES change single values:
    training.learning_rate=1e-4, adapters.top.rank=8, output_dir=runs/second
    """
    from qhybrid.recipe.load import load_recipe
    from qhybrid.training.launch import LAUNCHED

    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run and --overwrite replaces it: give one of them")
    loaded = load_recipe(recipe, overrides)
    if not os.environ.get(LAUNCHED):  # or the launching process has said it
        for notice in loaded.notices:
            click.echo(f"note: {notice}")

    from qhybrid.cli.main import quiet_libraries
    from qhybrid.training.preflight import preflight, settle
    from qhybrid.training.processes import is_launched, place

    going_on = resume == "auto"
    with loaded.placing():
        settled = settle(loaded, resume=going_on)
        if dry_run:
            _dry_run(settled)
            return
        if not is_launched():
            preflight(settled, base_folder=loaded.folder, resume=going_on, overwrite=overwrite)
            if settled.distributed.processes > 1:
                from qhybrid.training.launch import launch

                flags = [*(["--resume", "auto"] if going_on else []), *(["--overwrite"] if overwrite else [])]
                raise SystemExit(launch(["sft", *flags, "--", recipe, *overrides], settled.distributed.processes))
    quiet_libraries()
    from rich.console import Console
    from rich.table import Table

    from qhybrid.training.sft import run_sft
    from qhybrid.training.summary import summary_rows

    console = Console()
    result = run_sft(loaded, resume=going_on, overwrite=overwrite, console=console)
    if not result.figures or not place().is_main:
        return
    for name, one in (result.tasks or {"": result}).items():
        table = Table(show_header=False, box=None, title=name or None, title_justify="left")
        for row, value in summary_rows(one.figures):
            table.add_row(row, value)
        console.print(table)
        console.print(f"adapter  {one.run.adapter}", highlight=False, soft_wrap=True)


def _dry_run(recipe: Recipe) -> None:
    """Show the plan for this machine. Exit code 1 if it does not fit."""
    from qhybrid.base.facts import model_facts
    from qhybrid.cli.main import print_error, quiet_libraries
    from qhybrid.errors import ModelError

    try:
        facts = model_facts(recipe.model)
    except ModelError as error:
        raise ModelError(error.message, hint="qhybrid plan takes a config.json with --config") from None
    quiet_libraries()
    from qhybrid.cli import plan_text
    from qhybrid.errors import MemoryPlanError
    from qhybrid.training.memory import hardware_of, limit_vram
    from qhybrid.training.planning import plan_as_it_is, plan_run

    hardware = hardware_of(recipe)
    notice = limit_vram(recipe.memory.vram)
    if notice:
        click.echo(f"note: {notice}")
    try:
        planned, plan = plan_run(recipe, facts.spec, hardware)
    except MemoryPlanError as error:
        plan = plan_as_it_is(recipe, facts.spec, hardware)
        plan_text.show(recipe, plan, facts)
        print_error(error.message)
        raise SystemExit(1) from None
    plan_text.show(planned, plan, facts)
