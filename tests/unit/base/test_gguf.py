"""A conversion is done once, never used half done, and safe beside another one."""

import threading

import pytest

from qhybrid.base import gguf
from qhybrid.errors import ModelError


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("QHYBRID_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.Q4.gguf"
    path.write_bytes(b"GGUF and the rest")
    (tmp_path / "config.json").write_text("a neighbour that is none of ours")
    return path


def conversion_that_writes(text):
    def convert(source, file_name, result, path):
        assert [entry.name for entry in source.iterdir()] == [file_name] == [path.name]
        assert (source / file_name).read_bytes() == path.read_bytes()
        result.mkdir()
        (result / "config.json").write_text(text)

    return convert


def test_converts_once_per_content(source, monkeypatch):
    monkeypatch.setattr(gguf, "_convert", conversion_that_writes("first"))
    folder = gguf.gguf_to_folder(source)
    assert folder.parent.name == "cache" and folder.name.startswith("model.Q4-")
    assert len(folder.name) == len("model.Q4-") + 16
    monkeypatch.setattr(gguf, "_convert", conversion_that_writes("second"))
    assert gguf.gguf_to_folder(source) == folder and (folder / "config.json").read_text() == "first"
    source.write_bytes(b"GGUF and another rest")
    other = gguf.gguf_to_folder(source)
    assert other != folder and (other / "config.json").read_text() == "second"


def test_an_interrupted_conversion_leaves_nothing(source, monkeypatch):
    def interrupted(source, file_name, result, path):
        result.mkdir()
        (result / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf.gguf_to_folder(source)
    assert list((source.parent / "cache").iterdir()) == []
    monkeypatch.setattr(gguf, "_convert", conversion_that_writes("whole"))
    assert (gguf.gguf_to_folder(source) / "config.json").read_text() == "whole"


def test_two_conversions_at_the_same_time_give_one_folder(source, monkeypatch):
    both_at_work = threading.Barrier(2, timeout=10)
    write = conversion_that_writes("whole")

    def convert(*arguments):
        both_at_work.wait()
        write(*arguments)

    monkeypatch.setattr(gguf, "_convert", convert)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(gguf.gguf_to_folder(source))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert list((source.parent / "cache").iterdir()) == [folders[0]]


def test_what_is_no_gguf_file(source):
    source.write_bytes(b"GGML")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        gguf.gguf_to_folder(source)
    with pytest.raises(ModelError, match="cannot convert"):
        gguf.gguf_to_folder(source.parent / "none.gguf")


def test_a_file_that_transformers_cannot_read_is_named(source):
    with pytest.raises(ModelError, match=r"transformers cannot read .*model\.Q4\.gguf"):
        gguf.gguf_to_folder(source)
    assert list((source.parent / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(source, monkeypatch):
    (source.parent / "file").write_text("")
    monkeypatch.setenv("QHYBRID_CACHE", str(source.parent / "file" / "cache"))
    with pytest.raises(ModelError, match="cannot convert") as caught:
        gguf.gguf_to_folder(source)
    assert "QHYBRID_CACHE" in caught.value.hint
