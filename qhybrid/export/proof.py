"""Whether a merged model is still what was trained: its predictions beside those of the model with the adapter.

Reference is the model as training left it. Against its distribution p each form's q is held, at every token that
counts for the loss: KL(p‖q) in nats, and how often both have the same most probable token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.dora import hold_norms
from qhybrid.adapters.plain import PlainAdapter
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.principal import parts_missing_in
from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import ProofError
from qhybrid.evaluation.forward import batches, scored_logits
from qhybrid.export.merged.bake import merge_in_place
from qhybrid.export.merged.rows import Onto
from qhybrid.recipe.schema import ModelSection, QuantizationSection

_MOST_KEPT_BYTES = 2**30  # log-probabilities of the reference are kept in fp32 up to this
_BATCH_SIZE = 16
_NEAR = 0.01  # a merged model must be closer to the trained one than its base is, by this share
# The least agreement with the reference. Of the same weights only rounding is left; between NF4 and the 16-bit
# weights the reference's own 4-bit error shows.
MARK, DEFAULT_MARK_16BIT = 0.95, 0.7

_FORMS: dict[Onto, str] = {"16bit": "merged on 16-bit", "nf4": "merged on dequantised NF4"}


@dataclass(frozen=True)
class Figures:
    """One form of the model on the proof's rows."""

    name: str
    loss: float  # mean cross-entropy of a token, in nats
    kl: float  # mean KL(reference‖this) of a token, in nats
    agreement: float  # share of tokens with the reference's most probable one

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))


@dataclass(frozen=True)
class Proof:
    """All figures, and on what they were measured."""

    rows: int
    tokens: int
    data: str  # "built-in probe", or the file's name
    figures: tuple[Figures, ...]
    artefact: str  # the name in `figures` of what was written
    faithful: float  # its agreement with the same weights with the adapter beside them
    mark: float  # the least agreement with the trained model that passes

    def __getitem__(self, name: str) -> Figures:
        return next(one for one in self.figures if one.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        content = asdict(self)
        content["figures"] = [{**asdict(one), "perplexity": one.perplexity} for one in self.figures]
        return content

    def table(self) -> list[tuple[str, ...]]:
        """A header and one line of text for each form."""
        lines = [("", "loss", "perplexity", "KL", "same top token")]
        for one in self.figures:
            name = f"{one.name} *" if one.name == self.artefact else one.name
            lines.append(
                (name, f"{one.loss:.4f}", f"{one.perplexity:.3f}", f"{one.kl:.2e}", f"{one.agreement:.1%}")
            )
        return lines

    def lines(self) -> list[str]:
        """The same, aligned."""
        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]


