"""The adapter folder: what training saves, what qhybrid reads back, and ordinary peft folders beside it.

adapter.safetensors   every trained tensor at full rank, in its own dtype; of PiSSA what its base is without
layout.json           one row for each module
adapter.json          the base model and the versions
adapter_int8.safetensors   in the place of the first, for an adapter exported in INT8
peft/lora, peft/dora  the same adapter for peft without qhybrid (AdaLoRA folded into LoRA, exactly)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from qhybrid.adapters.access import DIRECT, Access
from qhybrid.adapters.attach import ADAPTER, adapted_modules
from qhybrid.adapters.dora import refresh_norms
from qhybrid.adapters.info import INFO, LAYOUT, AdapterInfo, adapter_of_run, read_adapter
from qhybrid.adapters.int8 import WEIGHTS as INT8_WEIGHTS
from qhybrid.adapters.int8 import int8_tensors, plain_tensors
from qhybrid.adapters.peft_folder import CONFIG, read_peft_folder, write_peft_folder
from qhybrid.adapters.plain import PlainAdapter, PlainModule, on_whole_base, plain_modules, require_finite
from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.base.locate import refuse_links_out
from qhybrid.base.principal import PrincipalPart, part_missing_in, parts_missing_in, same_parts
from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.disk import write_bytes
from qhybrid.errors import AdapterError
from qhybrid.recipe.band import PISSA
from qhybrid.redaction import redacted, redacted_values

WEIGHTS = "adapter.safetensors"


def trained_tensors(model: PeftModel, layout: Layout, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Every trained parameter by its saved name, such as "model.layers.0.self_attn.q_proj.lora_A".

    Args:
        adapter: peft's name of it.
    """
    tensors: dict[str, nn.Parameter] = {}
    for row, module in adapted_modules(model, layout):
        tensors[f"{row.module}.lora_A"] = module.lora_A[adapter].weight
        tensors[f"{row.module}.lora_B"] = module.lora_B[adapter].weight
        if row.kind == "dora":
            tensors[f"{row.module}.lora_magnitude"] = module.lora_magnitude_vector[adapter].weight
        elif row.kind == "adalora":
            tensors[f"{row.module}.lora_lambda"] = module.lora_lambda[adapter]
    return tensors


def principal_tensors(model: PeftModel, layout: Layout) -> dict[str, Tensor]:
    """PiSSA's A0 and B0 by their saved names, such as "model.layers.0.self_attn.q_proj.lora_A0".

    A reader that knows nothing of them refuses the whole file; one that does rebuilds the base with them.
    """
    tensors: dict[str, Tensor] = {}
    for row, module in adapted_modules(model, layout):
        part = part_missing_in(module.get_base_layer())
        if part is not None:
            tensors |= {f"{row.module}.lora_A0": part.a, f"{row.module}.lora_B0": part.b}
    return tensors


def _saved_tensors(model: PeftModel, layout: Layout) -> dict[str, Tensor]:
    return {**trained_tensors(model, layout), **principal_tensors(model, layout)}


def read_principal_parts(folder: Path, layout: Layout) -> dict[str, PrincipalPart]:
    """What the base of a saved adapter is without, for `load_base`; empty where nothing is PiSSA.

    Raises:
        AdapterError: as `load_weights`.
    """
    if not any(row.init == PISSA for row in layout):
        return {}
    return _principal_parts(_read_weights(folder, layout), layout)


def _principal_parts(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, PrincipalPart]:
    return {
        row.module: PrincipalPart(tensors[f"{row.module}.lora_A0"], tensors[f"{row.module}.lora_B0"], row.scaling)
        for row in layout
        if row.init == PISSA
    }


def save_weights(model: PeftModel, layout: Layout, folder: Path) -> None:
    """Write adapter.safetensors and layout.json into `folder`.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, _saved_tensors(model, layout), {"format": "pt"})
    write_bytes(folder / LAYOUT, layout.to_json().encode())


def load_weights(model: PeftModel, layout: Layout, folder: Path, access: Access = DIRECT) -> None:
    """Copy the tensors of `folder` into a model that carries the same layout. All or nothing.

    Args:
        access: how the model's parameters are reached.

    Raises:
        AdapterError: a file that is missing or damaged, or tensors that are not exactly the layout's; or PiSSA on
            a base that is not without just these principal parts.
    """
    own, values = trained_tensors(model, layout), _read_weights(folder, layout)
    if not same_parts(parts_missing_in(model.get_base_model()), _principal_parts(values, layout)):
        raise AdapterError(
            "the base model in memory is not without the principal parts that this adapter stores",
            where=str(folder),
        )
    with torch.no_grad():
        for name, parameter in own.items():
            access.assign(parameter, values[name])
    refresh_norms(model)


def save_adapter(model: PeftModel, layout: Layout, info: AdapterInfo, folder: Path) -> None:
    """Write the whole adapter folder."""
    save_weights(model, layout, folder)
    _save_beside(plain_modules(layout, _saved_tensors(model, layout)), info, folder)


def save_plain(modules: tuple[PlainModule, ...], info: AdapterInfo, folder: Path, band: str) -> None:
    """Write plain modules, for the whole base, as an adapter folder of one band, which qhybrid and peft read."""
    folder.mkdir(parents=True, exist_ok=True)
    modules, tensors = on_whole_base(modules), {}
    for m in modules:
        tensors |= {f"{m.module}.lora_A": m.a, f"{m.module}.lora_B": m.b}
        if m.magnitude is not None:
            tensors[f"{m.module}.lora_magnitude"] = m.magnitude
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    _write_layout(modules, folder, band)
    _save_beside(modules, info, folder)


def save_int8(modules: tuple[PlainModule, ...], info: AdapterInfo, folder: Path) -> None:
    """Write plain modules in INT8 as an adapter folder that qhybrid reads; PiSSA as it was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / INT8_WEIGHTS, int8_tensors(modules), {"format": "pt"})
    _write_layout(modules, folder, "int8")
    _write_info(info, folder)


