"""The recipe's section tasks: several adapters on one base model, trained in one process."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from qhybrid.errors import QhybridError
from qhybrid.recipe.band import BandSection, named_bands
from qhybrid.recipe.data import DataSection
from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.ranks import DataRanks, Schedule, expand_rank_names
from qhybrid.recipe.section import Section, or_also
from qhybrid.recipe.stages import Stages
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.recipe.unfold import OVER_ALL_BANDS

if TYPE_CHECKING:
    from qhybrid.recipe.schema import Recipe

FOLDER = "tasks"  # of the runs of the tasks, in the run folder
SHARED = "shared"  # in the place of a task's name
# A task's own; what it leaves out, the recipe says for all. But adapters of its own come with ranks of their own.
OWN_SECTIONS = ("adapters", *OVER_ALL_BANDS, "stages", "data", "training")
_BY_KEY = ("data", "training")  # a task may give some of their keys; the others are taken as a whole

# The libraries keep these once for a process.
ONE_FOR_ALL = (
    "use_cpu", "bf16", "fp16", "tf32", "full_determinism", "use_liger_kernel", "liger_kernel_config",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "log_level", "log_level_replica",
)  # fmt: skip
# One optimizer state moves the shared factors, and one checkpoint holds all tasks.
ONE_FOR_SHARED = (
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "save_total_limit",
)  # fmt: skip
_ONE_PARAMETER_AT_A_TIME = ("adam", "paged_adam", "lion", "paged_lion", "sgd", "adagrad", "rmsprop", "ademamix")


class TaskSection(Section):
    """One task: its name, how often its steps come, and what it does not share with the others."""

    # Editors see the file, where the recipe says for all what a task leaves out.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(required=["name"]))

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its optimizer steps among those of the others
    adapters: Annotated[tuple[BandSection, ...], Field(min_length=1, strict=False), or_also({"type": "object"})]
    schedule: Schedule | None = None
    ranks: DataRanks | None = None
    stages: Stages = ()
    data: DataSection
    training: TrainingSection = TrainingSection()

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        return expand_rank_names(named_bands(values))


def fill_tasks(values: Any) -> Any:
    """Raw values of a recipe in which every task has all its sections; the recipe's own are those of the first."""
    if not isinstance(values, dict) or not values.get("tasks"):
        if isinstance(values, dict) and values.get("tasks") == []:
            raise _refused(("tasks",), "is empty; leave it out to train one adapter")
        return values
    given = values["tasks"]
    if not isinstance(given, (list, tuple)) or not all(isinstance(task, dict) for task in given):
        return values
    tasks = [dict(task) for task in given]
    for index, task in enumerate(tasks):
        for section in OWN_SECTIONS:
            whole, own = values.get(section), task.get(section)
            if own is None and whole is not None and not _replaces(given[index], (section,)):
                task[section] = whole
            elif section in _BY_KEY and isinstance(own, dict) and isinstance(whole, dict):
                task[section] = {**whole, **own}
    filled = {section: tasks[0][section] for section in OWN_SECTIONS if section in tasks[0]}
    if isinstance(values.get("shared"), dict):
        filled["shared"] = {"band": "shared", **values["shared"]}
    for_all = {key: value for key, value in values.items() if key not in OWN_SECTIONS}
    return {**for_all, **filled, "tasks": tasks}


