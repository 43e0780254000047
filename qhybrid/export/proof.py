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
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.dora import hold_norms
from qhybrid.adapters.plain import PlainAdapter
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import ProofError
from qhybrid.evaluation.forward import batches, scored_logits
from qhybrid.export.merged.bake import merge_in_place
from qhybrid.export.merged.rows import Onto
from qhybrid.recipe.schema import ModelSection, QuantizationSection

_MOST_KEPT_BYTES = 2**30  # log-probabilities of the reference are kept in fp32 up to this
_BATCH_SIZE = 16
_NEAR = 0.01  # a merged model whose figures are its base's up to this share of what training moved is that base
# The least agreement with the reference, by the weights that the adapter was merged into. On the dequantised NF4
# weights only rounding is left; on the 16-bit ones the reference's own 4-bit error shows.
DEFAULT_MARKS = {"nf4": 0.95, "16bit": 0.7}

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
    mark: float  # the least agreement that passes

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
        mark: the least agreement that passes; by default that of DEFAULT_MARKS.

    Raises:
        ProofError: the merged model equals its base, or agrees with the trained one on too few tokens.
    """
    base = load_base(section, quantization)
    model = attach_plain(base, trained.modules, dtype=getattr(torch, section.resolved_adapter_dtype))
    reference = Reference(model, rows)
    is_quantized = quantization.method != "none"
    bits = "4-bit" if is_quantized else "16-bit"
    figures = [reference.own(f"{bits} + adapter")]
    with model.disable_adapter():
        figures.append(reference.compare(f"{bits} base", model))
    del base, model
    bases = {"nf4": figures[1], "16bit": figures[1]}
    forms: tuple[Onto, ...] = ("16bit", "nf4") if is_quantized else ("16bit",)
    assert onto in forms
    for form in forms:
        model = None
        if is_quantized and form == "16bit":
            model = _unquantized(section)
            bases["16bit"] = reference.compare("16-bit base", model)
            figures.append(bases["16bit"])
        if form == onto and written is not None:
            model = _unquantized(section.model_copy(update={"path": str(written), "revision": None}))
        else:
            model = model or _unquantized(section)
            merge_in_place(model, adapter, onto=form, section=section, quantization=quantization)
        figures.append(reference.compare(_FORMS[form], model))
        del model
    proof = Proof(
        rows=reference.num_rows,
        tokens=reference.num_tokens,
        data=data,
        figures=tuple(figures),
        artefact=_FORMS[onto],
        mark=DEFAULT_MARKS[onto] if mark is None else mark,
    )
    _judge(proof, bases[onto])
    return proof


def _judge(proof: Proof, base: Figures) -> None:
    trained, merged, untrained = proof.figures[0], proof[proof.artefact], proof.figures[1]
    lines = "\n".join(
        "  ".join(cell.ljust(26 if i == 0 else 10) for i, cell in enumerate(row)) for row in proof.table()
    )
    if untrained.kl == 0:
        raise ProofError(f"the adapter changes nothing: the model predicts as its base does\n{lines}")
    moved = abs(trained.loss - untrained.loss)
    if merged.kl >= (1 - _NEAR) * base.kl and abs(merged.loss - base.loss) <= _NEAR * moved:
        raise ProofError(
            f"the merged model equals the base: the adapter was lost\n{lines}",
            hint="its change is smaller than the rounding of the weights' dtype: merge with --dtype float32",
        )
    if merged.agreement < proof.mark:
        raise ProofError(
            f"the merged model has the trained one's most probable token at {merged.agreement:.1%} of "
            f"{proof.tokens} tokens, below the mark of {proof.mark:.1%}\n{lines}",
            hint="--onto nf4 merges into the weights that training saw; --min-agreement sets the mark",
        )


def _unquantized(section: ModelSection) -> PreTrainedModel:
    model = load_base(section, QuantizationSection.model_validate({"method": "none"}))
    keep_exact_on_cpu(model)
    return model
