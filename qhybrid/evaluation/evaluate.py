"""Loss, perplexity and exact match over tokenised rows."""

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
from qhybrid.evaluation.forward import batches, scored_logits


def answer_start(row: EncodedRow) -> int:
    """Where the last scored run of tokens begins: the answer that generation must give."""
    scored = row.labels != IGNORED_LABEL
    if not scored.any():
        return 0
    last = int(np.flatnonzero(scored)[-1])
    unscored = np.flatnonzero(~scored[:last])
    return int(unscored[-1]) + 1 if len(unscored) else 0


@dataclass(frozen=True)
class Answer:
    """What the model generated for one row, and what the row says."""

    prompt: str
    expected: str
    generated: str
    is_cut_off: bool  # max_new_tokens came before an end token

    @property
    def is_exact(self) -> bool:
        """Whether both are the same text, blanks at the ends aside."""
        return self.generated.strip() == self.expected.strip()


@dataclass(frozen=True)
class Scores:
    """The result: figures over all rows, and each row's answer when answers were generated."""

    num_rows: int
    num_tokens: int  # scored ones
    loss: float  # mean cross-entropy of a scored token, in nats
    exact_match: float | None  # share of rows; None without generation
    answers: tuple[Answer, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> Scores:
    """Score `rows`, and answer them greedily unless `max_new_tokens` is None.

    Rows that are scored from their first token on have no prompt; they are left out of exact match.
    """
    with torch.no_grad(), hold_norms(model), _evaluation_mode(model):
        total, num_tokens, done = 0.0, 0, 0
        for batch in batches(rows, batch_size, model):
            logits, targets = scored_logits(model, batch)
            total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            num_tokens, done = num_tokens + len(targets), done + len(batch)
            progress("loss", done)
        answers: dict[int, Answer] = {}
        if max_new_tokens is not None:
            asked = [(i, row) for i, row in enumerate(rows) if answer_start(row) > 1]
            asked.sort(key=lambda pair: answer_start(pair[1]))  # little padding
            for start in range(0, len(asked), batch_size):
                batch = asked[start : start + batch_size]
                generated = _generate(model, tokenizer, [row for _, row in batch], max_new_tokens)
                answers |= {i: answer for (i, _), answer in zip(batch, generated, strict=True)}
                progress("answers", start + len(batch))
    ordered = tuple(answers[i] for i in sorted(answers))
    exact = sum(answer.is_exact for answer in ordered) / len(ordered) if ordered else None
    return Scores(len(rows), num_tokens, total / max(1, num_tokens), exact, ordered)


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[EncodedRow], max_new_tokens: int
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

    def text(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return [
        Answer(
            prompt=tokenizer.decode(prompt),
            expected=text([token for token in row.labels[answer_start(row) :].tolist() if token != IGNORED_LABEL]),
            generated=text(produced[longest:].tolist()),
            is_cut_off=len(produced) == longest + max_new_tokens and stops.isdisjoint(produced[longest:].tolist()),
        )
        for row, prompt, produced in zip(batch, prompts, output, strict=True)
    ]
