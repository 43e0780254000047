"""Forward passes over tokenised rows: in batches of like length, with the logits of the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow

_LOGIT_BYTES = 2**29  # logits (batch, tokens, vocabulary) in fp32 are kept below this


def batches(rows: Sequence[EncodedRow], batch_size: int, model: PreTrainedModel) -> Iterator[list[EncodedRow]]:
    """Rows by length, in batches whose logits stay within bounds."""
    vocabulary = model.config.get_text_config().vocab_size
    batch: list[EncodedRow] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        if batch and (
            len(batch) == batch_size or (len(batch) + 1) * len(row.input_ids) * vocabulary * 4 > _LOGIT_BYTES
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(batch: Sequence[EncodedRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and the mask of real tokens (rows, longest) of a batch, padded on the right; int64, CPU."""
    longest = max(len(row.input_ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED_LABEL)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for i, row in enumerate(batch):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.from_numpy(row.input_ids), torch.from_numpy(row.labels), 1
    return ids, labels, mask


def scored_logits(model: PreTrainedModel, batch: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
    """Logits (tokens, vocabulary) that predict a batch's scored tokens, and those tokens (tokens,), row by row."""
    ids, labels, mask = padded(batch)
    device = model.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    targets = labels[:, 1:].to(device)
    scored = targets != IGNORED_LABEL
    return logits[:, :-1][scored], targets[scored]
