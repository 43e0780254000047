"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qhybrid.disk import whole_folder


def content_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as staging:
        (staging / "weights").write_text(text)
        assert not folder.exists() or content_of(folder) != {"weights": text}
        (staging / "peft").mkdir()
        (staging / "peft" / "config").write_text(text)


def test_it_appears_at_the_end_and_replaces_what_was_there(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "run" / "adapter", text)
        assert content_of(tmp_path / "run") == {"adapter/weights": text, "adapter/peft/config": text}
    assert os.listdir(tmp_path / "run") == ["adapter"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("where", ["in the block", "first rename", "second rename"])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, before, where):
    folder = tmp_path / "adapter"
    if before:
        write(folder, before)
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == (1 if where == "first rename" else 1 + bool(before)):
            raise KeyboardInterrupt
        return rename(self, target)

    if where != "in the block":
        monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as staging:
        (staging / "weights").write_text("new")
        if where == "in the block":
            raise KeyboardInterrupt
    expected = {"adapter/weights": before, "adapter/peft/config": before} if before else {}
    assert content_of(tmp_path) == expected


def test_what_a_killed_process_left(tmp_path):
    """In the block, or between the two renames: the old folder has its name again while a new one is written."""
    folder = tmp_path / "adapter"
    for name in (".adapter.partial", ".adapter.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    with pytest.raises(RuntimeError), whole_folder(folder) as staging:
        assert content_of(staging) == {} and content_of(folder) == {"weights": ".adapter.old"}
        raise RuntimeError
    assert content_of(tmp_path) == {"adapter/weights": ".adapter.old"}


def test_a_link_of_that_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("of someone")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "run" / "adapter", "new")
    assert content_of(tmp_path / "elsewhere") == {"weights": "of someone"}
    assert not (tmp_path / "run" / "adapter").is_symlink()
    assert os.listdir(tmp_path / "run") == ["adapter"]
