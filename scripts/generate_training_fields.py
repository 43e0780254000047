#!/usr/bin/env python
"""Writes qhybrid/recipe/training_fields.py from the installed trl: every field of SFTConfig by its own name.

The recipe must be checked without importing torch, so the list is kept as code; a contract test compares it
with the installed trl. Run this again after an upgrade of trl or transformers.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from importlib.metadata import version
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTConfig

TARGET = Path(__file__).parent.parent / "qhybrid" / "recipe" / "training_fields.py"

# Where our default differs from trl's, and why.
OUR_DEFAULTS = {
    "learning_rate": (2e-4, "QLoRA's rate for 7B and 13B models (arXiv 2305.14314, table 9)"),
    "logging_nan_inf_filter": (False, "a NaN must be seen"),
}
# Fields that another part of the recipe or the command line owns: refused here, with the place to go to.
OWNED = {
    "output_dir": "set output_dir at the top level of the recipe",
    "resume_from_checkpoint": "resume with: qhybrid sft RECIPE --resume auto",
    "deepspeed": "use the section distributed",
    "fsdp": "use the section distributed",
    "fsdp_config": "use the section distributed",
    "parallelism_config": "use the section distributed",
    "local_rank": "the launcher sets it",
    "model_init_kwargs": "use the section model",
    "trust_remote_code": "code from a model repository is never run",
    "do_train": "qhybrid sft always trains",
    "do_eval": "set eval_strategy",
    "do_predict": "use: qhybrid eval",
    "dataset_kwargs": "use the section data",
    "dataset_text_field": "use data.sources[].columns",
    "pad_token": "the tokenizer's pad token is used",
    "hub_token": "log in with: hf auth login (a token does not belong in a recipe)",
    "ignore_data_skip": "a resumed run would take other rows",
    "auto_find_batch_size": "it restarts training with weights that are already changed",
    "push_to_hub": "it would push checkpoints, not the adapter; use: hf upload NAME RUN/adapter",
    "hub_model_id": "use: hf upload NAME RUN/adapter",
    "hub_strategy": "use: hf upload NAME RUN/adapter",
    "hub_always_push": "use: hf upload NAME RUN/adapter",
    "hub_private_repo": "use: hf upload NAME RUN/adapter",
    "hub_revision": "use: hf upload NAME RUN/adapter",
    "enable_jit_checkpoint": "its checkpoints cannot be verified",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "disable_tqdm": "qhybrid draws the progress",
    "label_names": "the labels come with the data",
    "include_for_metrics": "only the loss is evaluated during training",
    "batch_eval_metrics": "only the loss is evaluated during training",
    "prediction_loss_only": "only the loss is evaluated during training",
    "eval_do_concat_batches": "only the loss is evaluated during training",
    "length_column_name": "the data has no such column",
    "restore_callback_states_from_checkpoint": "a resumed run restores its own state",
}
EXTRA = """
    # Not in SFTConfig: stop when metric_for_best_model has not improved for this many evaluations.
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    # Not in SFTConfig: multiplies the adapters' gradients by the inverse of (metric + delta·I), arXiv 2402.02347.
    preconditioner: Literal["riemannian"] | None = None
    preconditioner_delta: Annotated[float, Field(ge=1e-8)] = 0.01
"""
POSITIVE = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
NOT_NEGATIVE = {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"}
BOUNDED = {"num_train_epochs": "gt=0", "seed": "ge=0, lt=2**32", "max_length": "ge=1", "logging_steps": "gt=0"}
TRACKERS = f"Literal[{', '.join(map(repr, ('all', 'none', *sorted(INTEGRATION_TO_CALLBACK))))}]"
CHOICES = {
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "loss_type": ("nll", "dft", "chunked_nll"),
    "truncation_mode": ("keep_start", "keep_end"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}


def as_source(annotation: object) -> str:
    """The annotation as source code that a pydantic model understands."""
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"Literal[{', '.join(repr(member.value) for member in annotation)}]"
    if isinstance(annotation, type) and annotation.__module__ == "builtins" and not typing.get_args(annotation):
        return "dict[str, Any]" if annotation is dict else annotation.__name__
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [argument for argument in arguments if argument is not type(None)]
        enums = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
        if enums:  # "SomeEnum | str": the text is the enum's value
            members = [m for m in members if m is not str]
        parts = [as_source(member) for member in members]
        return " | ".join([*parts, "None"] if type(None) in arguments else parts)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (list, dict):
        inner = ", ".join("Any" if argument is typing.Any else as_source(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    return "Any"


def field_line(field: dataclasses.Field, annotation: object) -> str:
    if field.name in OUR_DEFAULTS:
        default, comment = OUR_DEFAULTS[field.name]
    else:
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc]
        comment = None
    if isinstance(default, enum.Enum):
        default = default.value
    source = as_source(annotation)
    if field.name in CHOICES:
        source = f"Literal[{', '.join(map(repr, CHOICES[field.name]))}]"
    if field.name == "report_to":
        source = "Tracker | list[Tracker] | None"
    if field.name in POSITIVE:
        source = f"Annotated[{source}, Field(ge=1)]"
    elif field.name in BOUNDED:
        source = f"Annotated[{source}, Field({BOUNDED[field.name]})]"
    elif field.name in NOT_NEGATIVE:
        source = f"Annotated[{source}, Field(ge=0)]"
    line = f"    {field.name}: {source} = {default!r}"
    return f"{line}  # {comment}" if comment else line


def main() -> None:
    hints = typing.get_type_hints(SFTConfig)
    lines = [field_line(field, hints[field.name]) for field in dataclasses.fields(SFTConfig) if field.init]
    owned = "".join(f"    {name!r}: {hint!r},\n" for name, hint in OWNED.items())
    TARGET.write_text(
        f'''"""Every field of trl's SFTConfig as a pydantic section. Generated: do not edit.

Written by scripts/generate_training_fields.py from trl {version("trl")}
and transformers {version("transformers")}. Names, types and defaults are trl's own, except where a comment says
why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Fields that are set elsewhere, and where.
OWNED_ELSEWHERE = {{
{owned}}}

# Fields that are ours and not trl's.
OUR_FIELDS = (
    "early_stopping_patience", "early_stopping_threshold", "preconditioner", "preconditioner_delta",
)  # fmt: skip

Tracker = {TRACKERS}


def _without_owned(schema: dict[str, Any]) -> None:
    """Editors need not offer what is refused."""
    for name in OWNED_ELSEWHERE:
        del schema["properties"][name]


class TrainingSection(BaseModel):
    """Training arguments, by the names that trl gives them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_without_owned,
    )

{chr(10).join(lines)}
{EXTRA}
    @field_validator(*OWNED_ELSEWHERE, mode="before")
    @classmethod
    def _owned_elsewhere(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if value != cls.model_fields[name].default:
            raise ValueError(f"cannot be set here: {{OWNED_ELSEWHERE[name]}}")
        return value
''',
        encoding="utf-8",
    )
    print(f"wrote {len(lines)} fields to {TARGET}")


if __name__ == "__main__":
    main()