class Reference:
    """The distribution of the trained model, with which others are compared.

    Attributes:
        num_rows: how many of the given ones were taken: what fits into 1 GiB, at least one.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[EncodedRow]) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        budget = _MOST_KEPT_BYTES // (4 * vocabulary)
        kept: list[EncodedRow] = []
        for row in rows:
            budget -= int((row.labels[1:] != IGNORED_LABEL).sum())
            if kept and budget < 0:
                break
            kept.append(row)
        self.num_rows = len(kept)
        self._batches = list(batches(kept, _BATCH_SIZE, model))
        self._own = list(self._run(model))

    @property
    def num_tokens(self) -> int:
        """Tokens that are compared."""
        return sum(len(targets) for _, targets in self._own)

    def own(self, name: str) -> Figures:
        """The reference's own figures."""
        return self._figures(name, self._own)

    def compare(self, name: str, model: PreTrainedModel) -> Figures:
        """The figures of another form of the model."""
        return self._figures(name, self._run(model))

    def _figures(self, name: str, others: Iterable[tuple[Tensor, Tensor]]) -> Figures:
        loss = kl = same = 0.0
        for (log_p, targets), (log_q, _) in zip(self._own, others, strict=True):
            loss += float(F.nll_loss(log_q, targets, reduction="sum"))
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        tokens = self.num_tokens
        return Figures(name, loss / tokens, max(kl / tokens, 0.0), same / tokens)

    def _run(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """log softmax (tokens, vocabulary) in fp32 and the tokens (tokens,) of each batch, on the CPU."""
        model.eval()
        with torch.no_grad(), hold_norms(model):
            for batch in self._batches:
                logits, targets = scored_logits(model, batch)
                yield F.log_softmax(logits.float(), dim=-1).cpu(), targets.cpu()


def prove(
    trained: PlainAdapter,
    adapter: PlainAdapter,
    section: ModelSection,
    quantization: QuantizationSection,
    rows: Sequence[EncodedRow],
    data: str,
    *,
    onto: Onto,
    written: Path | None,
    mark: float | None = None,
) -> Proof:
    """Measure the trained model, the base without the adapter, and the merged forms, one after the other.

    Args:
        trained: the adapter as training left it. adapter: what is merged of it, in most cases the same.
        section, quantization: the base, as the adapter was trained on it.
        rows: what to measure on. data: what they are called.
        onto: the form that is to be used; an adapter that was trained on an unquantised base has "16bit" alone.
        written: the merged model's folder, when there is one; other forms are merged in memory.
        mark: the least agreement with the trained model that passes; by default 0.95, and 0.7 for 16-bit weights
            where training saw NF4.

    Raises:
        ProofError: the merged model is no closer to the trained one than its base is, or agrees with it, or with
            the same weights with the adapter beside them, on too few tokens.
    """
    dtype = getattr(torch, section.resolved_adapter_dtype)
    model = _with_adapter(trained, section, quantization, dtype)
    reference = Reference(model, rows)
    is_quantized = quantization.method != "none"
    bits = "4-bit" if is_quantized else "16-bit"
    figures = [reference.own(f"{bits} + adapter")]
    base = _without_adapter(f"{bits} base", reference, model, section, quantization)
    figures.append(base)
    del model
    beside = reference
    forms: tuple[Onto, ...] = ("16bit", "nf4") if is_quantized else ("16bit",)
    assert onto in forms
    for form in forms:
        if is_quantized and form == "16bit":
            model = _with_adapter(adapter, section, _UNQUANTIZED, dtype)
            figures.append(reference.compare("16-bit + adapter", model))
            if onto == "16bit":
                beside = Reference(model, rows)
            figures.append(_without_adapter("16-bit base", reference, model, section, _UNQUANTIZED))
            if onto == "16bit":
                base = figures[-1]
            del model
        if form == onto and written is not None:
            merged = _unquantized(section.model_copy(update={"path": str(written), "revision": None}))
        else:
            merged = _unquantized(section)
            merge_in_place(merged, adapter, onto=form, section=section, quantization=quantization)
        figures.append(reference.compare(_FORMS[form], merged))
        if form == onto:
            faithful = beside.compare("", merged).agreement
        del merged
    proof = Proof(
        rows=reference.num_rows,
        tokens=reference.num_tokens,
        data=data,
        figures=tuple(figures),
        artefact=_FORMS[onto],
        faithful=faithful,
        mark=(DEFAULT_MARK_16BIT if onto == "16bit" and is_quantized else MARK) if mark is None else mark,
    )
    _judge(proof, base)
    return proof


def _judge(proof: Proof, base: Figures) -> None:
    """Refuse what is not the trained model.

    Args:
        base: the figures of the weights that were merged into, without the adapter.
    """
    merged, untrained = proof[proof.artefact], proof.figures[1]
    lines = "\n".join(proof.lines())
    if not all(math.isfinite(value) for one in proof.figures for value in (one.loss, one.kl)):
        raise ProofError(f"some figures are not finite\n{lines}")
    if untrained.kl == 0:
        raise ProofError(f"the adapter changes nothing: the model predicts as its base does\n{lines}")
    if merged.kl >= (1 - _NEAR) * base.kl:
        raise ProofError(
            f"the adapter was lost: the merged model is no closer to the trained one than its base is\n{lines}",
            hint="a light adapter can be less than quantisation and rounding are: --onto nf4 keeps more of it; "
            "beside the model it is kept whole",
        )
    if proof.faithful < MARK:
        raise ProofError(
            f"the merged model has the most probable token of the same weights with the adapter beside them at "
            f"{proof.faithful:.1%} of {proof.tokens} tokens, below {MARK:.0%}\n{lines}",
            hint="please report this",
        )
    if merged.agreement < proof.mark:
        raise ProofError(
            f"the merged model has the trained one's most probable token at {merged.agreement:.1%} of "
            f"{proof.tokens} tokens, below the mark of {proof.mark:.1%}\n{lines}",
            hint="--onto nf4 merges into the weights that training saw; --min-agreement sets the mark",
        )


def _with_adapter(
    adapter: PlainAdapter, section: ModelSection, quantization: QuantizationSection, dtype: torch.dtype
) -> PeftModel:
    base = load_base(section, quantization, without=adapter.principal_parts)
    return attach_plain(base, adapter.modules, dtype=dtype)


def _without_adapter(
    name: str, reference: Reference, model: PeftModel, section: ModelSection, quantization: QuantizationSection
) -> Figures:
    """The base's figures; it is loaded anew where `model` has only what PiSSA left of it."""
    if parts_missing_in(model.get_base_model()):
        whole = load_base(section, quantization)
        keep_exact_on_cpu(whole)
        return reference.compare(name, whole)
    with model.disable_adapter():
        return reference.compare(name, model)


_UNQUANTIZED = QuantizationSection.model_validate({"method": "none"})


def _unquantized(section: ModelSection) -> PreTrainedModel:
    model = load_base(section, _UNQUANTIZED)
    keep_exact_on_cpu(model)
    return model
