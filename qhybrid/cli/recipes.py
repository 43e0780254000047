"""`qhybrid recipes list | show | copy | check | schema`: all without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.errors import ModelError, QhybridError, RecipeError

if TYPE_CHECKING:
    from qhybrid.architecture.spec import ModelSpec
    from qhybrid.recipe.schema import ModelSection


@click.group("recipes")
def command() -> None:
    """List, show, copy and check recipes."""


@command.command("list")
def list_recipes() -> None:
    """List the recipes that come with qhybrid."""
    from qhybrid.recipe.shipped import find_shipped, shipped_names, title

    names = shipped_names()
    width = max(map(len, names), default=0)
    for name in names:
        path = find_shipped(name)
        click.echo(f"{name.ljust(width)}  {title(path) if path else ''}")


@command.command("show")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--layout", is_flag=True, help="Show which adapter every module gets, instead of the recipe.")
@click.option("--config", type=click.Path(), help="A config.json or model folder for --layout.")
@click.option("--json", "as_json", is_flag=True, help="Print the layout as JSON.")
def show(recipe: str, overrides: tuple[str, ...], layout: bool, config: str | None, as_json: bool) -> None:
    """Print RECIPE with every default filled in, or its layout."""
    from qhybrid.recipe.load import dump_recipe, load_recipe, resolve

    loaded = load_recipe(recipe, overrides)
    for notice in loaded.notices:
        click.echo(f"note: {notice}", err=True)
    if not layout:
        if config or as_json:
            raise RecipeError("--config and --json belong to --layout")
        click.echo(dump_recipe(resolve(loaded.recipe)), nl=False)
        return
    from qhybrid.architecture.bands import build_layout

    spec = _spec(loaded.recipe.model, config)
    if any(own.ranks is not None for own in (loaded.recipe, *loaded.recipe.tasks)):
        click.echo("note: data decides the ranks when the run begins; these are those before it", err=True)
    if not loaded.recipe.tasks:
        with loaded.placing():
            built = build_layout(loaded.recipe, spec)
        click.echo(built.to_json() if as_json else built.to_text(), nl=not as_json)
        return
    from qhybrid.recipe.tasks import adapter_recipes, of_task

    layouts = {}
    for name, own in adapter_recipes(loaded.recipe).items():
        with loaded.placing(), of_task(name):
            layouts[name] = build_layout(own, spec)
    if as_json:
        click.echo(json.dumps({name: json.loads(layout.to_json()) for name, layout in layouts.items()}))
    else:
        click.echo("\n\n".join(f"{name}\n{layout.to_text()}" for name, layout in layouts.items()))


def _spec(model: ModelSection, config: str | None) -> ModelSpec:
    """The shape that --config names, else that of the recipe's model."""
    from qhybrid.architecture.spec import read_spec
    from qhybrid.base.facts import model_facts
    from qhybrid.base.locate import find_local, model_folder

    if config is not None and Path(config).is_file() and not config.endswith(".json"):
        raise ModelError(f"{config} is not a config.json")
    try:
        return model_facts(model, config).spec
    except ModelError:
        files = find_local(model) if config is None else None
        if files is None or files.kind != "gguf":
            raise
    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    return read_spec(model_folder(model))  # its config comes with its first conversion


@command.command("copy")
@click.argument("name")
@click.argument("target", default=".", type=click.Path())
def copy(name: str, target: str) -> None:
    """Copy the shipped recipe NAME to TARGET (a file or a folder), to change it; its data files come along."""
    from qhybrid.recipe.load import load_recipe
    from qhybrid.recipe.shipped import find_shipped, shipped_names

    source = find_shipped(name)
    if source is None:
        raise RecipeError(f"there is no shipped recipe {name!r}", hint=f"there are: {', '.join(shipped_names())}")
    path = Path(target)
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise RecipeError(f"{path} exists already", hint="choose another name; nothing was changed")
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent}")
    recipe = load_recipe(str(source)).recipe
    sections = [each.data for each in (*recipe.tasks, recipe)]
    beside = {source.path for data in sections for source in (*data.sources, *data.eval_sources)}
    shutil.copyfile(source, path)
    click.echo(f"wrote {path}")
    for name in sorted(name for name in beside if (source.parent / name).is_file()):
        data = path.parent / name
        if data.exists():
            click.echo(f"kept  {data}, which exists already")
            continue
        data.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, data)
        click.echo(f"wrote {data}")


@command.command("check")
@click.argument("files", nargs=-1, required=True)
def check(files: tuple[str, ...]) -> None:
    """Check recipe FILES: keys, types, values, that sections agree, and what they name on this machine.

    Data files must be there, and the bands must fit the model if it is a folder on this machine.
    """
    from qhybrid.cli.main import print_error
    from qhybrid.recipe.load import load_recipe
    from qhybrid.training.preflight import check_inputs

    failed = 0
    for file in files:
        try:
            loaded = load_recipe(file)
            check_inputs(loaded.recipe, loaded.folder)
        except QhybridError as error:
            print_error(str(error))
            failed += 1
            continue
        for notice in loaded.notices:
            click.echo(f"note: {notice}")
        click.echo(f"{file}: ok")
    if failed:
        raise SystemExit(RecipeError.exit_code)


@command.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from qhybrid.recipe.schema import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))
