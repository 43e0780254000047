"""Names that users of axolotl and LLaMA-Factory know, translated to ours with a notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qhybrid.errors import RecipeError
from qhybrid.recipe.excerpt import excerpt
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.recipe.unfold import unfold_adapters, unfold_arms
from qhybrid.recipe.yaml_source import Path, Source

SECTIONS = (
    "model", "quantization", "adapters", "schedule", "ranks", "stages", "data", "training", "memory",
    "distributed", "monitoring", "sweep", "output_dir",
)  # fmt: skip

# Their name at the top level: our path. "adapters" means every band of the recipe, "sources" every data source.
TOP_LEVEL: dict[str, tuple[str, ...]] = {
    # axolotl
    "base_model": ("model", "path"),
    "base_model_config": ("model", "path"),
    "tokenizer_config": ("model", "tokenizer"),
    "micro_batch_size": ("training", "per_device_train_batch_size"),
    "eval_batch_size": ("training", "per_device_eval_batch_size"),
    "num_epochs": ("training", "num_train_epochs"),
    "lr_scheduler": ("training", "lr_scheduler_type"),
    "optimizer": ("training", "optim"),
    "sequence_len": ("training", "max_length"),
    "sample_packing": ("training", "packing"),
    "eval_sample_packing": ("training", "eval_packing"),
    "val_set_size": ("data", "eval_fraction"),
    "datasets": ("data", "sources"),
    "test_datasets": ("data", "eval_sources"),
    "attn_implementation": ("model", "attn_implementation"),
    "lora_r": ("adapters", "rank"),
    "lora_alpha": ("adapters", "alpha"),
    "lora_dropout": ("adapters", "dropout"),
    "lora_target_modules": ("adapters", "target_modules"),
    "loraplus_lr_ratio": ("adapters", "loraplus_lr_ratio"),
    # LLaMA-Factory
    "model_name_or_path": ("model", "path"),
    "model_revision": ("model", "revision"),
    "lora_rank": ("adapters", "rank"),
    "lora_target": ("adapters", "target_modules"),
    "cutoff_len": ("training", "max_length"),
    "dataset": ("data", "sources"),
    "eval_dataset": ("data", "eval_sources"),
    "val_size": ("data", "eval_fraction"),
    "max_samples": ("sources", "limit"),
    "max_seq_length": ("training", "max_length"),
    "evaluation_strategy": ("training", "eval_strategy"),
    # both, and trl
    "warmup_ratio": ("training", "warmup_steps"),  # below 1 it is a fraction there, too
    "sources": ("data", "sources"),
    "chat_template": ("data", "chat_template"),
}

# Settings whose value decides another setting of ours: their name -> what to do with the value.
Settings = list[tuple[tuple[str, ...], Any]]


def _kind_if(kind: str) -> Callable[[Any], Settings]:
    return lambda value: [(("adapters", "kind"), kind)] if value else []


def _adapter(value: Any) -> Settings:
    if value in ("lora", "qlora"):
        return [(("quantization", "method"), "nf4" if value == "qlora" else "none")]
    raise RecipeError(f"adapter {excerpt(value)} is not a kind of qhybrid", hint="use the list adapters")


def _bits(value: Any) -> Settings:
    if value == 4:
        return [(("quantization", "method"), "nf4")]
    raise RecipeError(f"{excerpt(value)} bits are not supported", hint="quantization.method is nf4 or none")


def _must_be(name: str, *allowed: Any) -> Callable[[Any], Settings]:
    def check(value: Any) -> Settings:
        if value not in allowed:
            raise RecipeError(f"{name}: {excerpt(value)} is not what qhybrid does", hint=f"remove {name}")
        return []

    return check


def _template(value: Any) -> Settings:
    raise RecipeError(
        f"template {excerpt(value)}: qhybrid uses the chat template that comes with the tokenizer",
        hint="remove template; for a base model without one set data.chat_template: chatml (or alpaca)",
    )


def _hint(name: str, hint: str) -> Callable[[Any], Settings]:
    def check(value: Any) -> Settings:
        if value:
            raise RecipeError(f"{name} is not a key of qhybrid", hint=hint)
        return []

    return check


_FRACTION_OF_A_RUN = "steps: 0.25 does it four times in the run"

CONVERTED: dict[str, Callable[[Any], Settings]] = {
    "adapter": _adapter,
    "load_in_4bit": lambda value: [(("quantization", "method"), "nf4" if value else "none")],
    "load_in_8bit": _must_be("load_in_8bit", False, None),
    "quantization_bit": _bits,
    "use_dora": _kind_if("dora"),
    "lora_use_dora": _kind_if("dora"),
    "peft_use_dora": _kind_if("dora"),
    "use_rslora": _kind_if("rslora"),
    "peft_use_rslora": _kind_if("rslora"),
    "template": _template,
    "finetuning_type": _must_be("finetuning_type", "lora"),
    "stage": _must_be("stage", "sft"),
    "do_train": _must_be("do_train", True),
    "flash_attention": lambda value: [(("model", "attn_implementation"), "flash_attention_2")] if value else [],
    "bf16": lambda value: [(("model", "dtype"), "bfloat16" if value in (True, "auto") else "float32")],
    "fp16": lambda value: [(("model", "dtype"), "float16")] if value else [],
    "quantization_method": _must_be("quantization_method", "bitsandbytes", "bnb"),
    "lora_target_linear": lambda value: [(("adapters", "target_modules"), ["all-linear"])] if value else [],
    "train_on_inputs": lambda value: [(("training", "completion_only_loss"), False)] if value else [],
    "group_by_length": lambda value: (
        [(("training", "train_sampling_strategy"), "group_by_length")] if value else []
    ),
    "evals_per_epoch": _hint("evals_per_epoch", f"training.eval_strategy: steps with eval_{_FRACTION_OF_A_RUN}"),
    "saves_per_epoch": _hint("saves_per_epoch", f"training.save_strategy: steps with save_{_FRACTION_OF_A_RUN}"),
    "overwrite_output_dir": _hint("overwrite_output_dir", "use the option --overwrite"),
    "special_tokens": _hint("special_tokens", "training.eos_token names another end token than the tokenizer's"),
}
# Theirs, and nothing that a result would depend on.
WITHOUT_COUNTERPART = (
    "pad_to_sequence_len", "dataset_prepared_path", "overwrite_cache", "preprocessing_num_workers", "plot_loss",
    "strict", "debug", "local_rank", "is_llama_derived_model", "wandb_project", "wandb_entity", "wandb_watch",
    "wandb_name", "wandb_log_model", "tokenizer_type", "model_type", "xformers_attention", "flash_optimum",
)  # fmt: skip

# Inside a band: peft's names.
IN_BAND = {
    "name": "band",
    "r": "rank",
    "lora_rank": "rank",
    "lora_r": "rank",
    "target_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target_modules",
    "layers_to_transform": "layers",
    "init_lora_weights": "init",
    "type": "kind",
}
IN_ADALORA = {
    "init_r": "init_rank",
    "tinit": "warmup",
    "tfinal": "final",
    "deltaT": "interval",
    "orth_reg_weight": "regularizer_weight",
}
IN_DATA = {"val_size": "eval_fraction", "val_set_size": "eval_fraction", "datasets": "sources"}
IN_SOURCE = {"type": "format", "name": "subset"}
# Names that SFTConfig had once
IN_TRAINING = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
}
# Words that are near to no name, but whose meaning is plain
MEANT = {
    "lr": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "bs": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "seq_len": "training.max_length",
    "grad_accum": "training.gradient_accumulation_steps",
    "lora": "adapters",
    "peft": "adapters",
}
IN_MODEL = {"base_model": "path", "model_name_or_path": "path", "name": "path", "torch_dtype": "dtype"}
# axolotl's names for formats of rows
FORMATS = {"chat_template": "messages", "completion": "text", "input_output": "prompt_completion"}


def settings_of(key: str, value: Any) -> Settings | None:
    """Our settings for the foreign top-level `key`; None where the key is not known.

    Raises:
        RecipeError: a setting that qhybrid cannot do.
    """
    if key in WITHOUT_COUNTERPART:
        return []
    if key in TOP_LEVEL:
        return [] if value is None else [(TOP_LEVEL[key], value)]
    if key in CONVERTED:
        return [] if value is None else CONVERTED[key](value)
    field = TrainingSection.model_fields.get(key)
    if field is None:
        return None
    return [] if value is None and field.default is None else [(("training", key), value)]


def own_name(path: Path, key: str) -> str:
    """Our name for `key` where it stands in the section at `path`."""
    tables = {
        ("model", 1): IN_MODEL, ("data", 1): IN_DATA, ("data", 3): IN_SOURCE, ("training", 1): IN_TRAINING,
        ("adapters", 2): IN_BAND, ("adapters", 3): IN_ADALORA,
    }  # fmt: skip
    return tables.get((str(path[0]), len(path)), {}).get(key, key) if path else key


def translate(source: Source) -> tuple[dict[str, Any], dict[Path, Path], list[str]]:
    """Translate known foreign names in `source`.

    Returns:
        The values under our names; for each of our paths that was filled from a foreign name, the path in
        the file it came from (so that errors name the right line); and notices of what was translated.

    Raises:
        RecipeError: a foreign setting that contradicts ours or that qhybrid cannot do.
    """
    values: dict[str, Any] = {}
    origins: dict[Path, Path] = {}
    notices: list[str] = []
    in_every: dict[str, dict[str, tuple[str, Any]]] = {"adapters": {}, "sources": {}}
    own_fields: list[str] = []
    left_out: list[str] = []
    refused: list[RecipeError] = []

    def put(target: tuple[str, ...], value: Any, key: str) -> None:
        where = source.where((key,))
        if target == ("training", key):
            own_fields.append(key)
        else:
            notices.append(f"{where}: {key} is read as {'.'.join(target)}")
        if target[0] in in_every:
            other, before = in_every[target[0]].get(target[1], (key, value))
            if before != value:
                raise RecipeError(f"{other} and {key} say different things about {target[1]}", where=where)
            in_every[target[0]][target[1]] = (key, value)
            return
        section = values.setdefault(target[0], {})
        if not isinstance(section, dict):
            raise RecipeError(f"{target[0]} must be a mapping", where=source.where((target[0],)))
        if section.get(target[1], value) != value:
            other = ".".join(map(str, origins.get(target, target)))
            raise RecipeError(f"{key} and {other} say different things", where=where, hint="remove one of them")
        section[target[1]] = value
        origins[target] = (key,)

    for key, value in source.values.items():
        if key in SECTIONS and value is not None:  # an empty section leaves everything at its default
            values[key] = dict(value) if isinstance(value, dict) else value
    for key, value in source.values.items():
        if key in SECTIONS or (key == "bf16" and value is False and source.values.get("fp16")):
            continue
        try:
            settings = settings_of(key, value)
        except RecipeError as error:
            refused.append(RecipeError(error.message, hint=error.hint, where=source.where((key,))))
            continue
        if settings is None and value is not None:
            values[key] = value  # unknown: the schema says so, with the nearest name
            continue
        if settings is None or (key in WITHOUT_COUNTERPART and value):
            left_out.append(key)
            continue
        for target, converted in settings:
            put(target, converted, key)

    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise RecipeError("\n".join(f"{error.where}: {error.message} ({error.hint})" for error in refused))
    rename_inside(values, origins, notices, source)
    if in_every["adapters"]:
        values.setdefault("adapters", [{"band": "all", "layers": "all"}])
    _fill(values.get("adapters"), ("adapters",), in_every["adapters"], origins, source)
    data = values.get("data")
    if isinstance(data, dict):
        if in_every["sources"]:
            data["sources"] = as_sources(data.get("sources"))
        _fill(data.get("sources"), ("data", "sources"), in_every["sources"], origins, source)
    if own_fields:
        notices.append(f"{source.name}: read as fields of training: {', '.join(own_fields)}")
    if left_out:
        notices.append(f"{source.name}: without a counterpart here, and left out: {', '.join(left_out)}")
    return values, origins, notices


def as_sources(given: Any) -> Any:
    """Data sources in their long form."""
    items = [given] if isinstance(given, (str, dict)) else given
    if not isinstance(items, list):
        return items
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _rename(section: Any, names: dict[str, str], path: Path, origins: dict, notices: list, source: Source):
    """A copy of `section` in which known foreign keys carry our names."""
    if not isinstance(section, dict):
        return section
    renamed: dict[str, Any] = {}
    for key, value in section.items():
        new = names[key] if key in names and names[key] not in section else str(key)
        if new != key:
            where = source.where((*path, key))
            notices.append(f"{where}: {key} is read as {'.'.join(map(str, (*path, new)))}")
            origins[(*path, new)] = (*path, key)
        renamed[new] = value
    return renamed


def rename_inside(values: dict, origins: dict, notices: list, source: Source) -> None:
    """Give foreign names inside the sections our names, in place."""
    for section, names in (("model", IN_MODEL), ("data", IN_DATA), ("training", IN_TRAINING)):
        if section in values:
            values[section] = _rename(values[section], names, (section,), origins, notices, source)
    if isinstance(values.get("adapters"), dict):
        unfold_adapters(values, (), origins, source)
    unfold_arms(values, origins, source)
    if isinstance(values.get("adapters"), list):
        bands = []
        for index, band in enumerate(values["adapters"]):
            band = _rename(band, IN_BAND, ("adapters", index), origins, notices, source)
            if isinstance(band, dict) and "adalora" in band:
                path = ("adapters", index, "adalora")
                band["adalora"] = _rename(band["adalora"], IN_ADALORA, path, origins, notices, source)
            bands.append(band)
        values["adapters"] = bands
    data = values.get("data")
    for key in ("sources", "eval_sources"):
        if isinstance(data, dict) and isinstance(data.get(key), list):
            renamed = []
            for index, item in enumerate(data[key]):
                item = _rename(item, IN_SOURCE, ("data", key, index), origins, notices, source)
                form = item.get("format") if isinstance(item, dict) else None
                if isinstance(form, str) and form in FORMATS:
                    item["format"] = FORMATS[form]
                renamed.append(item)
            data[key] = renamed


def _fill(items: Any, path: Path, settings: dict[str, tuple[str, Any]], origins: dict, source: Source) -> None:
    """Flat settings fill what the bands, or the data sources, leave out."""
    if not isinstance(items, list):
        return
    for name, (key, value) in settings.items():
        without = [index for index, item in enumerate(items) if isinstance(item, dict) and name not in item]
        if items and not without:
            raise RecipeError(
                f"{key} has no effect: all of {'.'.join(map(str, path))} have their own {name}",
                where=source.where((key,)),
                hint=f"remove {key}",
            )
        for index in without:
            items[index][name] = value
            origins[(*path, index, name)] = (key,)
