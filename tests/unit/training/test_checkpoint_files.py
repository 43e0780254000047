"""What a checkpoint needs besides its folder: files of tensors, and room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.errors import RunFolderError
from qhybrid.training.checkpoint import require_space


def test_tensors_come_back_as_they_were(tmp_path):
    flat = torch.arange(12, dtype=torch.float32)
    tensors = {
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.ones(1).expand(3),
        "bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "names with ü": torch.tensor([True, False]),
        "first part": flat[:5],
        "second part": flat[5:],
        "trained": torch.nn.Parameter(torch.randn(2, 2)),
    }
    file = tmp_path / "state.safetensors"
    write_tensors(file, tensors, {"step": "3", "ä": "ö"})
    back = read_tensors(file)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"step": "3", "ä": "ö"}
    file.unlink()
    assert torch.equal(back["first part"], flat[:5])


def test_equal_tensors_give_equal_bytes(tmp_path):
    """safetensors writes the metadata in another order each time."""
    tensors = {name: torch.ones(3) for name in "cab"}
    metadata = {f"key {i}": str(i) for i in range(8)}
    written = set()
    for attempt in range(10):
        write_tensors(tmp_path / f"{attempt}", tensors, metadata)
        written.add((tmp_path / f"{attempt}").read_bytes())
    write_tensors(tmp_path / "last", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert written == {(tmp_path / "last").read_bytes()}
    assert int.from_bytes(written.pop()[:8], "little") % 8 == 0


def test_files_of_tensors_can_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors' save_file makes them for the owner alone."""
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "state.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_an_os_error(tmp_path):
    """safetensors' save_file raises an error of its own."""
    (tmp_path / "state.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "state.safetensors", {"a": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100])
def test_a_file_without_tensors_is_named(tmp_path, content):
    (tmp_path / "optimizer.safetensors").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"optimizer\.safetensors is not a whole"):
        read_tensors(tmp_path / "optimizer.safetensors")
    with pytest.raises(RunFolderError, match=r"scheduler\.safetensors cannot be read: No such file"):
        read_tensors(tmp_path / "scheduler.safetensors")


Usage = namedtuple("Usage", "total used free")


def test_twice_a_checkpoint_must_be_free(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return Usage(10_000, 0, 2 * 1024)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "runs" / "demo"  # neither exists yet
    require_space(folder, 1024)
    with pytest.raises(RunFolderError, match=r"has 2\.00 KiB free; a checkpoint takes 1\.00 KiB") as caught:
        require_space(folder, 1025)
    assert "have 2.00 KiB free there" in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    assert asked == [tmp_path, tmp_path]


def test_a_relative_folder_is_measured_where_it_will_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_space(Path("runs/demo"), 1)
    with pytest.raises(RunFolderError, match="the disk of runs/demo has"):
        require_space(Path("runs/demo"), 2**60)


def test_a_file_system_that_does_not_tell_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    require_space(tmp_path, 2**40)
