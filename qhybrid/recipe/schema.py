"""The recipe's sections as frozen pydantic models: every key, its type, its default and its limits."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qhybrid.recipe.distributed import DistributedSection
from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.section import Section
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.units import parse_bytes

Kind = Literal["lora", "rslora", "dora", "adalora"]
Dtype = Literal["bfloat16", "float16", "float32"]
AttnImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Method = Literal["nf4", "none"]

# Published ratios for LLaMA-class models are 2 to 4 (LoRA+, arXiv 2402.12354).
DEFAULT_LORAPLUS_RATIO = 4.0

# Of target_modules; the names that it is matched against have some 20 characters.
_LONGEST_PATTERN = 300
_LONGEST_LAYERS = 1000  # every layer of a large model by its number

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _or(*alternatives: dict[str, Any]) -> Any:
    """Tell the JSON schema about the short forms that a field also takes."""

    def widen(schema: dict[str, Any]) -> None:
        full = dict(schema)
        schema.clear()
        schema["anyOf"] = [full, *alternatives]

    return Field(json_schema_extra=widen)


# One source needs no list, and a path alone needs no mapping.
_ONE_SOURCE = ({"type": "string"}, {"type": "object"})


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


class AdaLoraSection(Section):
    """AdaLoRA's schedule and constants (arXiv 2303.10512).

    A step count below 1 is a fraction of all optimizer steps; 1 and above is a number of steps.
    """

    init_rank: Annotated[int, Field(ge=1)] | None = None  # 1.5 times the target rank when left out
    warmup: Annotated[float, Field(ge=0)] = 0.1  # t_i: steps at the initial budget
    final: Annotated[float, Field(ge=0)] = 0.3  # t_f: length of the last phase, at the target budget
    interval: Annotated[int, Field(ge=1)] | None = None  # ΔT; a twentieth of the decay when left out
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    regularizer_weight: Annotated[float, Field(ge=0)] = 0.1  # gamma
    regularizer_in_scores: bool = False  # the paper's scores: of the whole objective, not of the task alone

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.warmup < 1 and self.final < 1 and self.warmup + self.final >= 1:
            raise ValueError("warmup and final together leave no part of the run to allocate in")
        if self.regularizer_in_scores and self.regularizer_weight == 0:
            raise ValueError("regularizer_in_scores has no effect with regularizer_weight 0")
        return self


class BandSection(Section):
    """One band: the layers it takes, and the adapter that every target module in them gets."""

    # Left out, it is named after its layers or its place in the list.
    band: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")] = "band"
    layers: Annotated[str, Field(min_length=1, max_length=_LONGEST_LAYERS), _or({"type": "integer"})] = (
        "all"  # "0-9", "0,3,5-7", "30%-70%", "bottom", "middle", "top" or "all"
    )
    kind: Kind = "lora"
    rank: Annotated[int, Field(ge=1, le=8192)] = 16  # AdaLoRA: the average rank at the end
    alpha: Annotated[float, Field(gt=0)] | None = None  # twice the rank when left out
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(strict=False), _or({"type": "string"})] = ("all-linear",)
    init: Literal["kaiming", "gaussian"] | None = None  # of A; B starts at zero. AdaLoRA has its own.
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0  # B's learning rate over A's
    # How the planner may lower the rank when the memory does not suffice (memory.on_exceed: cap_rank).
    min_rank: Annotated[int, Field(ge=1)] | None = None  # 4, or the rank where that is less
    rank_multiple: Annotated[int, Field(ge=1)] | None = None  # steps of the rank: 4 if the rank is a multiple of 4
    rank_weight: Annotated[float, Field(ge=0, le=10)] = 1.0  # 2 shrinks twice as fast as 1, 0 never
    adalora: AdaLoraSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if str(values.get("kind", "")).lower() in ("lora+", "loraplus"):
            values["kind"] = "lora"
            values.setdefault("loraplus_lr_ratio", DEFAULT_LORAPLUS_RATIO)
        if isinstance(values.get("layers"), int) and not isinstance(values["layers"], bool):
            values["layers"] = str(values["layers"])
        targets = values.get("target_modules")
        if isinstance(targets, str):
            values["target_modules"] = (targets,)
        return values

    @field_validator("target_modules")
    @classmethod
    def _targets_are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(not pattern for pattern in value):
            raise ValueError("name at least one module, or 'all-linear'")
        for pattern in value:
            if len(pattern) > _LONGEST_PATTERN:
                raise ValueError(f"a target of {len(pattern):,} characters is longer than {_LONGEST_PATTERN}")
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except (re.error, OverflowError) as error:  # OverflowError: a repetition of 10^11
                    raise ValueError(f"{excerpt(pattern)} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if 0 < self.rank_weight < 0.1:
            raise ValueError("rank_weight is 0 or at least 0.1")
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError(f"min_rank {self.min_rank} is above the rank {self.rank}")
        if self.kind == "dora" and self.dropout > 0:
            raise ValueError(
                "a dora band needs dropout 0: with dropout the base product must be computed a second time"
            )
        if self.kind == "adalora":
            if self.loraplus_lr_ratio != 1:
                raise ValueError("loraplus_lr_ratio has no meaning for adalora: P, Λ and Q share one rate")
            if self.init is not None:
                raise ValueError("init has no effect on adalora, which starts from N(0, 0.02²) and Λ = 0")
            if self.init_rank < self.rank:
                raise ValueError(f"adalora.init_rank {self.init_rank} is below the target rank {self.rank}")
        elif self.adalora is not None:
            raise ValueError(f"the adalora settings have no effect on kind {self.kind!r}")
        return self

    @property
    def resolved_alpha(self) -> float:
        """alpha, or twice the rank where the recipe leaves it out."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def smallest_rank(self) -> int:
        """The rank that the planner does not go below."""
        return self.min_rank or min(4, self.rank)

    @property
    def rank_step(self) -> int:
        """The rank is capped in steps of this many."""
        return self.rank_multiple or (4 if self.rank % 4 == 0 else 1)

    @property
    def schedule(self) -> AdaLoraSection:
        """AdaLoRA's settings, with the defaults where the recipe leaves them out."""
        return self.adalora or AdaLoraSection()

    @property
    def init_rank(self) -> int:
        """The rank that the matrices are built with: above the target for AdaLoRA, else the rank."""
        if self.kind != "adalora":
            return self.rank
        return self.schedule.init_rank or max(self.rank + 1, (3 * self.rank) // 2)


class SourceSection(Section):
    """One data source: a JSON, JSONL, CSV or Parquet file, or a data set on the hub."""

    path: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = "auto"
    columns: dict[str, str] = Field(default_factory=dict)  # our name: the file's name
    split: str = "train"  # hub data sets only
    subset: str | None = None  # hub data sets only: the configuration's name
    weight: Annotated[float, Field(gt=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None  # the first rows only


class DataSection(Section):
    """What to train and evaluate on."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1, strict=False), _or(*_ONE_SOURCE)]
    eval_sources: Annotated[tuple[SourceSection, ...], Field(strict=False), _or(*_ONE_SOURCE)] = ()
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # held out of `sources` by seeded choice
    mixture: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    chat_template: str | None = None  # "chatml", "alpaca", or a .jinja file; the tokenizer's when left out
    system_prompt: str | None = None  # for conversations that have none
    max_dropped_fraction: Fraction = 0.05

    @model_validator(mode="before")
    @classmethod
    def _one_source_needs_no_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for key in ("sources", "eval_sources"):
            given = values.get(key)
            if isinstance(given, (str, dict)):
                given = [given]
            if isinstance(given, (list, tuple)):
                values[key] = [{"path": item} if isinstance(item, str) else item for item in given]
        return values

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> Self:
        if self.eval_sources and self.eval_fraction:
            raise ValueError("give eval_sources or eval_fraction, not both")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none")
        if any(source.weight is not None for source in self.eval_sources):
            raise ValueError("weight has no effect on eval_sources: every row is used once")
        return self


class MemorySection(Section):
    """The memory that a run may use."""

    vram: str | None = None  # such as "24GiB"; caps what this process may take of the GPU
    on_exceed: Literal["cap_rank", "error", "ignore"] = "cap_rank"  # when the plan does not fit into it
    # With training.gradient_checkpointing: the layers that are checkpointed, as in a band's layers, or bands by
    # name ("middle+top"); all of them when left out.
    checkpoint_layers: Annotated[str | None, Field(max_length=_LONGEST_LAYERS), _or({"type": "integer"})] = None

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


class Recipe(Section):
    """What one run does: frozen, validated, with every default filled in."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    adapters: Annotated[tuple[BandSection, ...], Field(min_length=1, strict=False)]
    data: DataSection
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    distributed: DistributedSection = DistributedSection()
    output_dir: Annotated[str, Field(min_length=1)]

    @field_validator("output_dir")
    @classmethod
    def _home_is_spelt_out(cls, value: str) -> str:
        _possible(value)
        return os.path.expanduser(value)

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
    def _processes_are_one_batch(self) -> Self:
        if self.distributed.processes > 1 and not self.training.average_tokens_across_devices:
            raise ValueError(
                "training.average_tokens_across_devices: false weighs the tokens of several processes unequally"
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
    def _name_the_bands(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("adapters"), (list, tuple)):
            return values
        bands = []
        for index, band in enumerate(values["adapters"]):
            if isinstance(band, dict) and "band" not in band:
                layers = band.get("layers", "all")
                name = layers if isinstance(layers, str) and layers.isalpha() else f"band{index}"
                band = {"band": name, **band}
            bands.append(band)
        return {**values, "adapters": bands}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        counts = Counter(band.band for band in self.adapters)
        doubled = sorted(name for name, count in counts.items() if count > 1)
        if doubled:
            raise ValueError(f"two bands are called {doubled[0]!r}; give each its own name")
        if self.data.chat_template and self.training.chat_template_path:
            raise ValueError("data.chat_template and training.chat_template_path both name a template")
        has_eval = bool(self.data.eval_sources) or self.data.eval_fraction > 0
        training = self.training
        if training.fp16 and self.model.dtype != "float16":
            raise ValueError("training.fp16 needs model.dtype: float16")
        if training.bf16 and self.model.dtype != "bfloat16":
            raise ValueError("training.bf16 needs model.dtype: bfloat16")
        if training.eval_strategy != "no" and not has_eval:
            raise ValueError("training.eval_strategy needs data.eval_sources or data.eval_fraction")
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
