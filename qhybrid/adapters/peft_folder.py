"""Ordinary peft adapter folders: written from plain factors, and read into them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from qhybrid.adapters.peft_patterns import LONGEST, MOST_KEYS, first_of, require_key
from qhybrid.adapters.plain import PlainModule
from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
_NAME = re.compile(
    rf"{re.escape(_PREFIX)}(?P<module>[\w.]+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})(\.weight)?"
)
_LARGEST = 1e6  # of ranks and alphas, far beyond what is trained
# Settings of peft that change what A and B mean, or add other tensors; what they must be to be read here.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Initialisations after which the base model is as it was. PiSSA is read, and changes it.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


def plain_peft_config(modules: Sequence[PlainModule], base_model: str | None) -> LoraConfig:
    """The peft configuration of plain modules; alpha is s·r, so that peft's alpha/r is s."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        use_dora=any(module.magnitude is not None for module in modules),
        r=max(module.rank for module in modules),
        lora_alpha=max(module.rank for module in modules),
        target_modules=[module.module for module in modules],
        rank_pattern={module.module: module.rank for module in modules},
        alpha_pattern={module.module: module.scaling * module.rank for module in modules},
    )


def plain_peft_state(modules: Sequence[PlainModule]) -> dict[str, Tensor]:
    """The tensors of plain modules under the names of peft's adapter_model.safetensors."""
    state: dict[str, Tensor] = {}
    for module in modules:
        for name, part in _PARTS.items():
            value = getattr(module, part)
            if value is not None:
                state[f"{_PREFIX}{module.module}.{name}"] = value
    return state


def write_peft_folder(modules: Sequence[PlainModule], base_model: str, folder: Path) -> None:
    """Write plain modules, all LoRA or all DoRA, as an ordinary peft adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, plain_peft_state(modules), {"format": "pt"})
    plain_peft_config(modules, base_model).save_pretrained(str(folder))


def read_peft_folder(folder: Path) -> tuple[tuple[PlainModule, ...], dict[str, Any]]:
    """The factors of a LoRA, rsLoRA, DoRA or PiSSA folder of peft, and its configuration.

    Raises:
        AdapterError: a file that is missing or damaged, another method of peft, settings that are not read here,
            or tensors that do not fit together.
    """
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS}",
            hint="an adapter_model.bin can run code when opened: convert it where you trust it"
            if (folder / "adapter_model.bin").is_file()
            else None,
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in read_tensors(file, AdapterError).items():
        match = _NAME.fullmatch(name)
        if match is None or len(name) > LONGEST:
            raise AdapterError(
                f"{name:.{LONGEST}} belongs to no linear layer's A, B or magnitudes",
                where=str(file),
                hint="adapters of embeddings, and what peft trains beside them, are not read here",
            )
        found.setdefault(match["module"], {})[_PARTS[match["part"]]] = value
    if not found:
        raise AdapterError("it holds no adapter", where=str(file))
    modules = tuple(_module(name, parts, config, str(file)) for name, parts in found.items())
    return modules, config


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise AdapterError(f"cannot be read: {error}", where=str(file)) from None
    if kind != "LORA":
        raise AdapterError(f"its method is {kind}", where=str(file), hint="LoRA, rsLoRA, DoRA and PiSSA are read")
    for key, allowed in _MUST_BE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise AdapterError(f"it has {key} {config[key]!r}, which is not read here", where=str(file))
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and not str(init).startswith("pissa"):
        raise AdapterError(
            f"it was initialised by {init}, which changes the base model",
            where=str(file),
            hint="have peft convert it to LoRA on the original base when saving "
            "(path_initial_model_for_weight_conversion)",
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"its {key} is {config[key]!r}, which is no name", where=str(file))
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        _require_size(config.get(key), key, str(file))
        config[pattern] = config.get(pattern) or {}
        if not isinstance(config[pattern], dict):
            raise AdapterError(f"its {pattern} is no mapping", where=str(file))
        if len(config[pattern]) > MOST_KEYS:
            raise AdapterError(f"its {pattern} has more than {MOST_KEYS} keys", where=str(file))
        for names, value in config[pattern].items():
            require_key(names, pattern, str(file))
            _require_size(value, f"{pattern} of {names!r}", str(file))
    return config


def _require_size(value: Any, name: str, where: str) -> None:
    if type(value) not in (int, float) or not 0 < value <= _LARGEST:
        hint = f"it must be a number above 0 and at most {_LARGEST:,.0f}"
        raise AdapterError(f"its {name} is {value!r:.40}", where=where, hint=hint)


def _module(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> PlainModule:
    a, b, magnitude = (parts.get(part) for part in _PARTS.values())
    if a is None or b is None:
        raise AdapterError(f"{name} has {'B' if a is None else 'A'} alone", where=where)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise AdapterError(f"A and B of {name} are {tuple(a.shape)} and {tuple(b.shape)}", where=where)
    if (magnitude is not None) != bool(config.get("use_dora")) or (
        magnitude is not None and magnitude.shape != b.shape[:1]
    ):
        raise AdapterError(f"the magnitudes of {name} do not go with its configuration", where=where)
    rank = a.shape[0]
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    told = first_of(ranks, name, config["r"])
    if told != rank:
        raise AdapterError(f"{name} has rank {rank}, its configuration says {told}", where=where)
    alpha = first_of(alphas, name, config["lora_alpha"])
    return PlainModule(name, a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank), magnitude)
