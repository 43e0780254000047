"""One adapter from a base model to its folder: the data, the trainer with its callbacks, and what is written when.

A run of `qhybrid sft` is one session, or one for each of its tasks.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME, TrainerState

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec, read_spec
from qhybrid.base.fingerprint import config_hash
from qhybrid.base.locate import find_local, hub_commit
from qhybrid.base.tokenizer import load_tokenizer, save_tokenizer
from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.disk import whole_folder, write_atomically
from qhybrid.errors import AllocationError, RecipeError, TrainingError
from qhybrid.planner.memory import zero_setup
from qhybrid.planner.plan import Plan
from qhybrid.ranks.decide import InitialValues
from qhybrid.recipe.schema import Recipe
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.callbacks.monitor import Monitor
from qhybrid.training.callbacks.record import RecordSteps
from qhybrid.training.callbacks.replace import DiscardReplaced
from qhybrid.training.callbacks.stages import BeginStages
from qhybrid.training.callbacks.stop import StopWhenAsked
from qhybrid.training.callbacks.watch import WatchLoss
from qhybrid.training.checkpoint import require_space
from qhybrid.training.culprits import rows_of
from qhybrid.training.data_ranks import rank_by_data
from qhybrid.training.display import NamedConsole, ProgressDisplay
from qhybrid.training.events import EventLog
from qhybrid.training.memory import is_out_of_memory
from qhybrid.training.messages import out_of_memory, told, what_is_left
from qhybrid.training.planning import checkpoint_bytes, write_plan
from qhybrid.training.processes import place
from qhybrid.training.run import Run, begin, check_base, versions
from qhybrid.training.signals import StopSignals
from qhybrid.training.stage_plan import check_stage_plan
from qhybrid.training.summary import figures_of, predicted_memory
from qhybrid.training.trainer import BandedTrainer
from qhybrid.training.trainer_stages import read_layout
from qhybrid.training.zero import deepspeed_config


@dataclass(frozen=True)
class SftResult:
    """Where the adapter lies, and the figures of the final table; of each task, where there are several."""

    run: Run
    figures: dict[str, Any]
    tasks: Mapping[str, SftResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What comes from the model's folder and the data, before anything is planned."""

    spec: ModelSpec
    tokenizer: Any
    data: PreparedData


def read_inputs(recipe: Recipe, base: Path, data_folder: Path, date: str) -> Inputs:
    """Read tokenizer and data, and look at all that needs no model before a folder is claimed.

    Args:
        base: the model's folder.
        data_folder: where relative data paths may start.
        date: what chat templates that write the date are told (ISO 8601).
    """
    spec = read_spec(base)
    check_stage_plan(recipe, build_layout(recipe, spec))
    training_arguments(recipe, Path(recipe.output_dir))
    tokenizer = load_tokenizer(recipe.model)
    return Inputs(spec, tokenizer, prepare_data(recipe, tokenizer, base_folder=data_folder, date=date))


@dataclass(frozen=True)
class Prepared:
    """All that a run begins with, before its folder is claimed."""

    recipe: Recipe
    inputs: Inputs
    layout: Layout
    plan: Plan
    expected: Plan  # for the data at hand
    deepspeed: dict[str, Any] | None

    @classmethod
    def of(cls, recipe: Recipe, inputs: Inputs, plan: Plan, expected: Plan) -> Prepared:
        """The recipe as its plan left it, with what follows from it."""
        layout = build_layout(recipe, inputs.spec)
        deepspeed = None
        if recipe.distributed.zero_stage:
            deepspeed = deepspeed_config(recipe, zero_setup(recipe, inputs.spec, layout))
        return cls(recipe, inputs, layout, plan, expected, deepspeed)


def prepared_for(prepared: Prepared, run: Run) -> Prepared:
    """What a claimed run begins with: stages and data may have changed the layout before its checkpoint."""
    return prepared if run.resume_from is None else replace(prepared, layout=read_layout(run.resume_from))


@dataclass(frozen=True)
class BaseFacts:
    """What a run folder and an adapter tell of the base model."""

    folder: Path
    commit: str | None  # of the hub
    files: Mapping[str, Any]  # size and hash of each


def base_facts(recipe: Recipe, base: Path, run: Run) -> BaseFacts:
    """Hash the weights in the folder `base`; a run that is resumed must have the very same."""
    commit = hub_commit(base) if find_local(recipe.model) is None else None
    return BaseFacts(base, commit, check_base(run, base))


