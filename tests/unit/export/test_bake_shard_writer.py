"""A .safetensors file written in pieces is one that safetensors reads, and has the hash that was told."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qhybrid.export.merged.shard_writer import ShardWriter, TensorPlan

TENSORS = {
    "model.embed": torch.randn(7, 3).bfloat16(),
    'ünï"code': torch.randn(5),
    "empty": torch.empty(0, 4),
    "half": torch.randn(2, 2, 3).half(),
}


def write(file, tensors=TENSORS, pieces: int = 3) -> ShardWriter:
    plans = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(file, plans) as writer:
        for tensor in tensors.values():
            for piece in tensor.split(pieces):
                writer.write(piece)
    return writer


def test_safetensors_reads_it(tmp_path):
    file = tmp_path / "model.safetensors"
    writer = write(file)
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert writer.num_bytes == file.stat().st_size
    assert writer.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_view_is_written_as_its_values(tmp_path):
    tensors = {"turned": torch.arange(6.0).view(2, 3).T}
    write(tmp_path / "file", tensors)
    assert torch.equal(load_file(tmp_path / "file")["turned"], tensors["turned"])


def test_a_link_of_that_name_is_replaced(tmp_path):
    (tmp_path / "elsewhere").write_text("of someone")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "model.safetensors")
    assert (tmp_path / "elsewhere").read_text() == "of someone"
    assert not (tmp_path / "model.safetensors").is_symlink()


def test_less_than_planned_is_a_fault_of_ours(tmp_path):
    plan = [TensorPlan("a", torch.float32, (2,))]
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "file", plan) as writer:
        writer.write(torch.zeros(1))
