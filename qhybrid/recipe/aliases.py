"""Names that users of axolotl and LLaMA-Factory know, translated to ours with a notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qhybrid.errors import RecipeError
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.recipe.yaml_source import Path, Source

# Their name at the top level: our path. A path into `adapters` means every band of the recipe.
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
    # both, and trl
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
    raise RecipeError(f"adapter {value!r} is not a kind of qhybrid", hint="use the list adapters")


def _bits(value: Any) -> Settings:
    if value == 4:
        return [(("quantization", "method"), "nf4")]
    raise RecipeError(f"{value} bits are not supported", hint="quantization.method is nf4 or none")


def _must_be(name: str, *allowed: Any) -> Callable[[Any], Settings]:
    def check(value: Any) -> Settings:
        if value not in allowed:
            raise RecipeError(f"{name}: {value!r} is not what qhybrid does", hint=f"remove {name}")
        return []

    return check


def _template(value: Any) -> Settings:
    raise RecipeError(
        f"template {value!r}: qhybrid uses the chat template that comes with the tokenizer",
        hint="remove template; for a base model without one set data.chat_template: chatml (or alpaca)",
    )


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
    "bf16": lambda value: [(("model", "dtype"), "bfloat16")] if value in (True, "auto") else [],
    "fp16": lambda value: [(("model", "dtype"), "float16")] if value else [],
    "quantization_method": _must_be("quantization_method", "bitsandbytes", "bnb"),
}

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
IN_MODEL = {"base_model": "path", "model_name_or_path": "path", "name": "path", "torch_dtype": "dtype"}
# axolotl's names for formats of rows
FORMATS = {"chat_template": "messages", "completion": "text", "input_output": "prompt_completion"}


def translate(source: Source) -> tuple[dict[str, Any], dict[Path, Path], list[str]]:
    """Translate known foreign names in `source`.

    Returns:
        The values under our names; for each of our paths that was filled from a foreign name, the path in
        the file it came from (so that errors name the right line); and one notice for each translation.

    Raises:
        RecipeError: a foreign setting that contradicts ours or that qhybrid cannot do.
    """
    values: dict[str, Any] = {}
    origins: dict[Path, Path] = {}
    notices: list[str] = []
    band_settings: dict[str, tuple[str, Any]] = {}

    def put(target: tuple[str, ...], value: Any, key: str) -> None:
        where = source.where((key,))
        notices.append(f"{where}: {key} is read as {'.'.join(target)}")
        if target[0] == "adapters":
            other, before = band_settings.get(target[1], (key, value))
            if before != value:
                raise RecipeError(f"{other} and {key} say different things about {target[1]}", where=where)
            band_settings[target[1]] = (key, value)
            return
        section = values.setdefault(target[0], {})
        if not isinstance(section, dict):
            raise RecipeError(f"{target[0]} must be a mapping", where=source.where((target[0],)))
        if section.get(target[1], value) != value:
            raise RecipeError(f"{key} and {'.'.join(target)} say different things", where=where)
        section[target[1]] = value
        origins[target] = (key,)

    for key, value in source.values.items():
        if key in _sections():
            values[key] = dict(value) if isinstance(value, dict) else value
    for key, value in source.values.items():
        if key in _sections():
            continue
        if key in TOP_LEVEL:
            put(TOP_LEVEL[key], value, key)
        elif key in CONVERTED:
            try:
                settings = CONVERTED[key](value)
            except RecipeError as error:
                raise RecipeError(error.message, hint=error.hint, where=source.where((key,))) from None
            for target, converted in settings:
                put(target, converted, key)
        elif key in TrainingSection.model_fields:
            put(("training", key), value, key)
        else:
            values[key] = value  # unknown: the schema says so, with the nearest name

    _rename_inside(values, origins, notices, source)
    model = values.get("model")
    if source.values.get("bf16") is False and isinstance(model, dict) and "dtype" not in model:
        put(("model", "dtype"), "float32", "bf16")  # neither half precision: what is left is single
    _apply_to_bands(values, origins, band_settings, source)
    return values, origins, notices


def _sections() -> set[str]:
    return {
        "model", "quantization", "adapters", "data", "training", "memory", "distributed", "output_dir",
    }  # fmt: skip


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


def _rename_inside(values: dict, origins: dict, notices: list, source: Source) -> None:
    for section, names in (("model", IN_MODEL), ("data", IN_DATA)):
        if section in values:
            values[section] = _rename(values[section], names, (section,), origins, notices, source)
    if isinstance(values.get("adapters"), dict):  # one band needs no list
        values["adapters"] = [values["adapters"]]
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
                if isinstance(item, dict) and item.get("format") in FORMATS:
                    item["format"] = FORMATS[item["format"]]
                renamed.append(item)
            data[key] = renamed


def _apply_to_bands(values: dict, origins: dict, settings: dict[str, tuple[str, Any]], source: Source) -> None:
    """Flat adapter settings describe one band over all layers, or fill what the bands leave out."""
    if not settings:
        return
    bands = values.setdefault("adapters", [{"band": "all", "layers": "all"}])
    if not isinstance(bands, list):
        return
    for name, (key, value) in settings.items():
        without = [index for index, band in enumerate(bands) if isinstance(band, dict) and name not in band]
        if bands and not without:
            raise RecipeError(
                f"{key} has no effect: every band of adapters has its own {name}",
                where=source.where((key,)),
                hint=f"remove {key}",
            )
        for index in without:
            bands[index][name] = value
            origins[("adapters", index, name)] = (key,)
