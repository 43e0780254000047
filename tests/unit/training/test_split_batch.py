"""Batches in parts: what is run after running out of memory, padded or packed."""

from __future__ import annotations

import torch

from qhybrid.training.batches import num_rows, split_batch


def test_padded_rows_are_split_as_they_are():
    batch = {
        "input_ids": torch.arange(15).view(5, 3),
        "labels": torch.arange(15).view(5, 3),
        "attention_mask": torch.ones(5, 3, dtype=torch.long),
        "use_cache": False,
    }
    assert num_rows(batch) == 5 and split_batch(batch, None) == [batch] and split_batch(batch, 5) == [batch]
    parts = split_batch(batch, 2)
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    assert all(part["use_cache"] is False for part in parts)


def test_packed_rows_are_split_where_one_begins():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1, 2, 3]])
    batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None], "position_ids": positions}
    assert num_rows(batch) == 4
    parts = split_batch(batch, 2)
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1, 2, 0]], [[0, 1, 0, 1, 2, 3]]]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], dim=1), batch["input_ids"])


def test_what_flash_attention_is_given_is_split_with_it():
    batch = {
        "input_ids": torch.arange(6)[None],
        "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]]),
        "seq_idx": torch.tensor([[0, 0, 1, 2, 2, 2]], dtype=torch.int32),
        **{f"cu_seq_lens_{side}": torch.tensor([0, 2, 3, 6], dtype=torch.int32) for side in "qk"},
        **{f"max_length_{side}": 3 for side in "qk"},
    }
    first, second = split_batch(batch, 2)
    for side in "qk":
        assert first[f"cu_seq_lens_{side}"].tolist() == [0, 2, 3] and first[f"max_length_{side}"] == 2
        assert second[f"cu_seq_lens_{side}"].tolist() == [0, 3] and second[f"max_length_{side}"] == 3
        assert second[f"cu_seq_lens_{side}"].dtype == torch.int32
    assert first["seq_idx"].tolist() == [[0, 0, 1]] and second["seq_idx"].tolist() == [[0, 0, 0]]
