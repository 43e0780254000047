"""Reading: row numbers, damaged files, and errors that say what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qhybrid.data.readers import open_source
from qhybrid.errors import DataError
from qhybrid.recipe.schema import SourceSection


def read(path, base_folder=Path("."), **settings):
    stream = open_source(SourceSection(path=str(path), **settings), base_folder)
    return stream.numbering, list(stream.rows)


def error_of(path, base_folder=Path("."), **settings) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, base_folder, **settings)
    assert caught.value.hint, "every data error says what to do"
    assert caught.value.where
    return caught.value


def test_jsonl_rows_are_numbered_by_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n\n{"text": broken\n\xff\xfe{}\n{"text": "five"}')
    numbering, rows = read(file)
    assert numbering == "line"
    assert [(row.number, row.value, row.fault) for row in rows] == [
        (1, {"text": "one"}, None),
        (3, None, "invalid JSON"),
        (4, None, "not valid UTF-8"),
        (5, {"text": "five"}, None),
    ]


def test_jsonl_byte_order_mark_and_nul_are_repaired(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "t\0wo and some more words"}\n')
    _, rows = read(file)
    assert [row.value for row in rows] == [{"text": "one"}, {"text": "two and some more words"}]
    assert [set(row.repairs) for row in rows] == [{"byte order mark removed"}, {"NUL characters removed"}]


@pytest.mark.parametrize("line", [b"[" * 100_000, b"1" * 5000, b'{"a": 1', b"{'a': 1}", b'{"a": 1} {"b": 2}'])
def test_hostile_lines_are_invalid_json(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(line)
    _, rows = read(tmp_path / "a.jsonl")
    assert [row.fault for row in rows] == ["invalid JSON"]


@pytest.mark.parametrize("document", [[{"text": "a"}, 7], {"data": [{"text": "a"}, 7]}])
def test_json_list_or_data_key(tmp_path, document):
    (tmp_path / "a.json").write_text(json.dumps(document))
    numbering, rows = read(tmp_path / "a.json")
    assert numbering == "row"
    assert [(row.number, row.value) for row in rows] == [(1, {"text": "a"}), (2, 7)]


def test_json_errors_name_the_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n{"text": "a"},\n{"text": }\n]')
    assert error_of(file).where == f"{file}:3"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert ".jsonl" in error_of(file).hint
    file.write_text('{"rows": []}')
    assert "not a list of rows" in error_of(file).message
    file.write_bytes(b'[\n{"text": "\xff"}]')
    assert error_of(file).where == f"{file}:2"
    file.write_text("[" * 100_000)
    error_of(file)


def test_csv_rows(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b'\xef\xbb\xbfprompt,completion\nq1,"a, ""1""\nline two"\n\nq2,a2,extra\nq2,a2,,\n'
        b'q3,\xff\nq4\nq5,"a"x\nq6,a6\n'
    )
    numbering, rows = read(file)
    assert numbering == "data row"
    assert [(row.number, row.value, row.fault) for row in rows] == [
        (1, {"prompt": "q1", "completion": 'a, "1"\nline two'}, None),
        (2, None, "more cells than the header has columns"),
        (3, {"prompt": "q2", "completion": "a2"}, None),
        (4, None, "not valid UTF-8"),
        (5, {"prompt": "q4"}, None),
        (6, None, "invalid CSV"),
        (7, {"prompt": "q6", "completion": "a6"}, None),
    ]


def test_csv_with_an_open_quote_would_swallow_rows(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"a\nb\nc\n')
    assert "never closed" in error_of(tmp_path / "a.csv").message
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert "two columns" in error_of(tmp_path / "a.csv").message


def test_csv_takes_long_cells(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    _, rows = read(tmp_path / "a.csv")
    assert len(rows[0].value["text"]) == 200_000


def test_parquet_rows_and_text_that_is_not_utf8(tmp_path):
    good = pyarrow.array(["a", "b", "c"])
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, *pyarrow.array([b"x", b"\xff", b"y"]).buffers()[1:]]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": good, "more": bad}), tmp_path / "a.parquet")
    _, rows = read(tmp_path / "a.parquet")
    assert [(row.number, row.fault) for row in rows] == [(1, None), (2, "not valid UTF-8"), (3, None)]
    assert rows[2].value == {"text": "c", "more": "y"}


def test_parquet_dates_are_left_out(tmp_path):
    table = pyarrow.table({"text": ["a"], "when": pyarrow.array([1], pyarrow.timestamp("ns"))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1][0].value == {"text": "a"}


def test_gzip(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert len(read(tmp_path / "a.jsonl.gz")[1]) == 5000
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-12])
    assert "cut off" in error_of(tmp_path / "a.jsonl.gz").message
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    assert "damaged" in error_of(tmp_path / "a.jsonl.gz").message
    (tmp_path / "b.jsonl").write_bytes(whole)
    assert "gzip data" in error_of(tmp_path / "b.jsonl").message


@pytest.mark.parametrize(
    "content", [b"PAR1" + bytes(50), '{"text": "ä"}\n'.encode("utf-16"), bytes(range(8)) * 9 + bytes(99)]
)
def test_binary_data_in_a_text_file(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert "not UTF-8 text" in error_of(tmp_path / "a.jsonl").message


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"rubbish" * 20)
    assert "damaged" in error_of(tmp_path / "a.parquet").message


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl" in error_of(tmp_path / "tran.jsonl").hint
    assert "train.jsonl" in error_of("tran.jsonl", tmp_path).hint
    assert "no folder" in error_of(tmp_path / "nowhere" / "tran.jsonl").hint


@pytest.mark.parametrize("path", ["a" * 300 + ".jsonl", "~nobody-of-this-name/a.jsonl", "a\0b.jsonl", "/a.jsonl"])
def test_impossible_paths_are_missing_files(path):
    assert "not found" in error_of(path).message


def test_folder_and_wrong_ending(tmp_path):
    (tmp_path / "inside.jsonl").write_text("")
    assert "inside.jsonl" in error_of(tmp_path).hint
    (tmp_path / "a.xlsx").write_text("")
    assert ".parquet" in error_of(tmp_path / "a.xlsx").hint
    assert "no effect" in error_of(tmp_path / "inside.jsonl", split="test").message


def test_current_directory_comes_before_the_recipes_folder(tmp_path, monkeypatch):
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for folder in (here, recipes):
        folder.mkdir()
        (folder / "a.jsonl").write_text(json.dumps({"text": folder.name}))
    monkeypatch.chdir(here)
    assert read("a.jsonl", recipes)[1][0].value == {"text": "here"}
    (here / "a.jsonl").unlink()
    assert read("a.jsonl", recipes)[1][0].value == {"text": "recipes"}


def test_limit_reads_the_first_rows_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken\nbroken\n')
    assert [row.number for row in read(tmp_path / "a.jsonl", limit=2)[1]] == [1, 2]


def test_hub_data_set(monkeypatch):
    asked = {}

    def load(path, name, split):
        asked.update(path=path, name=name, split=split)
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    _, rows = read("org/set", subset="small", split="test")
    assert [(row.number, row.value) for row in rows] == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert asked == {"path": "org/set", "name": "small", "split": "test"}


@pytest.mark.parametrize(
    ("raised", "hint"),
    [
        (ConnectionError("Couldn't reach it"), "download"),
        (ValueError("Config name is missing."), "subset"),
        (ValueError('Unknown split "trian".'), "split"),
        (RuntimeError("something else\nwith more lines"), "check the name"),
    ],
)
def test_hub_errors_have_no_traceback(monkeypatch, raised, hint):
    def load(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    error = error_of("org/set")
    assert hint in error.hint
    assert "\n" not in error.message
