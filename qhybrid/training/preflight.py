"""What can be refused at once: before torch is loaded, anything is downloaded and the run folder is touched."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qhybrid.adapters.schedule import plan_schedules
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import read_spec
from qhybrid.base.locate import find_local
from qhybrid.data.readers import check_local_source, with_whole_paths
from qhybrid.errors import RecipeError
from qhybrid.recipe.load import LoadedRecipe, resolve
from qhybrid.recipe.schema import Recipe
from qhybrid.training.claim import check_claim
from qhybrid.training.planning import with_earlier_caps
from qhybrid.training.processes import with_processes
from qhybrid.training.stage_plan import check_stage_plan, stage_steps


def settle(loaded: LoadedRecipe, *, resume: bool = False) -> Recipe:
    """The recipe with nothing left open, and with local data files named from the root.

    Args:
        resume: a run of it may be there already, whose ranks were capped; they stay as they are.
    """
    recipe = resolve(with_processes(loaded.recipe))
    recipe = recipe.model_copy(update={"data": with_whole_paths(recipe.data, loaded.folder)})
    return with_earlier_caps(recipe) if resume else recipe


def preflight(recipe: Recipe, *, base_folder: Path, resume: bool, overwrite: bool) -> None:
    """Check the output folder, the local data files, and the bands where the model's config is at hand.

    Raises:
        QhybridError: what `run_sft` would raise later.
    """
    if recipe.distributed.zero_stage:
        check_deepspeed()
    check_claim(recipe, resume=resume, overwrite=overwrite)
    check_inputs(recipe, base_folder)


def check_deepspeed() -> None:
    """Refuse ZeRO where DeepSpeed is not there.

    Raises:
        RecipeError: with the command that installs it.
    """
    if find_spec("deepspeed") is None:
        raise RecipeError(
            "distributed.zero_stage needs DeepSpeed, which is not installed",
            hint="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed; or set distributed.zero_stage to 0",
        )


def check_inputs(recipe: Recipe, base_folder: Path) -> None:
    """Check the local data files, and the bands where the model's config is at hand.

    Raises:
        QhybridError: what `run_sft` would raise later.
    """
    for source in (*recipe.data.sources, *recipe.data.eval_sources):
        check_local_source(source, base_folder)
    files = find_local(recipe.model)
    if files is not None and files.kind == "folder":
        layout = build_layout(recipe, read_spec(files.path))
        check_stage_plan(recipe, layout)
        if recipe.training.max_steps > 0:
            plan_schedules(recipe.adapters, layout, recipe.training.max_steps)
            stage_steps(recipe, layout, recipe.training.max_steps)
