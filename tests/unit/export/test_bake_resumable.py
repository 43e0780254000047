"""What a folder that is written in several attempts keeps of the earlier ones."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from qhybrid.errors import ExportError, ProofError
from qhybrid.export import resumable
from qhybrid.export.resumable import PartialFolder, partial_of, resumable_folder


def put(part: PartialFolder, name: str, text: str | None = None) -> None:
    text = text or f"content of {name}"
    (part.folder / name).write_text(text)
    facts = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}
    part.finish(name, facts)


def interrupted(out: Path, error: BaseException | type[BaseException] = KeyboardInterrupt) -> None:
    """An attempt that finishes a and b, and ends within c."""
    with pytest.raises(error if isinstance(error, type) else type(error)), resumable_folder(out, "job") as part:
        put(part, "a")
        put(part, "b")
        (part.folder / "c").write_text("half")
        (part.folder / "sub").mkdir()
        raise error


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results" / "merged"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_folder_appears_at_the_end_without_traces(out):
    with resumable_folder(out, "job") as part:
        put(part, "a")
        assert not out.exists()
    assert names(out.parent) == ["merged"] and names(out) == ["a"]


def test_finished_files_stay_after_an_interruption(out):
    interrupted(out)
    assert names(out.parent) == [".merged.partial"]
    assert "c" not in names(partial_of(out)) and "sub" not in names(partial_of(out))
    before = (partial_of(out) / "a").stat()
    with resumable_folder(out, "job") as part:
        assert part.is_finished("a") and part.is_finished("b") and not part.is_finished("c")
    assert (out / "a").stat().st_ino == before.st_ino and names(out) == ["a", "b"]


def test_another_job_begins_anew(out):
    interrupted(out)
    with resumable_folder(out, "another job") as part:
        assert names(part.folder) == [] and not part.is_finished("a")
    assert names(out) == []


@pytest.mark.parametrize("damage", ["other content", "shorter", "gone", "a link"])
def test_a_damaged_file_is_found(out, damage):
    interrupted(out)
    file = partial_of(out) / "a"
    text = file.read_text()
    if damage == "gone":
        file.unlink()
    elif damage == "a link":
        file.rename(out.parent / "elsewhere")
        file.symlink_to(out.parent / "elsewhere")
    else:
        file.write_text(text.replace("c", "C") if damage == "other content" else text[:-1])
    with resumable_folder(out, "job") as part:
        assert not part.is_finished("a") and part.is_finished("b")
        assert names(part.folder) == ["b", "finished.json"]


@pytest.mark.parametrize("record", ["", "{", "[]", "null", '{"job": "job"}', '{"job": "job", "files": {"a": 1}}'])
def test_a_record_that_cannot_be_read_begins_anew(out, record):
    interrupted(out)
    (partial_of(out) / "finished.json").write_text(record)
    with resumable_folder(out, "job") as part:
        assert names(part.folder) == [] and not part.is_finished("a")


def test_what_would_fail_again_leaves_nothing(out):
    interrupted(out, ProofError("it is wrong"))
    assert names(out.parent) == []


def test_nothing_finished_leaves_nothing(out):
    with pytest.raises(KeyboardInterrupt), resumable_folder(out, "job") as part:
        (part.folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(out.parent) == []


def test_a_full_disk_is_told_with_what_stays(out):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told = r"merged cannot be written: No space left.*\nhint: what is finished stays in"
    with pytest.raises(ExportError, match=told), resumable_folder(out, "job") as part:
        put(part, "a")
        raise full
    assert names(partial_of(out)) == ["a", "finished.json"]
    with pytest.raises(ExportError, match=r"No space left on device$"), resumable_folder(out, "other") as part:
        raise full
    assert names(out.parent) == []


def test_a_disk_that_is_too_small_is_refused_at_once(out, monkeypatch):
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 2048))
    told = r"2\.00 KiB are free and 3\.00 KiB are needed"
    with pytest.raises(ExportError, match=told), resumable_folder(out, "job") as part:
        part.require_space(3072)
    interrupted(out)
    with resumable_folder(out, "job") as part:  # what is there need not be written
        part.require_space(2048 + 2 * len("content of a"))


def test_two_at_a_time_are_refused(out):
    interrupted(out)
    descriptor = os.open(partial_of(out), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another process is writing"), resumable_folder(out, "job"):
            pass
    finally:
        os.close(descriptor)
    with resumable_folder(out, "job") as part:
        assert part.is_finished("a")


def test_a_link_in_its_place_is_not_followed(out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("of someone")
    out.parent.mkdir()
    partial_of(out).symlink_to(tmp_path / "elsewhere")
    with resumable_folder(out, "job") as part:
        put(part, "a")
    assert names(tmp_path / "elsewhere") == ["file"] and names(out) == ["a"]


def test_something_that_took_the_place_meanwhile_stays(out):
    with pytest.raises(ExportError, match="cannot be written"), resumable_folder(out, "job") as part:
        put(part, "a")
        out.mkdir()
        (out / "mine").write_text("of the user")
    assert names(out) == ["mine"] and "a" in names(partial_of(out))


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError), resumable_folder(tmp_path / "file" / "merged", "job"):
        pass
    assert resumable.partial_of(tmp_path / "x").name == ".x.partial"
