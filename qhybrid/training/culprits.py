"""Which rows of the data files a batch was made of, told from its tokens, packed or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from qhybrid.data.prepare import PreparedData


def rows_of(batches: Iterable[Mapping[str, Tensor]], data: PreparedData) -> list[str]:
    """The rows as "train.jsonl 17", each once, in the order of the batches.

    Rows are told apart by their tokens, so of equal rows the first is named. Pieces that are no whole row (packing
    with the strategy wrapped cuts them) are left out.

    Args:
        batches: with input_ids (batch, tokens), and attention_mask or position_ids beside them.
    """
    wanted = [piece.tobytes() for batch in batches for piece in _pieces(batch)]
    found: dict[bytes, int] = {}
    missing = set(wanted)
    column = data.train.with_format("numpy")["input_ids"]
    for index, ids in enumerate(column):
        key = np.asarray(ids, dtype=np.int32).tobytes()
        if key in missing:
            missing.discard(key)
            found[key] = index
            if not missing:
                break
    return list(dict.fromkeys(data.origin(found[key]) for key in wanted if key in found))


def _pieces(batch: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    ids = batch["input_ids"].detach().cpu()
    if "attention_mask" in batch:
        mask = batch["attention_mask"].detach().cpu().bool()
        for row, kept in zip(ids, mask, strict=True):
            yield row[kept].numpy().astype(np.int32)
        return
    positions = batch["position_ids"].detach().cpu()
    for row, position in zip(ids, positions, strict=True):
        starts = torch.nonzero(position == 0).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], len(row)], strict=True):
            yield row[begin:end].numpy().astype(np.int32)
