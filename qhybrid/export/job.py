"""What an export begins with: the adapter in plain form, its base model, its tokenizer, and texts to try it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qhybrid.adapters.bases import require_own_base
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.info import INFO
from qhybrid.adapters.plain import PlainAdapter
from qhybrid.base.locate import model_folder
from qhybrid.errors import AdapterError, ExportError
from qhybrid.evaluation.models import sections_of, tokenizer_of
from qhybrid.export.convert import Approximated, dora_to_lora, pissa_to_lora
from qhybrid.export.parity import ParityCheck, require_parity
from qhybrid.export.probe import probe_rows
from qhybrid.export.weights import BaseWeights
from qhybrid.recipe.schema import Dtype, Method, ModelSection, QuantizationSection

_PARITY_TEXTS = 6  # of the probe

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What is exported, in the user's words.

    Attributes:
        folder: an adapter, a run, or a peft folder.
        base: where the base model lies, if not where the adapter says.
        other_base: take the base as it is, though its hashes are not those that the adapter knows.
        quantization, dtype: of the base in training, for peft folders, which do not say.
        dora_to_lora: the rank at which DoRA modules become LoRA.
    """

    folder: Path
    base: str | None = None
    other_base: bool = False
    quantization: Method | None = None
    dtype: Dtype | None = None
    dora_to_lora: int | None = None


@dataclass(frozen=True)
class Job:
    """A checked adapter on its base.

    Attributes:
        trained: the adapter as training left it, with PiSSA's principal parts known.
        adapter: what is to be written: `trained`, unless DoRA modules were approximated.
        base: the base model's folder.
        is_base_known: whether the adapter knew the hashes of the base, so that it is the right one.
    """

    trained: PlainAdapter
    adapter: PlainAdapter
    approximated: tuple[Approximated, ...]
    section: ModelSection
    quantization: QuantizationSection
    base: Path
    is_base_known: bool
    tokenizer: PreTrainedTokenizerBase

    def parity(self) -> ParityCheck:
        """To compare with the source, on the base as it was in training."""
        return ParityCheck(self.trained.source, self.section, self.quantization, self._ids())

    def parity_on_whole_base(self) -> ParityCheck:
        """To compare what is written for the whole base with the source.

        PiSSA on W − s·B0·A0 and its LoRA on W are one function of numbers that are not rounded. NF4 rounds the two
        weights differently, and so does bf16; so they are compared in fp32.
        """
        if not self.trained.principal_parts:
            return self.parity()
        section = self.section.model_copy(update={"dtype": "float32", "adapter_dtype": "float32"})
        whole = self.quantization.model_copy(update={"method": "none"})
        return ParityCheck(self.trained.source, section, whole, self._ids())

    def _ids(self) -> list[Tensor]:
        rows = probe_rows(self.tokenizer, self.trained.info)[:_PARITY_TEXTS]
        return [torch.from_numpy(row.input_ids).long() for row in rows]


def prepare(source: Source, say: Say) -> Job:
    """Read the adapter, find and check its base, and make LoRA of what is to be LoRA. Writes nothing.

    Raises:
        AdapterError: the adapter cannot be read, is not finite, or belongs to another base.
        ModelError: the base cannot be found or read.
        ProofError: PiSSA, as LoRA, computes something else.
    """
    read = read_plain(source.folder)
    told = {name: value for name in ("quantization", "dtype") if (value := getattr(source, name)) is not None}
    if told and (read.source / INFO).is_file():
        raise AdapterError(
            f"{read.source} knows its {' and '.join(told)}", hint=f"leave --{' and --'.join(told)} out"
        )
    read = dataclasses.replace(read, info=dataclasses.replace(read.info, **told))
    if not read.modules:
        raise ExportError(f"{read.source} changes nothing: all its ranks are 0")
    section, quantization = sections_of(read.info, read.source, source.base)
    if read.base_minus is not None and quantization.method != "none":
        raise ExportError(
            "PiSSA's principal part is that of the unquantised base", hint="leave --quantization out"
        )
    say("looking for the base model")
    base = model_folder(section)
    tokenizer = tokenizer_of(read.source, section)
    is_known = False
    if not source.other_base:
        say("checking the base model")
        is_known = require_own_base([read], base)
    trained, approximated = read, ()
    if read.base_minus is not None:
        say("computing PiSSA's principal parts")
        with BaseWeights(base, getattr(torch, section.dtype), quantization) as weight_of:
            trained = pissa_to_lora(read, weight_of)
    adapter = trained
    if source.dora_to_lora is not None:
        if not trained.dora:
            raise ExportError(f"{read.source} has no DoRA modules", hint="leave --dora-to-lora out")
        say("approximating DoRA")
        with BaseWeights(base, getattr(torch, section.dtype), quantization) as weight_of:
            adapter, approximated = dora_to_lora(trained.on_whole_base, weight_of, source.dora_to_lora)
    job = Job(trained, adapter, approximated, section, quantization, base, is_known, tokenizer)
    if read.base_minus is not None:
        say("comparing logits")
        require_parity(job.parity().difference_of_modules(trained.modules), "LoRA on the untouched base")
    return job