def without_effect(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The first setting for all tasks that each of them replaces."""
    tasks = values.get("tasks")
    if not tasks or not isinstance(tasks, (list, tuple)):
        return None
    for section in OWN_SECTIONS:
        for path in _paths(values, section):
            if all(_replaces(task, path) for task in tasks):
                return path
    return None


def take_over(values: Mapping[str, Any], path: tuple[int | str, ...]) -> Any:
    """What a task has at `path` as long as it says nothing itself, to be changed for this task alone.

    With adapters the task gets the ranks that come with them as its own.
    """
    inner = path[2:]
    if path[:1] != ("tasks",) or len(inner) != (2 if inner[:1] and inner[0] in _BY_KEY else 1):
        return None
    task = values["tasks"][path[1]]
    if _replaces(task, inner):
        return None
    if inner[0] == "adapters":
        left_out = [name for name in OVER_ALL_BANDS if task.get(name) is None and name in values]
        task |= {name: copy.deepcopy(values[name]) for name in left_out}
    found: Any = values
    for part in inner:
        found = found.get(part) if isinstance(found, Mapping) else None
    return copy.deepcopy(found)


def told_at(values: Mapping[str, Any], path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where the recipe says what stands at `path` once its tasks are filled: in the task, or for all of them.

    Args:
        values: of the recipe, before `fill_tasks`.
    """
    tasks = values.get("tasks")
    if not tasks or not path or not isinstance(tasks, (list, tuple)):
        return path
    if path[0] in OWN_SECTIONS:
        return ("tasks", 0, *path) if _gives(tasks[0], path) or not _gives(values, path) else path
    if path[0] == "tasks" and len(path) > 2 and path[2] in OWN_SECTIONS:
        task, inner = tasks[int(path[1])], path[2:]
        if not _gives(task, inner) and _gives(values, inner):
            return inner
    return path


def task_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each task, by its name: what a run of this task alone would be given."""
    return {
        task.name: recipe.model_copy(
            update={
                **{section: getattr(task, section) for section in OWN_SECTIONS},
                "tasks": (),
                "shared": None,
                "output_dir": str(Path(recipe.output_dir) / FOLDER / task.name),
            }
        )
        for task in recipe.tasks
    }


@contextlib.contextmanager
def of_task(name: str) -> Iterator[None]:
    """Say of every error in the block which task it is of."""
    try:
        yield
    except QhybridError as error:
        named(error, name)
        raise


def named(error: QhybridError, task: str) -> None:
    """Say which task an error is of, before what it says itself of the place."""
    error.where = f"task {task}" if error.where is None else f"task {task}: {error.where}"
    if error.at:
        error.at = (SHARED, *error.at[2:]) if task == SHARED else ("tasks", task, *error.at)


def adapter_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """`task_recipes`, and before them, as SHARED, what all tasks share, as if it were alone."""
    if recipe.shared is None:
        return task_recipes(recipe)
    alone = {"adapters": (recipe.shared,), "schedule": None, "ranks": None, "stages": ()}
    shared = recipe.model_copy(update={**alone, "tasks": (), "shared": None})
    return {SHARED: shared, **task_recipes(recipe)}


def with_adapter_recipes(recipe: Recipe, recipes: Mapping[str, Recipe]) -> Recipe:
    """Undo `adapter_recipes`, after all were changed alike in what belongs to all."""
    tasks = tuple(
        task.model_copy(update={section: getattr(recipes[task.name], section) for section in OWN_SECTIONS})
        for task in recipe.tasks
    )
    first = recipes[tasks[0].name]
    own = {section: getattr(first, section) for section in OWN_SECTIONS}
    band = recipes[SHARED].adapters[0] if recipe.shared is not None else None
    return recipe.model_copy(update={**own, "model": first.model, "tasks": tasks, "shared": band})


def check_tasks(recipe: Recipe) -> None:
    """Refuse tasks that cannot be trained together, or one by one.

    Raises:
        ValidationError: with the place of what is wrong.
    """
    if not recipe.tasks:
        if recipe.shared is not None:
            raise _refused(("shared",), "has no effect without tasks")
        return
    if not recipe.distributed.is_single:
        raise _refused(("distributed",), "tasks train in one process without ZeRO: leave distributed out")
    if recipe.sweep is not None:
        raise _refused(("sweep",), "a sweep compares adapters of one task: leave tasks or sweep out")
    names = [task.name for task in recipe.tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _refused(
                ("tasks", index, "name"), f"two tasks are called {name!r}; each has a folder of its own"
            )
    for index, (task, own) in enumerate(zip(recipe.tasks, task_recipes(recipe).values(), strict=True)):
        trackers = task.training.report_to or "none"
        if not {"none", "tensorboard"}.issuperset([trackers] if isinstance(trackers, str) else trackers):
            message = "tasks can report to tensorboard alone: the other trackers know one run in a process"
            raise _refused(("tasks", index, "training", "report_to"), message)
        try:
            type(recipe).model_validate({name: getattr(own, name) for name in type(recipe).model_fields})
        except ValidationError as error:
            problem = error.errors()[0]
            found = problem.get("ctx", {}).get("error", problem["msg"])
            raise _refused(("tasks", index), found) from None
    for place, band in _bands(recipe).items():
        if band.init == "pissa":
            raise _refused((*place, "init"), "pissa takes a part out of the weights, and tasks have the same ones")
    _require_one(recipe, ONE_FOR_ALL, "is one for the whole process")
    if recipe.shared is not None:
        _check_shared(recipe, recipe.shared)


def _check_shared(recipe: Recipe, shared: BandSection) -> None:
    if len(recipe.tasks) < 2:
        raise _refused(("shared",), "has no effect with a single task")
    for index, task in enumerate(recipe.tasks):
        if task.name == SHARED:
            raise _refused(("tasks", index, "name"), "beside shared no task can have that name")
    for place, band in _bands(recipe).items():
        if band.kind not in ("lora", "rslora"):
            message = f"{band.kind} makes no sum with another adapter: beside shared there are lora and rslora"
            raise _refused((*place, "kind"), message)
    _require_one(recipe, ONE_FOR_SHARED, "is one for all beside shared")
    for index, task in enumerate(recipe.tasks):
        training = task.training
        at = ("tasks", index, "training")
        if task.ranks is not None:
            message = "data cannot decide the ranks beside shared, where the adapter is two; a schedule can"
            raise _refused(("tasks", index, "ranks"), message)
        if task.stages:
            raise _refused(("tasks", index, "stages"), "beside shared an adapter stays as it begins")
        if training.preconditioner is not None:
            raise _refused((*at, "preconditioner"), "beside shared there are two adapters in one step")
        if not training.optim.startswith(_ONE_PARAMETER_AT_A_TIME):
            raise _refused((*at, "optim"), f"{training.optim} cannot share its states; use an AdamW beside shared")
        if training.load_best_model_at_end or training.save_strategy == "best":
            name = "load_best_model_at_end" if training.load_best_model_at_end else "save_strategy"
            raise _refused(
                (*at, name), "beside shared there is no best of one task: the others have gone on since"
            )
        if training.save_only_model:
            raise _refused((*at, "save_only_model"), "beside shared a checkpoint is for all to go on from")


def _bands(recipe: Recipe) -> dict[tuple[int | str, ...], BandSection]:
    """Every band, by its place in the recipe."""
    bands: dict[tuple[int | str, ...], BandSection] = {}
    if recipe.shared is not None:
        bands["shared",] = recipe.shared
    for index, task in enumerate(recipe.tasks):
        bands |= {("tasks", index, "adapters", number): band for number, band in enumerate(task.adapters)}
    return bands


def _require_one(recipe: Recipe, names: tuple[str, ...], why: str) -> None:
    for name in names:
        values = [getattr(task.training, name) for task in recipe.tasks]
        for index, value in enumerate(values):
            if value != values[0]:
                message = f"{why}, and task {recipe.tasks[0].name!r} has {excerpt(values[0])}"
                raise _refused(("tasks", index, "training", name), message)


def _paths(values: Mapping[str, Any], section: str) -> list[tuple[str, ...]]:
    """Where a task can replace what the recipe says for all in a section."""
    given = values.get(section)
    if given is None:
        return []
    return [(section, key) for key in given] if section in _BY_KEY and isinstance(given, dict) else [(section,)]


def _gives(values: Any, path: tuple[int | str, ...]) -> bool:
    """Whether the recipe, or a task, says itself what stands at `path`."""
    given = values.get(path[0]) if isinstance(values, Mapping) else None
    if given is None:
        return False
    return path[0] not in _BY_KEY or len(path) == 1 or (isinstance(given, dict) and path[1] in given)


def _replaces(task: Any, path: tuple[int | str, ...]) -> bool:
    """Whether a task does without what the recipe says for all at `path`."""
    return _gives(task, path) or (path[0] in OVER_ALL_BANDS and _gives(task, ("adapters",)))


def _refused(place: tuple[int | str, ...], found: str | Exception) -> ValidationError:
    error = ValueError(found) if isinstance(found, str) else found
    details = InitErrorDetails(type="value_error", loc=place, input=None, ctx={"error": error})
    return ValidationError.from_exception_data("Recipe", [details])
