"""Which rows make up each batch: an order that depends on seed and epoch alone, not on how batches are split.

Two processes with micro-batches of 2, one with 4, and one with 2 accumulated twice take the same rows at every
step. Where the rows of an epoch do not fill the last batches, blank rows without labels do; accelerate would take
some rows twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Strategy = Literal["random", "sequential", "group_by_length"]


class EpochOrder(Sampler[int]):
    """The rows' numbers in the order of an epoch, and that of the blank row as often as needed."""

    def __init__(
        self,
        num_rows: int,
        *,
        strategy: Strategy,
        seed: int,
        fill_to: int,
        lengths: Sequence[int] | None = None,
        step_rows: int = 1,
    ) -> None:
        """
        Args:
            fill_to: the number of rows becomes a multiple of this with blank rows, whose number is `num_rows`.
            lengths: tokens of every row, for group_by_length.
            step_rows: rows of an optimizer step, within which group_by_length wants rows to be alike.
        """
        self._num_rows, self._strategy, self._seed, self._epoch = num_rows, strategy, seed, 0
        self._num_blank = -num_rows % fill_to
        self._lengths, self._step_rows = lengths, step_rows

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows + self._num_blank

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        if self._strategy == "random":
            yield from torch.randperm(self._num_rows, generator=generator).tolist()
        elif self._strategy == "sequential":
            yield from range(self._num_rows)
        else:
            yield from get_length_grouped_indices(self._lengths, self._step_rows, generator=generator)
        yield from [self._num_rows] * self._num_blank
        self._epoch += 1  # for who does not set it


class WithBlankRow(torch.utils.data.Dataset):
    """A data set with one row more: a single token that is not trained."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        first = rows[0]
        self._blank = {**{key: value[:1] for key, value in first.items()}, "labels": [-100]}
        if "seq_lengths" in first:  # of packed rows
            self._blank["seq_lengths"] = [1]

    def __len__(self) -> int:
        return len(self._rows) + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._blank if index == len(self._rows) else self._rows[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows in one access, as torch's loader asks for."""
        real = [index for index in indices if index < len(self._rows)]
        return (
            [*self._rows.__getitems__(real), *[self._blank] * (len(indices) - len(real))]
            if real
            else [self._blank] * len(indices)
        )