def write_beginning(run: Run, prepared: Prepared, base: BaseFacts, date: str) -> None:
    """Write what is known before training."""
    require_space(run.folder, checkpoint_bytes(prepared.recipe, prepared.plan.largest))
    begin(run, prepared.recipe, prepared.inputs.data.fingerprint, base.files, date)
    write_atomically(run.layout_file, prepared.layout.to_json())
    write_plan(run, prepared.plan, prepared.expected)
    if prepared.deepspeed is not None:
        write_atomically(run.deepspeed_file, json.dumps(prepared.deepspeed, indent=2) + "\n")
    audit = json.dumps(prepared.inputs.data.audit.to_dict(), indent=2, ensure_ascii=False)
    write_atomically(run.audit_file, audit + "\n")


def adapter_info(prepared: Prepared, base: BaseFacts, date: str) -> AdapterInfo:
    """What the adapter's folder says of where it comes from."""
    recipe, path = prepared.recipe, prepared.recipe.model.path
    return AdapterInfo(
        base_model=path.partition("@")[0] if base.commit else path,  # the commit is what "@revision" was then
        base_revision=base.commit or recipe.model.revision,
        quantization=recipe.quantization.method,
        double_quant=recipe.quantization.double_quant,
        dtype=recipe.model.dtype,
        adapter_dtype=recipe.adapter_dtype,
        attn_implementation=recipe.model.attn_implementation,
        chat_template=prepared.inputs.data.chat_template,
        system_prompt=recipe.data.system_prompt,
        date=date,
        base_config_sha256=config_hash(base.folder),
        base_sha256={name: facts["sha256"] for name, facts in base.files.items()},
        versions=versions(),
    )


