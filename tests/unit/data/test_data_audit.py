"""The audit: every row accounted for, repairs and duplicates counted, and a stop where nothing is usable."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.data.prepare import prepare_data
from qhybrid.errors import DataError


def chat(*contents: object, roles=("user", "assistant")) -> dict:
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


SYSTEM = {"role": "system", "content": "s"}
FAULTS = {
    "invalid JSON": b'{"messages": [{"role": "user"',
    "not an object": ["a", "list"],
    "not valid UTF-8": b'{"messages": "\xc3\x28"}',
    "missing column 'messages'": {"text": "elsewhere"},
    "'messages' is not a list of messages": {"messages": "user: hello"},
    "'content' is empty": chat("question", "  "),
    "'content' is null": chat(None, "answer"),
    "unknown role 'narrator'": chat("a", "b", roles=("user", "narrator")),
    "no assistant turn": chat("a", "b", roles=("user", "user")),
    "more than one system message": {"messages": [SYSTEM, SYSTEM, *chat("a", "b")["messages"]]},
}


def test_the_format_is_found_behind_faulty_first_rows(prepare, write_jsonl):
    path = write_jsonl([*FAULTS.values(), *(chat("q", f"a {i}") for i in range(90))])
    assert prepare({"sources": path, "max_dropped_fraction": 0.1}).audit.train[0].format.name == "messages"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "not a single row"),
        ([b"rubbish", b"\xff\xfe\x01"], "2 of 2 rows (100.0%) cannot be used"),
        ([{"text": ""}, {"text": None}], "2 of 2 rows"),
    ],
)
def test_nothing_usable(prepare, write_jsonl, rows, words):
    with pytest.raises(DataError) as caught:
        prepare({"sources": write_jsonl(rows), "max_dropped_fraction": 1.0})
    assert words in caught.value.message
    assert caught.value.hint and "max_dropped_fraction" not in caught.value.hint


def test_repairs_and_duplicates_are_counted(prepare, write_jsonl):
    rows = [
        {"text": "same words"},
        {"text": 12345},
        {"text": "same words"},
        {"text": "\0a\ud800b c"},
        {"text": "new words"},
    ]
    source = prepare(write_jsonl(rows)).audit.train[0]
    assert (source.rows_in, source.untouched, source.repaired, source.dropped) == (5, 3, 2, 0)
    assert source.repaired_rows == {
        "number or boolean turned into text": [2],
        "NUL characters removed": [4],
        "lone surrogates replaced": [4],
    }
    assert source.duplicates == 1


lines = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20).map(lambda text: {"text": text}),
    st.sampled_from(["ok words", "a\0b", "x\ud800y", "\ufeffz w", "  "]).map(lambda text: {"text": text}),
    st.one_of(st.none(), st.integers(), st.booleans(), st.floats(), st.lists(st.integers())).map(
        lambda x: {"text": x}
    ),
    st.sampled_from([{}, [], 3, "text", {"txt": "a"}]),
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
)


@given(st.lists(lines, max_size=12), st.sampled_from([None, 2, 5]))
@settings(deadline=None, max_examples=60)
def test_rows_in_are_untouched_repaired_or_dropped(make_rows_recipe, tokenizer, rows, max_length):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        encoded = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        # a long run of good rows, so that the format is found and the file is text
        good = [b'{"text": "A good row of text, and then some"}'] * 15
        file.write_bytes(b"\n".join(good + encoded))
        recipe = make_rows_recipe(str(file), max_length)
        prepared = prepare_data(recipe, tokenizer, base_folder=Path(folder))
    source = prepared.audit.train[0]
    present = [number for number, line in enumerate(good + encoded, 1) if line.replace(b"\0", b"").strip()]
    dropped = [number for numbers in source.dropped_rows.values() for number in numbers]
    repaired = {number for numbers in source.repaired_rows.values() for number in numbers}
    assert source.rows_in == len(present) == source.untouched + source.repaired + source.dropped
    assert sorted(dropped) == sorted(set(dropped)) and set(dropped) <= set(present)
    assert len(repaired) == source.repaired and not repaired & set(dropped)
    assert len(prepared.train) == source.kept == source.used_rows
    for row in prepared.train:
        assert len(row["input_ids"]) == len(row["labels"]) <= (max_length or 10**9)
        assert any(label != -100 for label in row["labels"][1:])


@pytest.fixture(scope="module")
def make_rows_recipe():
    from qhybrid.recipe.schema import Recipe

    def make(path: str, max_length: int | None) -> Recipe:
        data = {"sources": {"path": path, "format": "text"}, "max_dropped_fraction": 1.0}
        return Recipe(
            model={"path": "tiny"}, adapters=[{}], data=data, training={"max_length": max_length}, output_dir="run"
        )

    return make


def test_dict_and_text(prepare, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl([{"text": "A cat sat"}, b"broken", *({"text": f"row {i}"} for i in range(30))])
    (tmp_path / "more.csv").write_text("prompt,completion\nq,a\nq,b\n")
    audit = prepare({"sources": ["rows.jsonl"], "eval_sources": ["more.csv"]}).audit
    account = audit.to_dict()
    assert json.loads(json.dumps(account)) == account
    assert account["sources"][0]["path"] == "rows.jsonl"
    assert str(tmp_path) not in json.dumps(account)
    assert account["totals"]["rows_in"] == 34 and account["totals"]["train_rows"] == 31
    tokens = account["sources"][0]["tokens"]
    assert tokens["total"] == tokens["trained"] and tokens["longest"] < tokens["total"]
    assert tokens["mean"] == round(tokens["total"] / 31, 1)
    text = audit.to_text()
    assert "rows.jsonl  text (found)" in text
    assert "dropped       1  invalid JSON: line 2" in text
    assert "31 rows to train on, 2 to evaluate on" in text
    assert len(set(map(len, text.splitlines()[:3]))) == 1, "columns are aligned"
    assert account["eval_sources"][0]["row_numbers_count"] == "row below the header, from 1"
