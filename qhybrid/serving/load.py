"""Loads what is served: the base model once, and every adapter beside the others, all of the same base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.bases import require_one_base, require_own_base
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.pissa import distance_on_whole_base
from qhybrid.adapters.plain import PlainAdapter, PlainModule, require_untouched_base
from qhybrid.architecture.layout import first_fault
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.locate import model_folder
from qhybrid.base.principal import Parts, same_parts
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import ModelError, ServingError
from qhybrid.evaluation.models import sections_of, tokenizer_of
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.serving.engine import BASE, Engine, ServedModel
from qhybrid.serving.names import base_name
from qhybrid.serving.prompts import Prompter

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class BaseChoice:
    """What the user says of the base model; what is left out, the first adapter says.

    Attributes:
        path: where it lies.
        max_context: the most tokens of a prompt and its answer.
        other_base: take the base as it is, though its hashes are not those that the adapters know.
    """

    path: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    max_context: int | None = None
    other_base: bool = False


_SEVERAL_BASES = (
    "serve each base model with a process of its own; if it is one model, --base says where it lies, and "
    "--other-base takes it as it is"
)


def load_engine(adapters: Sequence[tuple[str, Path]], choice: BaseChoice) -> Engine:
    """Load the base model once, and every adapter beside the others.

    A and B have the dtype that they were trained in, or fp32 where the base model is not in bf16: what is rounded
    in one adapter of a mixed batch would otherwise be rounded in all.

    PiSSA was trained on what is left of the base without its principal parts. If all adapters were trained on the
    same such rest, that is loaded, and the base model by itself is the rest with the principal parts beside it.
    Else the whole base is, and PiSSA runs on it as LoRA at twice the rank; the notes say how far from training.

    Args:
        adapters: names and folders. The first says how the base model is loaded, where `choice` does not.

    Raises:
        AdapterError: an adapter that cannot be read, or belongs to another base model than the others or the one
            at hand.
        ModelError: the base model cannot be loaded, or lacks modules of an adapter.
        ServingError: the names or the context do not fit the base model.
    """
    read = [(name, read_plain(folder)) for name, folder in adapters]
    for _, plain in read:
        require_untouched_base(plain)
    if not choice.other_base:
        require_one_base([plain for _, plain in read], by_name=choice.path is None, hint=_SEVERAL_BASES)
    section, quantization = _sections(read, choice)
    name_of_base = base_name(section.path)
    for name, plain in read:
        if name == name_of_base:
            raise ServingError(
                f"{name} is the name of the base model", hint=f"give the adapter another: NAME={plain.source}"
            )
    if not choice.other_base:
        require_own_base([plain for _, plain in read], model_folder(section))
    without = _common_parts([plain for _, plain in read])
    model: PreTrainedModel | PeftModel = load_base(section, quantization, without=without)
    keep_exact_on_cpu(model)
    max_context = _max_context(model, choice.max_context)
    vocabulary = model.get_input_embeddings().num_embeddings
    device, own_ends = model.device, _ends(model)

    def served(name: str, adapter: str, prompter: Prompter) -> ServedModel:
        eos = prompter.tokenizer.eos_token_id
        ends = own_ends | ({eos} if eos is not None else set())
        return ServedModel(name, adapter, prompter, frozenset(ends), max_context, vocabulary, device)

    models, notes = [], []
    for number, (name, plain) in enumerate(read):
        info, adapter = plain.info, f"a{number}"
        prompter = Prompter(
            tokenizer_of(plain.source, section),
            chat_template=info.chat_template,
            system_prompt=info.system_prompt,
            date=info.date,
        )
        if plain.modules:
            dtype = getattr(torch, info.adapter_dtype if section.dtype == "bfloat16" else "float32")
            try:
                model = attach_plain(model, plain.modules, dtype=dtype, name=adapter)
            except ModelError as error:
                raise ModelError(error.message, hint=error.hint, where=str(plain.source)) from None
        models.append(served(name, adapter if plain.modules else BASE, prompter))
        if (info.quantization, info.dtype) != (quantization.method, section.dtype):
            notes.append(
                f"{name} was trained on a base in {_words(info.quantization, info.dtype)}, and is served on "
                f"one in {_words(quantization.method, section.dtype)}"
            )
        parts = {} if without else plain.principal_parts
        if parts:
            moved, own = distance_on_whole_base(
                parts, model_folder(section), getattr(torch, section.dtype), quantization, device=device
            )
            notes.append(
                f"{name} is PiSSA and shares the base with others: its weights differ from the trained ones by "
                f"{moved:.2%} of their norm, beside {own:.2%} that the base is rounded by in "
                f"{_words(quantization.method, section.dtype)}; alone it would run as trained"
            )
    base_adapter, words = BASE, _words(quantization.method, section.dtype)
    if without:
        base_adapter = "base"
        dtype = getattr(torch, read[0][1].info.adapter_dtype if section.dtype == "bfloat16" else "float32")
        model = attach_plain(model, _whole_again(read[0][1].modules), dtype=dtype, name=base_adapter)
        notes.append(
            f"{name_of_base} is what PiSSA left of the base, in {words}, and the principal part beside it: near "
            "the base model, not equal to it"
        )
    models.append(served(name_of_base, base_adapter, Prompter(load_tokenizer(section))))
    return Engine(model, models, notes)


def _common_parts(adapters: Sequence[PlainAdapter]) -> Parts:
    """What the base of all adapters was without in training; empty where they differ, or nothing is PiSSA."""
    parts = [adapter.principal_parts for adapter in adapters]
    return parts[0] if parts and all(same_parts(parts[0], other) for other in parts[1:]) else {}


def _whole_again(modules: Sequence[PlainModule]) -> list[PlainModule]:
    """The adapter that changes nothing: B0·A0 in the place of B·A."""
    parts = [(module.module, part) for module in modules if (part := module.principal) is not None]
    return [
        PlainModule(
            name,
            torch.cat([part.a, part.a]),
            torch.cat([part.b, -part.b], dim=1),
            part.scaling,
            num_principal=len(part.a),
        )
        for name, part in parts
    ]


def _sections(
    read: Sequence[tuple[str, PlainAdapter]], choice: BaseChoice
) -> tuple[ModelSection, QuantizationSection]:
    given = {"path": choice.path, "dtype": choice.dtype, "attn_implementation": choice.attn_implementation}
    given = {key: value for key, value in given.items() if value}
    values, method, double_quant = {}, "nf4", True
    if read:
        info = read[0][1].info
        section, nf4 = sections_of(info, read[0][1].source, choice.path, choice.attn_implementation)
        values, method, double_quant = section.model_dump(), nf4.method, nf4.double_quant
        values["adapter_dtype"] = None  # of the first adapter; each has its own
    elif not choice.path:
        raise ModelError("nothing to load", hint="name an adapter, or a base model with --base")
    try:
        return ModelSection.model_validate({**values, **given}), QuantizationSection.model_validate(
            {"method": choice.quantization or method, "double_quant": double_quant}
        )
    except ValidationError as error:  # a path with a null byte, say
        raise ModelError(f"the base model cannot be used: {first_fault(error)}") from None


def _max_context(model: PreTrainedModel, wanted: int | None) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
    if wanted is not None and wanted > most:
        raise ServingError(f"the model has a context of {most} tokens", hint=f"lower --max-context {wanted}")
    return wanted or min(most, DEFAULT_CONTEXT)


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens at which the model's own settings end an answer."""
    told = getattr(model.generation_config, "eos_token_id", None)
    return set(told if isinstance(told, list) else [told]) - {None}


def _words(quantization: str, dtype: str) -> str:
    return f"NF4 and {dtype}" if quantization == "nf4" else dtype
