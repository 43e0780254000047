"""The recipe's sections as frozen pydantic models: every key, its type, its default and its limits."""

from __future__ import annotations

import os
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from qhybrid.recipe.band import LONGEST_LAYERS, BandSection, named_bands
from qhybrid.recipe.data import DataSection
from qhybrid.recipe.data import SourceSection as SourceSection
from qhybrid.recipe.distributed import DistributedSection
from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.monitoring import MonitoringSection
from qhybrid.recipe.ranks import DataRanks, Schedule, expand_rank_names
from qhybrid.recipe.section import Section, or_also
from qhybrid.recipe.stage_checks import check_stages
from qhybrid.recipe.stages import Stages
from qhybrid.recipe.sweep import SweepSection
from qhybrid.recipe.tasks import OWN_SECTIONS, TaskSection, check_tasks, fill_tasks
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.units import parse_bytes

Dtype = Literal["bfloat16", "float16", "float32"]
AttnImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Method = Literal["nf4", "none"]


def checkpointing_settings(training: TrainingSection) -> dict[str, Any]:
    """transformers' settings of activation checkpointing, under its newer or its older name."""
    for given in (training.activation_checkpointing_kwargs, training.gradient_checkpointing_kwargs):
        if isinstance(given, dict):
            return given
    return {}


def _possible(path: str | None) -> str | None:
    """`path`, unless no file can have that name: the system would say so with a ValueError, somewhere later."""
    if path is not None and "\0" in path:
        raise ValueError(f"{excerpt(path)} holds a NUL character")
    return path


class ModelSection(Section):
    """The base model: a Hugging Face folder, a hub id, a GGUF file or `package:NAME/FILE`."""

    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Dtype = "bfloat16"  # weights that are not quantised, and the compute type
    adapter_dtype: Dtype | None = None  # A, B, P and Q; as dtype when left out, but float32 for float16
    attn_implementation: AttnImplementation = "sdpa"
    tokenizer: str | None = None  # another folder or hub id, when the model's own tokenizer is not wanted

    _path_is_possible = field_validator("path", "tokenizer")(_possible)

    @property
    def resolved_adapter_dtype(self) -> Dtype:
        """The dtype that A, B, P and Q train in. float16 has too few exponents for Adam's second moment."""
        return self.adapter_dtype or ("float32" if self.dtype == "float16" else self.dtype)

    @model_validator(mode="after")
    def _adapters_can_train(self) -> Self:
        if self.adapter_dtype == "float16":
            raise ValueError("adapter_dtype float16 cannot be trained: use float32")
        if self.dtype == "float16" and self.adapter_dtype == "bfloat16":
            raise ValueError("adapter_dtype bfloat16 cannot be trained with dtype float16: use float32")
        return self


class QuantizationSection(Section):
    """How the base weights are stored. NF4 with double quantisation is QLoRA (arXiv 2305.14314)."""

    method: Method = "nf4"
    double_quant: bool = True


class MemorySection(Section):
    """The memory that a run may use."""

    vram: str | None = None  # such as "24GiB"; caps what this process may take of the GPU
    on_exceed: Literal["cap_rank", "error", "ignore"] = "cap_rank"  # when the plan does not fit into it
    # With training.gradient_checkpointing: the layers that are checkpointed, as in a band's layers, or bands by
    # name ("middle+top"); all of them when left out.
    checkpoint_layers: Annotated[str | None, Field(max_length=LONGEST_LAYERS), or_also({"type": "integer"})] = None

    @field_validator("checkpoint_layers", mode="before")
    @classmethod
    def _one_layer_is_a_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("vram", mode="before")
    @classmethod
    def _is_an_amount(cls, value: Any) -> Any:
        if isinstance(value, (str, int, float)):
            if len(str(value)) > 40:  # a number of so many digits would not fit into a float
                raise ValueError(f"{excerpt(value)} is not an amount of memory; write for example 24GiB")
            parse_bytes(str(value))
        return value


