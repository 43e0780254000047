"""Batches in parts: what goes through the model after it ran out of memory."""

from __future__ import annotations

from typing import Any

import torch


def split_batch(inputs: dict[str, Any], rows: int | None) -> list[dict[str, Any]]:
    """A batch in parts of at most `rows` rows. Packed rows lie one after another in one row of tokens."""
    if rows is None or rows >= num_rows(inputs):
        return [inputs]
    packed = _is_packed(inputs)
    length = inputs["input_ids"].shape[1 if packed else 0]
    begins = (_starts(inputs) if packed else list(range(length)))[::rows]
    return [
        _part(inputs, 1 if packed else 0, begin, end)
        for begin, end in zip(begins, [*begins[1:], length], strict=True)
    ]


def _part(inputs: dict[str, Any], dimension: int, begin: int, end: int) -> dict[str, Any]:
    length = inputs["input_ids"].shape[dimension]
    part = dict(inputs)
    for key, value in inputs.items():
        if torch.is_tensor(value) and value.dim() > dimension and value.shape[dimension] == length:
            part[key] = value.narrow(dimension, begin, end - begin)
    if dimension == 1 and "seq_idx" in part:  # the number of each token's row
        part["seq_idx"] = part["seq_idx"] - part["seq_idx"][0, 0]
    if (
        dimension == 1 and "cu_seq_lens_q" in part
    ):  # where rows begin and end, and the longest, for flash attention
        borders = torch.tensor([*_starts(part), end - begin])
        for side in ("q", "k"):
            whole = inputs[f"cu_seq_lens_{side}"]
            part[f"cu_seq_lens_{side}"] = borders.to(whole.device, whole.dtype)
            part[f"max_length_{side}"] = int(borders.diff().max())
    return part


def num_rows(inputs: dict[str, Any]) -> int:
    """The rows that a batch can be split into."""
    return len(_starts(inputs)) if _is_packed(inputs) else len(inputs["input_ids"])


def _is_packed(inputs: dict[str, Any]) -> bool:
    return len(inputs["input_ids"]) == 1 and "position_ids" in inputs


def _starts(inputs: dict[str, Any]) -> list[int]:
    """Where rows begin in a row of tokens."""
    return torch.nonzero(inputs["position_ids"][0] == 0).flatten().tolist()
