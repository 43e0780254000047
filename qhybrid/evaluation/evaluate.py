"""Loss, perplexity, exact match and label words over tokenised rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qhybrid.adapters.dora import hold_norms
from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.evaluation.answers import Answer, answer_start, answer_text
from qhybrid.evaluation.forward import batches, scored_logits
from qhybrid.evaluation.labels import LabelledRows, LabelScores


@dataclass(frozen=True)
class Scores:
    """The result: figures over all rows, and those of each row, in the order in which the rows were given."""

    row_losses: tuple[float, ...]  # summed cross-entropy of the row's scored tokens, in nats
    row_tokens: tuple[int, ...]  # scored ones
    answers: tuple[Answer | None, ...] = ()  # one for each row, None where it has no prompt; empty if not asked
    labels: LabelScores | None = None

    @property
    def num_rows(self) -> int:
        """How many rows were scored."""
        return len(self.row_losses)

    @property
    def num_tokens(self) -> int:
        """How many tokens were scored."""
        return sum(self.row_tokens)

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a scored token, in nats."""
        return sum(self.row_losses) / max(1, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))

    @property
    def given_answers(self) -> tuple[Answer, ...]:
        """The answers of the rows that have a prompt."""
        return tuple(answer for answer in self.answers if answer is not None)

    @property
    def exact_match(self) -> float | None:
        """The share of given answers that are exact; None without any."""
        given = self.given_answers
        return sum(answer.is_exact for answer in given) / len(given) if given else None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    answer_after: str | None = None,
    labelled: LabelledRows | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> Scores:
    """Score `rows`, and answer them greedily unless `max_new_tokens` is None.

    Rows that are scored from their first token on have no prompt; they are left out of exact match.

    Args:
        answer_after: only what follows this text counts in an answer, as in `result_after`.
        labelled: the rows' labels; each is predicted from the same forward pass that gives the loss.
    """
    with torch.no_grad(), hold_norms(model), _evaluation_mode(model):
        losses, tokens, predicted = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
        places = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))  # as `batches` takes them
        done = 0
        for batch in batches([rows[i] for i in places], batch_size, model):
            logits, targets = scored_logits(model, batch)
            each = F.cross_entropy(logits.float(), targets, reduction="none").double()
            counts = [int((row.labels[1:] != IGNORED_LABEL).sum()) for row in batch]
            own = places[done : done + len(batch)]
            for i, part in zip(own, each.split(counts), strict=True):
                losses[i], tokens[i] = part.sum().item(), len(part)
            if labelled is not None:
                starts = np.cumsum([0, *counts[:-1]])
                first = [int((row.labels[1 : answer_start(row)] != IGNORED_LABEL).sum()) for row in batch]
                for i, label in zip(own, labelled.predicted(logits[starts + first]), strict=True):
                    predicted[i] = label
            done += len(batch)
            progress("loss", done)
        answers: list[Answer | None] = [None] * len(rows) if max_new_tokens is not None else []
        if max_new_tokens is not None:
            asked = [(i, row) for i, row in enumerate(rows) if answer_start(row) > 1]
            asked.sort(key=lambda pair: answer_start(pair[1]))  # little padding
            for start in range(0, len(asked), batch_size):
                batch = asked[start : start + batch_size]
                generated = _generate(model, tokenizer, [row for _, row in batch], max_new_tokens, answer_after)
                for (i, _), answer in zip(batch, generated, strict=True):
                    answers[i] = answer
                progress("answers", start + len(batch))
    scores = None
    if labelled is not None:
        scores = LabelScores(labelled.labels, labelled.expected, tuple(predicted))
    return Scores(tuple(losses), tuple(tokens), tuple(answers), scores)


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the model's own taste in generation.

    `generate` fills what a call leaves out from the model's generation_config, such as a repetition penalty,
    which changes greedy answers that have to copy from the prompt.
    """
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=own_config.eos_token_id)
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = own_config


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[EncodedRow],
    max_new_tokens: int,
    answer_after: str | None,
) -> list[Answer]:
    """Greedy answers to the prompts of a batch, padded on the left."""
    prompts = [row.input_ids[: answer_start(row)].tolist() for row in batch]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = torch.tensor(prompt), 1
    stops = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops |= set(configured if isinstance(configured, list) else [configured])
    stops.discard(None)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted(stops),
    )

    return [
        Answer(
            prompt=tokenizer.decode(prompt),
            expected=answer_text(tokenizer, row),
            generated=tokenizer.decode(produced[longest:].tolist(), skip_special_tokens=True),
            is_cut_off=len(produced) == longest + max_new_tokens and stops.isdisjoint(produced[longest:].tolist()),
            after=answer_after,
        )
        for row, prompt, produced in zip(batch, prompts, output, strict=True)
    ]
