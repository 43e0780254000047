"""A trainer whose adapters change while it trains: the layout of the moment, and bands that stand still."""

from __future__ import annotations

from pathlib import Path

from qhybrid.adapters.expand import freeze, take_ranks
from qhybrid.adapters.info import LAYOUT
from qhybrid.architecture.layout import Layout
from qhybrid.recipe.schema import checkpointing_settings
from qhybrid.training.backward import BackwardEnd
from qhybrid.training.stage_plan import stage_steps
from qhybrid.training.stages import Change, Stages
from qhybrid.training.state import read_numbers
from qhybrid.training.trainer_checkpoints import CheckpointingTrainer


def read_layout(checkpoint: Path) -> Layout:
    """The layout of a checkpoint's adapters.

    Raises:
        LayoutError: it is damaged.
    """
    return Layout.from_json((checkpoint / LAYOUT).read_bytes(), str(checkpoint / LAYOUT))


class StagedTrainer(CheckpointingTrainer):
    """Has the stages of the recipe begin, where it has any."""

    stages: Stages | None = None
    _backward_end: BackwardEnd | None = None

    def _start_stages(self, max_steps: int, resume_from_checkpoint: str | None) -> None:
        if not self.recipe.stages:
            return
        steps = stage_steps(self.recipe, self.layout, max_steps)
        self.stages = Stages(self.recipe, steps, self.model, self.layout)
        if resume_from_checkpoint is not None:
            self.stages.load(read_numbers(Path(resume_from_checkpoint))["stages"])

    def begin_stages(self) -> list[Change]:
        """Do what is due between two optimizer steps, and return it."""
        assert self.stages is not None
        self.layout, changes = self.stages.advance(
            self.state.global_step, self.model, self.layout, self._base_optimizer()
        )
        if any(change.froze or change.unfroze for change in changes):
            self.hold_frozen()
        return changes

    def hold_frozen(self) -> None:
        """Train all but the frozen bands, and no longer go back through layers that have nothing else."""
        assert self.stages is not None
        freeze(self.model, self.layout, self.stages.frozen)
        for allocator in self.allocators:
            allocator.paused = allocator.band in self.stages.frozen
        if self._backward_end is None:
            reentrant = bool(checkpointing_settings(self.recipe.training).get("use_reentrant"))
            self._backward_end = BackwardEnd(self.model, reentrant=reentrant)
        self._backward_end.move_to(self.lowest_trained_layer())

    def lowest_trained_layer(self) -> int:
        """The layer at which the backward pass ends."""
        frozen = self.stages.frozen if self.stages else ()
        return min(row.layer for row in self.layout if row.band not in frozen)

    def _load_best_model(self) -> None:
        layout = read_layout(self._best_folder())
        if layout != self.layout:  # it was saved before a stage began
            take_ranks(self.model, layout)
            self.layout = layout
        super()._load_best_model()
