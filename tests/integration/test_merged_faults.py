"""A merge that was interrupted, killed or stopped by a full disk goes on, to the same bytes."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.disk import FullDisk
from merged_helpers import NF4, Trained, content_of, shards

from qhybrid.errors import ExportError
from qhybrid.export.merged.bake import bake
from qhybrid.export.merged.shard_writer import ShardWriter
from qhybrid.export.resumable import partial_of
from qhybrid.recipe.schema import ModelSection


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Trained, Path]:
    """A model of several shards, and its merged form without interruption."""
    folder = tmp_path_factory.mktemp("sharded")
    trained = Trained(folder)
    trained.section = ModelSection(path=str(shards(trained.base, "200KB")), dtype="float32")
    trained.bake(folder / "whole", "nf4")
    return trained, folder / "whole"


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")} if folder.is_dir() else {}


@pytest.mark.parametrize("pieces", [1, 12, 25, 40, 57])
def test_an_interruption_at_any_piece(sharded, tmp_path, monkeypatch, pieces):
    trained, whole = sharded
    out, write, count = tmp_path / "out", ShardWriter.write, []

    def interrupted(self, values):
        count.append(1)
        if len(count) == pieces:
            raise KeyboardInterrupt
        write(self, values)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained.bake(out, "nf4")
    assert not out.exists()
    finished = inodes(partial_of(out))
    monkeypatch.setattr(ShardWriter, "write", write)
    baked = trained.bake(out, "nf4")
    assert baked.num_resumed == len(finished) and finished.items() <= inodes(out).items()
    assert content_of(out) == content_of(whole) and sorted(os.listdir(tmp_path)) == ["out"]


def test_a_damaged_shard_is_written_again(sharded, tmp_path, monkeypatch):
    trained, whole = sharded
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), bake(trained.adapter, trained.section, NF4, out, onto="nf4"):
        raise KeyboardInterrupt  # while it is tried out
    damaged = sorted(partial_of(out).glob("*.safetensors"))[1]
    with damaged.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    baked = trained.bake(out, "nf4")
    assert baked.num_resumed == baked.num_shards - 1
    assert content_of(out) == content_of(whole)


def test_other_settings_or_another_base_begin_anew(sharded, tmp_path):
    trained, whole = sharded
    out = tmp_path / "out"

    def interrupt(**options: Any) -> None:
        with pytest.raises(KeyboardInterrupt), bake(trained.adapter, trained.section, NF4, out, **options):
            raise KeyboardInterrupt

    interrupt(onto="16bit")
    interrupt(onto="nf4", dtype="bfloat16")
    assert trained.bake(out, "nf4").num_resumed == 0
    assert content_of(out) == content_of(whole)
    shutil.rmtree(out)
    interrupt(onto="nf4")
    os.utime(next(Path(trained.section.path).glob("*.safetensors")), (1, 1))  # as if it had been replaced
    assert trained.bake(out, "nf4").num_resumed == 0
    assert content_of(out) == content_of(whole)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from qhybrid.adapters.folder import read_plain
from qhybrid.export.merged.bake import bake
from qhybrid.recipe.schema import ModelSection, QuantizationSection

def kill(done, total):
    if done >= total * {share}:
        os.kill(os.getpid(), signal.SIGKILL)

section = ModelSection(path={base!r}, dtype="float32", adapter_dtype="float32")
with bake(read_plain(Path({adapter!r})), section, QuantizationSection(), Path({out!r}), onto="nf4", progress=kill):
    pass
"""


@pytest.mark.parametrize("share", [0.6])
def test_a_kill(sharded, tmp_path, share):
    trained, whole = sharded
    out = tmp_path / "out"
    script = KILLED.format(
        paths=[str(Path(__file__).parents[2])],
        share=share,
        base=trained.section.path,
        adapter=str(trained.folder),
        out=str(out),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    before = inodes(partial_of(out))
    baked = trained.bake(out, "nf4")
    assert 1 <= baked.num_resumed < baked.num_shards
    assert len(before.items() & inodes(out).items()) >= baked.num_resumed
    assert content_of(out) == content_of(whole)


def test_the_disk_fills_at_any_byte(sharded, tmp_path, monkeypatch):
    """While shards or settings are written: no folder, what is finished stays, and the rest follows."""
    trained, whole = sharded
    content = content_of(whole)
    first = min(name for name in content if name.endswith("safetensors"))
    size = sum(len(data) for name, data in content.items() if name.startswith(("model", "config", "generation")))
    for room in (0, 100, len(content[first]), len(content[first]) + 1, size // 2, size - 1):
        out = tmp_path / f"out-{room}"
        monkeypatch.setattr(builtins, "open", FullDisk(room).open)
        with pytest.raises(ExportError, match=r"out-\d+ cannot be written: .*No space left"):
            trained.bake(out, "nf4")
        monkeypatch.undo()
        assert not out.exists()
        finished = inodes(partial_of(out))
        assert bool(finished) == partial_of(out).exists() == (room >= len(content[first]))
        assert trained.bake(out, "nf4").num_resumed == len(finished)
        assert content_of(out) == content
    assert len(finished) == len(inodes(out))  # all but the last byte of the settings