class Session:
    """A claimed run folder, and the training that goes on in it."""

    trainer: BandedTrainer

    def __init__(
        self,
        prepared: Prepared,
        run: Run,
        info: AdapterInfo,
        console: Console | NamedConsole,
        signals: StopSignals,
        *,
        expected: Plan | None = None,
        as_override: Callable[[str], str] = str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            expected: the plan of the process, where it holds more than this session.
            as_override: the command line's word for what a word changes in a recipe of this session alone.
            clock: seconds that this session has had.
        """
        self.prepared, self.run, self.info = prepared, run, info
        self._console, self._signals = console, signals
        self.expected = expected or prepared.expected
        self._as_override, self._clock = as_override, clock
        self._initial: InitialValues = {}
        self.events = EventLog(run.events_file if place().is_main else Path(os.devnull))
        self._predicted = predicted_memory(self.expected)
        self.events.write("plan", predicted=self._predicted, moments=self.expected.prediction.moments)

    def say(self, text: str) -> None:
        """A line on the console."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def rank_by_data(self, model: PreTrainedModel) -> None:
        """Let the data decide the ranks, where the recipe says so and no checkpoint has them. Together."""
        prepared = self.prepared
        if prepared.recipe.ranks is None or self.run.resume_from is not None:
            return
        layout, self._initial = rank_by_data(
            prepared.recipe, prepared.layout, model, prepared.inputs.data.train, self.run, self._report
        )
        self.prepared = replace(prepared, layout=layout)

    def build(self, model: PreTrainedModel, *last: TrainerCallback) -> None:
        """Attach the adapters to the base model, and make the trainer.

        Args:
            last: callbacks that come after all but the one that asks whether to stop.
        """
        recipe, layout, inputs = self.prepared.recipe, self.prepared.layout, self.prepared.inputs
        adapted = self.attach(model)
        if inputs.data.chat_template:
            inputs.tokenizer.chat_template = inputs.data.chat_template
        self.trainer = trainer = self._trainer_of(adapted)
        self._display = ProgressDisplay(
            self._console,
            line_every=int(recipe.training.logging_steps) or 1,
            initial_ranks=sum(row.rank for row in layout.of_kind("adalora")),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(AllocateRanks(trainer, self.events))
        trainer.add_callback(BeginStages(trainer, self.run, self._report))
        trainer.add_callback(Monitor(trainer, self.events, self.run.events_file))
        trainer.add_callback(RecordSteps(trainer, self.events, self._display, self._clock))
        if place().is_main:
            trainer.add_callback(DiscardReplaced(self.run))
        if recipe.training.early_stopping_patience is not None:
            trainer.add_callback(
                EarlyStoppingCallback(
                    recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold
                )
            )
        trainer.add_callback(WatchLoss(trainer, self._report))
        for callback in last:
            trainer.add_callback(callback)
        trainer.add_callback(StopWhenAsked(trainer, self._signals))

    def train(self) -> None:
        """Train to the end, or to where a signal stops it: `trainer.was_stopped` tells."""
        self._began, self._first_step, resumed = self._clock(), 0, self.run.resume_from
        if resumed is not None:
            self._first_step = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME)).global_step
        try:
            self.trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        finally:
            self._display.end()

    def finish(self) -> dict[str, Any]:
        """Save the adapter. Returns the figures of the final table.

        Raises:
            AllocationError: an AdaLoRA band never allocated.
        """
        with whole_folder(self.run.adapter) as folder:
            self.save(folder)
            save_tokenizer(self.prepared.inputs.tokenizer, folder)
        # The best checkpoint may be of an earlier stage.
        write_atomically(self.run.layout_file, self.layout.to_json())
        self._require_allocations()
        seconds = self._clock() - self._began
        figures = figures_of(self.trainer, self.events, self.run, seconds=seconds, first_step=self._first_step)
        figures |= {f"predicted_{name}": value for name, value in self._predicted.items()}
        self.events.write("end", **figures)
        return figures

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """The base model with new adapters."""
        recipe = self.prepared.recipe
        set_seed(recipe.training.seed)  # the adapters' initial values, as in trl
        dtype = getattr(torch, recipe.adapter_dtype)
        adapted = attach(model, self.prepared.layout, dtype=dtype, initial=self._initial)
        self._initial = {}  # they may be large
        return adapted

    def make_trainer(self, **settings: Any) -> BandedTrainer:
        """The trainer with these arguments."""
        return BandedTrainer(**settings)

    def save(self, folder: Path) -> None:
        """Write what was trained as an adapter folder."""
        save_adapter(self.trainer.model, self.layout, self.info, folder)

    @property
    def layout(self) -> Layout:
        """That of the adapter as it is saved."""
        return self.trainer.layout

    def stopped(self, error: BaseException) -> BaseException:
        """Write down what ended the run; the error to raise for it, which is another one where that tells more."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if place().is_main:
            name = type(error).__name__
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self.events.write(status, error=name, message=str(error))
            with contextlib.suppress(OSError):
                self.run.write_status(status, error=name)
        left = what_is_left(self.run)
        if status == "interrupted":
            self.say(left)
        if isinstance(error, Exception) and is_out_of_memory(error):
            recipe, inputs = self.prepared.recipe, self.prepared.inputs
            return out_of_memory(
                recipe, inputs.spec, self.expected, inputs.data.longest, self.run, error, self._as_override
            )
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return TrainingError(
                f"the disk is full: {error.filename or self.run.folder} could not be written",
                hint=f"make room; {left}",
            )
        return error

    def close(self) -> None:
        """Close the log of events."""
        with contextlib.suppress(OSError):
            self.events.close()

    def _report(self, event: str, **facts: Any) -> None:
        self.events.write(event, **facts)
        self.say(told(event, facts, self.expected))

    def _trainer_of(self, model: PeftModel) -> BandedTrainer:
        prepared = self.prepared
        try:
            with _tensorboard_in(self.run.folder / "tensorboard"):
                return self.make_trainer(
                    model=model,
                    recipe=prepared.recipe,
                    layout=prepared.layout,
                    find_rows=functools.partial(rows_of, data=prepared.inputs.data),
                    report=self._report,
                    args=training_arguments(prepared.recipe, self.run.checkpoints, prepared.deepspeed),
                    train_dataset=prepared.inputs.data.train,
                    eval_dataset=prepared.inputs.data.eval,
                    processing_class=prepared.inputs.tokenizer,
                )
        except (ValueError, TypeError, ImportError, AssertionError) as error:
            raise RecipeError(f"training: {' '.join(str(error).split())}") from error

    def _require_allocations(self) -> None:
        frozen = self.trainer.stages.frozen if self.trainer.stages else ()
        for allocator in self.trainer.allocators:
            if allocator.num_allocations == 0 and allocator.band not in frozen:
                schedule = allocator.schedule
                first = min(schedule.warmup_steps + schedule.interval, schedule.last_allocation)
                raise AllocationError(
                    f"band {allocator.band!r} of kind adalora never allocated: the run ended at step "
                    f"{self.trainer.state.global_step} of {schedule.total_steps}, "
                    f"the first allocation was due at step {first}",
                    hint=f"{self.run.adapter} holds the adapter at its initial rank; train longer, or shorten "
                    "adalora.warmup",
                )


@contextlib.contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Its files go to the run folder, not among the checkpoints, unless the environment says where."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.setdefault(name, str(folder))
    try:
        yield
    finally:
        if given == str(folder):
            del os.environ[name]
