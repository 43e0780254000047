"""Logits of an adapter before and after a conversion, on the same base model in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qhybrid.adapters.attach import attach, attach_plain
from qhybrid.adapters.dora import hold_norms
from qhybrid.adapters.folder import load_weights, read_principal_parts
from qhybrid.adapters.info import INFO, read_adapter
from qhybrid.adapters.plain import PlainModule, principal_parts_of
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.principal import Parts
from qhybrid.errors import ProofError
from qhybrid.recipe.schema import ModelSection, QuantizationSection

MARK = 1e-5  # the largest difference of a logit, over the largest logit


class ParityCheck:
    """Compares the source adapter with what was made of it.

    The base is loaded as for training, 4-bit where training had it so, but computes in fp32, and so do the
    adapters. The source runs in its own form: AdaLoRA with Λ and masks, rsLoRA with its scaling, PiSSA on the base
    without its principal part, a peft folder by peft's loader (which takes PiSSA's principal part out of the base,
    and needs it unquantised for that).
    """

    def __init__(
        self, source: Path, section: ModelSection, quantization: QuantizationSection, ids: Sequence[Tensor]
    ) -> None:
        """
        Args:
            source: an adapter folder of qhybrid or peft.
            ids: token ids (tokens,) of some texts.
        """
        self._source = source
        self._trained_section = section
        self._section = section.model_copy(update={"dtype": "float32", "adapter_dtype": "float32"})
        self._quantization = quantization
        self._ids = ids
        self._before: list[Tensor] | None = None

    def difference_of_folders(self, folders: Sequence[Path]) -> float:
        """The largest difference of logits, relative to the largest logit, when peft loads `folders`."""
        return self._difference(_with_peft(self._base(), folders))

    def difference_of_modules(self, modules: Sequence[PlainModule]) -> float:
        """The same for modules in memory: PiSSA's as they were trained."""
        base = self._base(principal_parts_of(modules))
        return self._difference(attach_plain(base, modules, dtype=torch.float32))

    def _difference(self, model: PreTrainedModel | PeftModel) -> float:
        after = _logits(model, self._ids)
        del model
        if self._before is None:
            self._before = _logits(self._load_source(), self._ids)
        before, after = torch.cat(self._before), torch.cat(after)
        return float((before - after).abs().max() / before.abs().max())  # NaN where one of them has one

    def _base(self, without: Parts | None = None) -> PreTrainedModel:
        if self._quantization.method == "none":  # in the training's weights, then widened: PiSSA splits those
            base = load_base(self._trained_section, self._quantization, without=without).float()
            base.config.dtype = torch.float32
        else:
            base = load_base(self._section, self._quantization, without=without)
        keep_exact_on_cpu(base)
        return base

    def _load_source(self) -> PreTrainedModel | PeftModel:
        if not (self._source / INFO).is_file():
            return _with_peft(self._base(), [self._source])
        layout, _ = read_adapter(self._source)
        base = self._base(read_principal_parts(self._source, layout))
        model = attach(base, layout, dtype=torch.float32)
        load_weights(model, layout, self._source)
        return model


def require_parity(difference: float, what: str) -> None:
    """Refuse a conversion that changes the function.

    Raises:
        ProofError: the difference is above 1e-5, or not a number.
    """
    if not difference <= MARK:
        raise ProofError(
            f"{what} does not compute what the adapter does: logits differ by {difference:.1e} of the largest, "
            f"above {MARK:.0e}",
            hint="nothing was written; please report this",
        )


def _with_peft(base: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    names = [f"adapter{number}" for number in range(len(folders))]
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():  # peft gives them the dtype of what they stand beside
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
    return model


def _logits(model: PreTrainedModel | PeftModel, ids: Sequence[Tensor]) -> list[Tensor]:
    """Logits (tokens, vocabulary) in fp32 on the CPU for each text."""
    model.eval()
    with torch.no_grad(), hold_norms(model):
        return [
            model(input_ids=text[None].to(model.device), use_cache=False).logits[0].float().cpu() for text in ids
        ]
