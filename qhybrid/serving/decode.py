"""The batch that decodes: rows of any adapters and lengths come in and leave between two steps.

Rows are padded on the left, so every row's last token is in the last column. A row that comes in is prefilled with
those that come with it and joined; one that leaves is cut out, with the columns that only it used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from qhybrid.serving.sampling import Sampler, next_tokens
from qhybrid.serving.text import TextStream

_PREFILL_TOKENS = 16384  # padding included; longer prompts are prefilled one after the other

# (adapters by row, ids (rows, new), mask (rows, columns), cache) -> logits (rows, vocabulary) of the last column
Forward = Callable[[Sequence[str], Tensor, Tensor, DynamicCache], Tensor]


@dataclass(eq=False)
class Completion:
    """A prompt and its answer, which grows.

    Attributes:
        adapter: the engine's internal name of what answers.
        ids: the prompt's tokens and, behind them, the answer's, the end token included.
        ends: tokens that end the answer.
        sampler: None takes the likeliest token each time.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens), "error" (the model computed
            values that are not finite), or None while the answer grows.
    """

    adapter: str
    ids: list[int]
    max_tokens: int
    ends: frozenset[int]
    text: TextStream
    sampler: Sampler | None = None
    finish_reason: Literal["stop", "length", "error"] | None = None
    num_prompt_tokens: int = field(init=False)
    _unread: str = field(default="", init=False)

    def __post_init__(self) -> None:
        assert self.ids and self.max_tokens > 0
        self.num_prompt_tokens = len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Of the answer."""
        return len(self.ids) - self.num_prompt_tokens

    def take(self, token: int | None) -> None:
        """Append the next token; None for values that are not finite."""
        if token is None:
            self.finish_reason = "error"
            return
        self.ids.append(token)
        if token in self.ends:
            self.finish_reason = "stop"
            self._unread += self.text.close()
            return
        self._unread += self.text.push(token)
        if not self.text.stopped and self.num_tokens == self.max_tokens:
            self.finish_reason = "length"
            self._unread += self.text.close()
        if self.text.stopped:
            self.finish_reason = "stop"

    def read(self) -> str:
        """The text that can be shown and was not read yet."""
        text, self._unread = self._unread, ""
        return text


class Batch:
    """The rows that are being decoded together."""

    def __init__(self, forward: Forward, pad: int, device: torch.device) -> None:
        self._forward, self._pad, self._device = forward, pad, device
        self._rows: list[Completion] = []
        self._state: _State | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Sequence[Completion]) -> None:
        """Prefill `rows` and choose one token for each; those that are not finished by it are in the batch.

        A row that was in a batch before goes on where it was.
        """
        for chunk in _chunks(rows):
            longest = max(len(row.ids) for row in chunk)
            ids = torch.full((len(chunk), longest), self._pad)
            mask = torch.zeros(len(chunk), longest, dtype=torch.long)
            for i, row in enumerate(chunk):
                ids[i, longest - len(row.ids) :], mask[i, longest - len(row.ids) :] = torch.tensor(row.ids), 1
            state = _State(DynamicCache(), mask.to(self._device))
            self._advance(chunk, ids, state)
            kept = [i for i, row in enumerate(chunk) if row.finish_reason is None]
            if kept:
                if len(kept) < len(chunk):
                    state.keep(kept)
                self._rows += [chunk[i] for i in kept]
                self._state = state if self._state is None else self._state.joined(state)

    def step(self) -> None:
        """Choose one more token for every row; the finished leave."""
        assert self._state is not None
        self._state.mask = F.pad(self._state.mask, (0, 1), value=1)
        ids = torch.tensor([[row.ids[-1]] for row in self._rows])
        self._advance(self._rows, ids, self._state)
        self.drop([row for row in self._rows if row.finish_reason is not None])

    def drop(self, rows: Collection[Completion]) -> None:
        """Cut rows out."""
        kept = [i for i, row in enumerate(self._rows) if row not in rows]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            self._state = None
        elif self._state is not None:
            self._state.keep(kept)

    def _advance(self, rows: Sequence[Completion], ids: Tensor, state: _State) -> None:
        logits = self._forward([row.adapter for row in rows], ids.to(self._device), state.mask, state.cache)
        for row, token in zip(rows, next_tokens(logits, [row.sampler for row in rows]), strict=True):
            row.take(token)


def _chunks(rows: Sequence[Completion]) -> Iterator[list[Completion]]:
    chunk: list[Completion] = []
    for row in rows:
        longest = max([len(row.ids), *(len(other.ids) for other in chunk)])
        if chunk and (len(chunk) + 1) * longest > _PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


@dataclass
class _State:
    """The keys and values of all rows (rows, heads, columns, width), and which columns are no padding."""

    cache: DynamicCache
    mask: Tensor  # (rows, columns)

    def keep(self, rows: Sequence[int]) -> None:
        """These rows alone, without the columns that were padding for all of them."""
        mask = self.mask[list(rows)]
        first = int(mask.any(0).int().argmax())
        self.mask = mask[:, first:]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[list(rows), :, first:])

    def joined(self, other: _State) -> _State:
        """The rows of both; `other` is used up. One layer at a time, so that little is in memory twice."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = [getattr(part, name) for part in (layer, more)]
                padded = [F.pad(part, (0, 0, columns - part.shape[2], 0)) for part in parts]
                setattr(layer, name, torch.cat(padded))
                setattr(more, name, None)
        masks = [F.pad(part, (columns - part.shape[1], 0)) for part in (self.mask, other.mask)]
        return _State(self.cache, torch.cat(masks))
