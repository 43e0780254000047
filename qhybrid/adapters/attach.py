"""Builds a Layout on a base model: one peft LoraModel in which every module has its own kind.

peft refuses several kinds on one 4-bit model by every public way. What works, trains, resumes and saves is one
LoraModel whose modules carry a LoraVariant each: none for lora and rslora, DoraVariant for dora, AdaLoraVariant
for adalora. LoraVariant is not public API; tests/integration/test_contracts.py holds what is used of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from qhybrid.adapters.adalora import INITIAL_STD, AdaLoraVariant, add_lambda
from qhybrid.adapters.dora import DoraMagnitude, DoraVariant
from qhybrid.adapters.peft_folder import plain_peft_config
from qhybrid.adapters.plain import PlainModule, principal_parts_of
from qhybrid.architecture.layout import Layout, LayoutRow
from qhybrid.base.load import keep_exact_on_cpu
from qhybrid.base.principal import part_missing_in, parts_missing_in, same_parts
from qhybrid.errors import AdapterError, ModelError
from qhybrid.recipe.band import PISSA

ADAPTER = "default"


def attach(
    model: nn.Module,
    layout: Layout,
    *,
    dtype: torch.dtype,
    initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> PeftModel:
    """Add the layout's adapters to `model`, in place; only they are trained.

    Args:
        dtype: of A, B, P and Q.
        initial: by module, A (r, in) and B (out, r) to start with; what is left out starts as the layout says.

    A, B, P and Q get `dtype`; DoRA's magnitudes and AdaLoRA's Λ are fp32, because their updates are smaller
    than bf16 can hold. The initial values follow torch's global generator: seed it first. PiSSA's are
    what `load_base` took out of the weights.

    Raises:
        ModelError: the model lacks a module of the layout.
    """
    _require_linears(model, [row.module for row in layout])
    if next(model.parameters()).device.type != "meta":  # a simulation has no weights to take something out of
        taken = {row.module for row in layout if row.init == PISSA}
        assert parts_missing_in(model).keys() == taken, "the base was loaded for another layout"
    keep_exact_on_cpu(model)
    peft_model = get_peft_model(model, peft_config(layout), adapter_name=ADAPTER, autocast_adapter_dtype=False)
    for row, module in adapted_modules(peft_model, layout):
        _build(row, module, dtype)
        if initial and row.module in initial:
            a, b = initial[row.module]
            with torch.no_grad():
                module.lora_A[ADAPTER].weight.copy_(a)
                module.lora_B[ADAPTER].weight.copy_(b)
    return peft_model


def _require_linears(model: nn.Module, modules: Sequence[str]) -> None:
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, LoraLayer))}
    missing = [module for module in modules if module not in linears]
    if missing:
        raise ModelError(f"the model has no linear module {missing[0]} ({len(missing)} of {len(modules)} missing)")


def attach_plain(
    model: nn.Module, modules: Sequence[PlainModule], *, dtype: torch.dtype, name: str = ADAPTER
) -> PeftModel:
    """Add finished LoRA and DoRA modules, frozen, as the adapter `name`: to a base model, or beside others.

    On a base without principal parts PiSSA runs as it was trained; on a whole base as LoRA at twice the rank.

    Args:
        model: a base model, which becomes a PeftModel in place; or a PeftModel, whose active adapter stays.
        dtype: of A and B. DoRA's magnitudes are fp32.
        name: not taken yet, and without dots.

    Raises:
        ModelError: the model lacks one of the modules.
        AdapterError: the base is without other principal parts than the modules were trained without.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _require_linears(base, [module.module for module in modules])
    missing = parts_missing_in(base)
    if missing:
        if not same_parts(missing, principal_parts_of(modules)):
            raise AdapterError("the base model in memory is without the principal parts of another PiSSA adapter")
        modules = [module.native for module in modules]
    config = plain_peft_config(modules, None)
    config.use_dora = False  # the variants below are ours
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    else:
        keep_exact_on_cpu(model)
        model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    for plain in modules:
        layer = base.get_submodule(plain.module)
        a, b = layer.lora_A[name], layer.lora_B[name]
        if (a.weight.shape, b.weight.shape) != (plain.a.shape, plain.b.shape):
            raise ModelError(
                f"{plain.module} has {a.in_features} inputs and {b.out_features} outputs in the model, and "
                f"{plain.shape[1]} and {plain.shape[0]} in the adapter",
                hint="the adapter belongs to another base model",
            )
        with torch.no_grad():
            a.to(dtype).weight.copy_(plain.a)
            b.to(dtype).weight.copy_(plain.b)
        layer.scaling[name] = plain.scaling
        if plain.magnitude is not None:
            if not layer.lora_magnitude_vector:
                layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_magnitude_vector")
            magnitude = DoraMagnitude(layer.get_base_layer())
            with torch.no_grad():
                magnitude.weight.copy_(plain.magnitude)
            layer.lora_magnitude_vector[name] = magnitude
            layer.lora_variant[name] = DoraVariant()
    return model.requires_grad_(False)


def peft_config(layout: Layout) -> LoraConfig:
    """The layout in peft's words. alpha is written as s·r, so that peft's alpha/r is s for every kind."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=max(row.rank for row in layout),
        target_modules=[row.module for row in layout],
        rank_pattern={row.module: row.rank for row in layout},
        alpha_pattern={row.module: row.scaling * row.rank for row in layout},
    )


def adapted_modules(model: PeftModel, layout: Layout) -> Iterator[tuple[LayoutRow, LoraLayer]]:
    """Each row of the layout with the peft layer that carries it."""
    base = model.get_base_model()
    for row in layout:
        yield row, base.get_submodule(row.module)


def _build(row: LayoutRow, module: LoraLayer, dtype: torch.dtype) -> None:
    a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    a.to(dtype), b.to(dtype)
    module.scaling[ADAPTER] = row.scaling
    if row.dropout:
        module.lora_dropout[ADAPTER] = nn.Dropout(row.dropout)
    if row.init == "gaussian":
        nn.init.normal_(a.weight, std=1 / row.rank)
    elif row.init == PISSA:
        _start_at_principal_part(module)
    if row.kind == "dora":
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        magnitude = DoraMagnitude(module.get_base_layer())
        if row.init == PISSA:  # W is not the base's weight alone
            norm = magnitude.norm(module.get_base_layer(), a.weight, b.weight, row.scaling)
            magnitude.weight.data.copy_(norm)
        module.lora_magnitude_vector[ADAPTER] = magnitude
        module.lora_variant[ADAPTER] = DoraVariant()
    elif row.kind == "adalora":
        nn.init.normal_(a.weight, std=INITIAL_STD)
        nn.init.normal_(b.weight, std=INITIAL_STD)
        add_lambda(module, ADAPTER, row.rank)
        module.lora_variant[ADAPTER] = AdaLoraVariant()


@torch.no_grad()
def _start_at_principal_part(module: LoraLayer) -> None:
    """B·A is what was taken out of the weight; terms that were added since are as in LoRA."""
    part = part_missing_in(module.get_base_layer())
    if part is not None:
        module.lora_A[ADAPTER].weight[: len(part.a)] = part.a.to(module.lora_A[ADAPTER].weight)
        module.lora_B[ADAPTER].weight[:, : len(part.a)] = part.b.to(module.lora_B[ADAPTER].weight)


@contextlib.contextmanager
def keep_adapter_values(model: PeftModel) -> Iterator[None]:
    """Undo any cast of the adapters inside the block: trl rounds all but DoRA's magnitudes to bf16 on 4-bit."""
    values = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter, value in values.items():
        parameter.data = value