def _write_layout(modules: tuple[PlainModule, ...], folder: Path, band: str) -> None:
    layout = Layout(tuple(_row(module, band) for module in modules))
    write_bytes(folder / LAYOUT, layout.to_json().encode())


def _row(module: PlainModule, band: str) -> LayoutRow:
    layer, target = layer_and_target(module.module)
    out_features, in_features = module.shape
    rank = module.native.rank
    return LayoutRow(
        module=module.module,
        layer=layer,
        target=target,
        in_features=in_features,
        out_features=out_features,
        band=band,
        kind="lora" if module.magnitude is None else "dora",
        rank=rank,
        target_rank=rank,
        alpha=module.scaling * rank,
        scaling=module.scaling,
        dropout=0.0,
        init=PISSA if module.num_principal else "none",
        loraplus_lr_ratio=1.0,
    )


def layer_and_target(module: str) -> tuple[int, str]:
    """3 and "q_proj" of "model.layers.3.self_attn.q_proj".

    Raises:
        AdapterError: the module is in no layer.
    """
    layer = next((part for part in module.split(".") if part.isdecimal()), None)
    if layer is None:
        raise AdapterError(
            f"{module} is in no layer of the model", hint="only linear layers of the decoder are read"
        )
    return int(layer), module.rpartition(".")[2]


def _save_beside(modules: tuple[PlainModule, ...], info: AdapterInfo, folder: Path) -> None:
    """adapter.json, and the folders for peft."""
    _write_info(info, folder)
    adapter = PlainAdapter(modules, info, folder)
    for name, part in (("lora", adapter.lora), ("dora", adapter.dora)):
        if part:
            write_peft_folder(part, redacted(info.base_model), folder / "peft" / name)


def _write_info(info: AdapterInfo, folder: Path) -> None:
    content = redacted_values(asdict(info))
    write_bytes(folder / INFO, (json.dumps(content, indent=2) + "\n").encode())


def read_plain(folder: Path) -> PlainAdapter:
    """An adapter of qhybrid (its folder or the run's), or a LoRA, rsLoRA, DoRA or PiSSA folder of peft.

    Raises:
        AdapterError: none of these, or a file that is damaged, or values that are not finite.
        ModelError: a file is a link to another place.
    """
    if not folder.is_dir():
        raise AdapterError(f"there is no folder {folder}", hint="name an adapter folder or a run folder")
    folder = adapter_of_run(folder)
    refuse_links_out(folder)
    below = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if below and not any((folder / name).is_file() for name in (INFO, CONFIG)):
        raise AdapterError(f"{folder} is no adapter folder itself", hint=f"did you mean {below[0]}?")
    if (folder / INFO).is_file() or not (folder / CONFIG).is_file():
        layout, info = read_adapter(folder)
        adapter = PlainAdapter(plain_modules(layout, _read_weights(folder, layout)), info, folder)
    else:
        modules, config = read_peft_folder(folder)
        init = str(config.get("init_lora_weights"))
        dtype = str(modules[0].a.dtype).removeprefix("torch.")
        info = AdapterInfo(
            base_model=config.get("base_model_name_or_path") or "",
            base_revision=config.get("revision"),
            quantization="none",
            double_quant=True,
            dtype="bfloat16",
            adapter_dtype="bfloat16" if dtype == "bfloat16" else "float32",
            attn_implementation="sdpa",
        )
        adapter = PlainAdapter(modules, info, folder, init if init.startswith("pissa") else None)
    require_finite(adapter.modules, str(folder))
    return adapter


def _read_weights(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The tensors of adapter.safetensors, which are exactly those that the layout tells of.

    Raises:
        AdapterError: a file that is missing or damaged, or other tensors.
    """
    if (folder / INT8_WEIGHTS).is_file():
        file = folder / INT8_WEIGHTS
        tensors = plain_tensors(read_tensors(file, AdapterError), str(file))
    else:
        file = folder / WEIGHTS
        tensors = read_tensors(file, AdapterError)
    wanted: dict[str, tuple[int, ...]] = {}
    for row in layout:
        wanted[f"{row.module}.lora_A"] = (row.rank, row.in_features)
        wanted[f"{row.module}.lora_B"] = (row.out_features, row.rank)
        if row.kind == "dora":
            wanted[f"{row.module}.lora_magnitude"] = (row.out_features,)
        elif row.kind == "adalora":
            wanted[f"{row.module}.lora_lambda"] = (row.rank,)
        if row.init == PISSA:  # terms may have been added since
            a0 = tensors.get(f"{row.module}.lora_A0")
            k = row.rank if a0 is None or a0.dim() != 2 else min(max(1, len(a0)), row.rank)
            wanted[f"{row.module}.lora_A0"] = (k, row.in_features)
            wanted[f"{row.module}.lora_B0"] = (row.out_features, k)
    if tensors.keys() != wanted.keys():
        example = min(tensors.keys() ^ wanted.keys())
        raise AdapterError(f"its tensors are not those of the layout; for example {example}", where=str(file))
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise AdapterError(f"{name} is {tuple(tensors[name].shape)}, the layout says {shape}", where=str(file))
    return tensors