def _either_one_or_tasks(schema: dict[str, Any]) -> None:
    """Tell the JSON schema what `fill_tasks` makes up for."""
    schema["required"] = [name for name in schema["required"] if name not in OWN_SECTIONS]
    schema["anyOf"] = [{"required": ["adapters", "data"]}, {"required": ["tasks"]}]


class Recipe(Section):
    """What one run does: frozen, validated, with every default filled in."""

    model_config = ConfigDict(json_schema_extra=_either_one_or_tasks)

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    adapters: Annotated[tuple[BandSection, ...], Field(min_length=1, strict=False), or_also({"type": "object"})]
    # One budget spread over all bands. Also to be written as adapters: {schedule: …, bands: […]}.
    schedule: Schedule | None = None
    ranks: DataRanks | None = None
    data: DataSection
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    distributed: DistributedSection = DistributedSection()
    stages: Stages = ()
    monitoring: MonitoringSection = MonitoringSection()
    sweep: SweepSection | None = None  # what `qhybrid ranks sweep` runs; `qhybrid sft` leaves it alone
    # Several adapters on one base model. What they may have of their own, the sections above say for the others.
    tasks: Annotated[tuple[TaskSection, ...], Field(strict=False)] = ()
    shared: BandSection | None = None  # an adapter that all tasks train beside their own
    output_dir: Annotated[str, Field(min_length=1)]

    @field_validator("output_dir")
    @classmethod
    def _home_is_spelt_out(cls, value: str) -> str:
        _possible(value)
        return os.path.expanduser(value)

    @property
    def rank_budget(self) -> int | None:
        """Σ r·(in + out) of all bands, where the recipe gives it as one number."""
        spread = self.schedule or self.ranks
        return spread.budget if spread else None

    @property
    def adapter_dtype(self) -> Dtype:
        """The dtype that A, B, P and Q train in: fp32 under ZeRO, which would step on fp32 copies anyway."""
        if self.distributed.zero_stage:
            return "float32"
        return self.model.resolved_adapter_dtype

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes and accumulated micro-batches."""
        training = self.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return batch * self.distributed.processes

    @model_validator(mode="after")
    def _tasks_agree(self) -> Self:
        check_tasks(self)
        return self

    @model_validator(mode="after")
    def _processes_are_one_batch(self) -> Self:
        if self.distributed.processes > 1 and not self.training.average_tokens_across_devices:
            raise ValueError(
                "training.average_tokens_across_devices: false weighs the tokens of several processes unequally"
            )
        return self

    @model_validator(mode="after")
    def _the_preconditioner_has_its_gradients(self) -> Self:
        training = self.training
        if training.preconditioner is None:
            if training.preconditioner_delta != type(training).model_fields["preconditioner_delta"].default:
                raise ValueError("training.preconditioner_delta has no effect without training.preconditioner")
            return self
        if any(band.kind == "adalora" and band.adalora_settings.regularizer_in_scores for band in self.adapters):
            raise ValueError(
                "training.preconditioner does not go with adalora.regularizer_in_scores: the regulariser is added "
                "after it, and the scores are taken before"
            )
        return self

    @model_validator(mode="after")
    def _zero_can_train_it(self) -> Self:
        if self.distributed.zero_stage == 0:
            return self
        if self.model.adapter_dtype not in (None, "float32"):
            raise ValueError(
                f"model.adapter_dtype {self.model.adapter_dtype} does not go with distributed.zero_stage "
                f"{self.distributed.zero_stage}: adapters train in float32 under ZeRO"
            )
        if self.model.dtype == "float16":
            raise ValueError(
                "model.dtype float16 needs loss scaling, which does not go with ZeRO here: use bfloat16 or "
                "float32, or distributed.zero_stage 0"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        return expand_rank_names(named_bands(fill_tasks(values)))

    @model_validator(mode="after")
    def _one_way_to_ranks(self) -> Self:
        if self.schedule and self.ranks:
            raise ValueError("schedule and ranks both decide the ranks; give one of them")
        if self.schedule or self.ranks:
            name = "schedule" if self.schedule else "ranks"
            for band in self.adapters:
                if band.schedule is not None:
                    raise ValueError(f"{name} is over all bands, and band {band.band!r} has a schedule of its own")
                if self.rank_budget is not None and "rank" in band.model_fields_set:
                    raise ValueError(
                        f"{name}.budget and the rank of band {band.band!r} both decide the ranks; remove one"
                    )
        if self.ranks:
            for band in self.adapters:
                if band.kind == "adalora":
                    raise ValueError(
                        f"ranks {self.ranks.method}: band {band.band!r} of kind adalora finds its own"
                    )
                if band.init == "pissa":
                    raise ValueError(
                        f"ranks {self.ranks.method} decides after the base is loaded, and init: pissa of band "
                        f"{band.band!r} must be known before"
                    )
                if self.ranks.initialise and band.init is not None:
                    raise ValueError(
                        f"ranks {self.ranks.method} initialises too, and init of band {band.band!r} has no effect "
                        "beside it; remove it, or set ranks.initialise: false"
                    )
        return self

    @model_validator(mode="after")
    def _stages_can_happen(self) -> Self:
        check_stages(self)
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        counts = Counter(band.band for band in self.adapters)
        doubled = sorted(name for name, count in counts.items() if count > 1)
        if doubled:
            raise ValueError(f"adapters: two bands are called {doubled[0]!r}; give each its own name")
        if self.data.chat_template and self.training.chat_template_path:
            raise ValueError("data.chat_template and training.chat_template_path both name a template")
        has_eval = bool(self.data.eval_sources) or self.data.eval_fraction > 0
        training = self.training
        if self.sweep and not has_eval:
            raise ValueError("sweep needs data.eval_sources or data.eval_fraction")
        if self.sweep and self.sweep.prune and training.eval_strategy != "steps":
            raise ValueError("sweep.prune needs training.eval_strategy: steps, and eval_steps")
        if training.fp16 and self.model.dtype != "float16":
            raise ValueError("training.fp16 needs model.dtype: float16")
        if training.bf16 and self.model.dtype != "bfloat16":
            raise ValueError("training.bf16 needs model.dtype: bfloat16")
        if training.eval_strategy != "no" and not has_eval:
            raise ValueError("training.eval_strategy needs data.eval_sources or data.eval_fraction")
        if training.eval_on_start and not has_eval:
            raise ValueError("training.eval_on_start needs data.eval_sources or data.eval_fraction")
        if training.eval_strategy == "no" and training.early_stopping_patience is not None:
            raise ValueError("training.early_stopping_patience needs training.eval_strategy")
        if training.eval_strategy == "no" and training.save_strategy == "best":
            raise ValueError("training.save_strategy best needs training.eval_strategy")
        if training.eval_strategy == "no" and training.load_best_model_at_end:
            raise ValueError("training.load_best_model_at_end needs training.eval_strategy")
        if training.early_stopping_threshold and training.early_stopping_patience is None:
            raise ValueError("training.early_stopping_threshold has no effect without early_stopping_patience")
        if training.eval_steps is not None and training.eval_strategy != "steps":
            raise ValueError("training.eval_steps has no effect without training.eval_strategy: steps")
        if training.packing_strategy != "bfd" and not (training.packing or training.eval_packing):
            raise ValueError("training.packing_strategy has no effect without training.packing")
        if training.metric_for_best_model not in (None, "loss", "eval_loss"):
            raise ValueError("training.metric_for_best_model: only eval_loss is measured during training")
        checkpointing = training.gradient_checkpointing
        if training.activation_checkpointing is not None:
            checkpointing = training.activation_checkpointing
        if self.memory.checkpoint_layers is not None and not checkpointing:
            raise ValueError("memory.checkpoint_layers needs training.gradient_checkpointing: true")
        if self.memory.checkpoint_layers is not None and checkpointing_settings(training).get("every_n_layers"):
            raise ValueError("memory.checkpoint_layers and every_n_layers both name the layers; give one of them")
        if training.packing and training.max_length is None:
            raise ValueError("training.packing needs training.max_length")
        if training.padding_free and not training.packing and training.max_length is not None:
            raise ValueError("training.padding_free needs training.packing, or max_length: null")
        return self
