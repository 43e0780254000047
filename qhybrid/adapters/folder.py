"""The adapter folder: what training saves, what qhybrid reads back, and ordinary peft folders beside it.

adapter.safetensors   every trained tensor at full rank, in its own dtype
layout.json           one row for each module
adapter.json          the base model and the versions
peft/lora, peft/dora  the same adapter for peft without qhybrid (AdaLoRA folded into LoRA, exactly)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.convert import PlainModule, plain_peft_config, plain_peft_state, to_plain
from qhybrid.adapters.dora import refresh_norms
from qhybrid.architecture.layout import Layout, first_fault
from qhybrid.base.tensor_files import write_tensors
from qhybrid.disk import write_bytes
from qhybrid.errors import AdapterError
from qhybrid.recipe.schema import AttnImplementation, Dtype, Method
from qhybrid.redaction import redacted_values

WEIGHTS, LAYOUT, INFO = "adapter.safetensors", "layout.json", "adapter.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterInfo:
    """What is needed to load an adapter again: its base model and how that was loaded."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    base_model: str  # as the recipe names it
    base_revision: str | None  # the commit, for a model from the hub
    quantization: Method
    double_quant: bool
    dtype: Dtype  # of the base model's unquantised weights
    adapter_dtype: Dtype
    attn_implementation: AttnImplementation
    chat_template: str | None = None  # what conversations were rendered with
    system_prompt: str | None = None  # for conversations that have none
    date: str | None = None  # what chat templates that write the date were told (ISO 8601)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def trained_tensors(model: PeftModel, layout: Layout) -> dict[str, nn.Parameter]:
    """Every trained parameter by its saved name, such as "model.layers.0.self_attn.q_proj.lora_A"."""
    tensors: dict[str, nn.Parameter] = {}
    for row, module in adapted_modules(model, layout):
        tensors[f"{row.module}.lora_A"] = module.lora_A[ADAPTER].weight
        tensors[f"{row.module}.lora_B"] = module.lora_B[ADAPTER].weight
        if row.kind == "dora":
            tensors[f"{row.module}.lora_magnitude"] = module.lora_magnitude_vector[ADAPTER].weight
        elif row.kind == "adalora":
            tensors[f"{row.module}.lora_lambda"] = module.lora_lambda[ADAPTER]
    return tensors


def save_weights(model: PeftModel, layout: Layout, folder: Path) -> None:
    """Write adapter.safetensors and layout.json into `folder`.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, trained_tensors(model, layout), {"format": "pt"})
    write_bytes(folder / LAYOUT, layout.to_json().encode())


def load_weights(model: PeftModel, layout: Layout, folder: Path, access: Access = DIRECT) -> None:
    """Copy the tensors of `folder` into a model that carries the same layout. All or nothing.

    Args:
        access: how the model's parameters are reached.

    Raises:
        AdapterError: a file that is missing or damaged, or tensors that are not exactly the layout's.
    """
    file = folder / WEIGHTS
    own = trained_tensors(model, layout)
    try:
        with safe_open(str(file), framework="pt") as reader:
            saved = set(reader.keys())
            if saved != own.keys():
                raise AdapterError(
                    f"its tensors are not those of the layout; for example {min(saved ^ own.keys())}",
                    where=str(file),
                )
            values = {name: reader.get_tensor(name) for name in own}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot be read: {error}", where=str(file)) from None
    for name, value in values.items():
        wanted = getattr(own[name], "ds_shape", own[name].shape)  # of a parameter that DeepSpeed has in shards
        if value.shape != wanted:
            raise AdapterError(f"{name} is {tuple(value.shape)}, the layout says {tuple(wanted)}", where=str(file))
    with torch.no_grad():
        for name, value in values.items():
            access.assign(own[name], value)
    refresh_norms(model)


def save_adapter(model: PeftModel, layout: Layout, info: AdapterInfo, folder: Path) -> None:
    """Write the whole adapter folder."""
    save_weights(model, layout, folder)
    info = AdapterInfo(**redacted_values(asdict(info)))
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    lora, dora = to_plain(model, layout)
    for name, modules in (("lora", lora), ("dora", dora)):
        if modules:
            save_plain(modules, info.base_model, folder / "peft" / name)


def save_plain(modules: list[PlainModule], base_model: str, folder: Path) -> None:
    """Write plain modules as an ordinary peft adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", plain_peft_state(modules), {"format": "pt"})
    plain_peft_config(modules, base_model).save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[Layout, AdapterInfo]:
    """The layout and the description of a saved adapter.

    Raises:
        AdapterError: not an adapter folder of qhybrid, or one of another format version.
    """
    if not (folder / INFO).is_file() or not (folder / LAYOUT).is_file():
        nearby = [candidate.parent for candidate in sorted(folder.glob(f"*/{INFO}"))] if folder.is_dir() else []
        raise AdapterError(
            f"{folder} is not an adapter folder of qhybrid",
            hint=f"did you mean {nearby[0]}?" if nearby else f"it must hold {INFO} and {LAYOUT}",
        )
    layout = Layout.from_json((folder / LAYOUT).read_text(encoding="utf-8"), str(folder / LAYOUT))
    try:
        content = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if content.get("format_version") != FORMAT_VERSION:
            raise AdapterError(
                f"format version {content.get('format_version')} is not {FORMAT_VERSION}", where=str(folder / INFO)
            )
        return layout, TypeAdapter(AdapterInfo).validate_json(json.dumps(content))
    except ValidationError as error:
        raise AdapterError(f"not an adapter description: {first_fault(error)}", where=str(folder / INFO)) from None
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"not an adapter description: {error}", where=str(folder / INFO)) from None
