"""New folders: whole or not there, never in the place of what the user has, and one writer at a time."""

from __future__ import annotations

import pytest

from qhybrid.errors import ExportError
from qhybrid.export.output import require_free
from qhybrid.export.resumable import new_folder


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "a"
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [ExportError("no"), RuntimeError("a fault"), KeyboardInterrupt(), SystemExit(143)]
)
def test_nothing_is_left_after_an_exception(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("a")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_hidden_folders_of_the_user_stay(tmp_path):
    (tmp_path / ".out.old").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.old").is_dir()


def test_of_two_writers_the_second_is_refused(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ExportError, match="another process is writing"), new_folder(tmp_path / "out"):
            raise AssertionError("not reached")
    assert (tmp_path / "out" / "file").read_text() == "first"


@pytest.mark.parametrize("name", ["", "..", ".hidden", "-rf", "a\nb", "a\u202eb", "a\\b", "a" * 300])
def test_names_that_programs_stumble_over_are_refused(tmp_path, name):
    with pytest.raises(ExportError):
        require_free(tmp_path / "x" / name if name else type(tmp_path)(""))
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        require_free(tmp_path / "file" / "out")
