"""Formats: found from the columns, normalised row by row, repaired or refused with a reason."""

from __future__ import annotations

import pytest

from qhybrid.data.formats import find_format
from qhybrid.data.rows import ConversationRow, PromptCompletionRow, RowFault, TextRow
from qhybrid.errors import DataError
from qhybrid.recipe.schema import SourceSection

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIR = (("user", "q"), ("assistant", "a"))
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def found(row, **settings):
    return find_format(SourceSection(path="a.jsonl", **settings), [row])


def normal(row, **settings):
    return found(row, **settings).normalise(row)


def error_of(rows, **settings) -> DataError:
    with pytest.raises(DataError) as caught:
        find_format(SourceSection(path="a.jsonl", **settings), rows)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"text": "t", "id": 1}, "text", TextRow("t")),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", PromptCompletionRow("q", "a")),
        (
            {"prompt": TURNS[:1], "completion": TURNS[1:]},
            "prompt_completion",
            ConversationRow(PAIR, num_prompt_messages=1),
        ),
        ({"messages": TURNS, "prompt": "q"}, "messages", ConversationRow(PAIR)),
        ({"instruction": "q", "output": "a"}, "alpaca", ConversationRow(PAIR)),
        ({"instruction": "q", "input": None, "output": "a", "history": []}, "alpaca", ConversationRow(PAIR)),
        (
            {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            "alpaca",
            ConversationRow(
                (("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q\n\nmore"), ("assistant", "a"))
            ),
        ),
        ({"conversations": SHARED, "system": ""}, "sharegpt", ConversationRow(PAIR)),
        ({"conversations": SHARED, "system": "s"}, "sharegpt", ConversationRow((("system", "s"), *PAIR))),
        ({"conversations": TURNS}, "sharegpt", ConversationRow(PAIR)),
    ],
)
def test_formats_are_found_and_normalised(row, name, expected):
    shape = found(row)
    assert (shape.name, shape.found) == (name, True)
    assert shape.normalise(row) == (expected, set())


def test_columns_are_read_by_our_names():
    row = {"question": "q", "answer": "a", "text": "not wanted"}
    assert normal(row, columns={"prompt": "question", "completion": "answer"})[0] == PromptCompletionRow("q", "a")
    assert normal({"chat": TURNS}, columns={"messages": "chat"})[0] == ConversationRow(PAIR)


def test_the_most_of_the_first_rows_decide():
    rows = [{"text": "a"}, {"txt": "b"}, {"text": "c"}, {"text": "d", "prompt": "p", "completion": "c"}]
    assert find_format(SourceSection(path="a"), rows).name == "text"


def test_unknown_columns_show_the_way():
    error = error_of([{"question": "q", "answer": "a"}])
    assert "question, answer" in error.message
    assert "columns: {prompt: question, completion: answer}" in error.hint
    assert "sharegpt" in error.hint
    assert "columns: {prompt: s1, completion: s2}" in error_of([{"s1": "q", "s2": "a"}]).hint
    assert "columns: {text: body}" in error_of([{"body": "q"}]).hint
    assert "columns: {messages: dialog}" in error_of([{"dialog": "q", "id": 1}]).hint


def test_ambiguous_columns_must_be_settled():
    row = {"instruction": "q", "output": "a", "prompt": "q", "completion": "a"}
    error = error_of([row])
    assert "prompt_completion and alpaca" in error.message
    assert "format: alpaca" in error.hint
    assert found(row, format="alpaca").name == "alpaca"


def test_a_rendered_text_beside_a_structured_row_is_not_ambiguous():
    row = {"instruction": "q", "output": "a", "text": "### Instruction: q ### Response: a"}
    assert found(row).name == "alpaca"
    assert found(row, format="text").name == "text"


def test_wrong_columns_and_formats():
    row = {"question": "q", "answer": "a"}
    assert "did you mean prompt" in error_of([row], columns={"promt": "question"}).hint
    assert "{prompt: question}" in error_of([row], columns={"question": "prompt"}).hint
    assert "{prompt: question}" in error_of([row], columns={"prompt": "qestion"}).hint
    assert "'instruction'" in error_of([row], format="alpaca").message
    assert "'text'" in error_of([row], format="alpaca", columns={"text": "answer"}).message


MESSAGES_FAULTS = [
    ("a string", "'messages' is not a list of messages"),
    (None, "'messages' is null"),
    ([], "'messages' is empty"),
    (["x"], "malformed message (role or content is missing)"),
    ([{"role": "user"}], "malformed message (role or content is missing)"),
    ([{"role": 3, "content": "x"}], "malformed message (role or content is missing)"),
    ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
    ([{"role": "user", "content": None}], "'content' is null"),
    ([{"role": "user", "content": " \n"}], "'content' is empty"),
    ([{"role": "user", "content": ["x"]}], "'content' is not text"),
    ([{"role": "user", "content": "x"}], "no assistant turn"),
    ([{"role": "system", "content": "x"}] * 2 + TURNS, "more than one system message"),
    ([*TURNS, {"role": "system", "content": "x"}], "system message not first"),
    ([TURNS[0], {**TURNS[1], "tool_calls": [{}]}], "message has tool_calls, which cannot be trained yet"),
]


@pytest.mark.parametrize(("messages", "reason"), MESSAGES_FAULTS)
def test_message_faults(messages, reason):
    with pytest.raises(RowFault) as caught:
        normal({"messages": messages})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": None}, "'text' is null"),
        ({"text": float("nan")}, "'text' is null"),
        ({"text": ["a"]}, "'text' is not text"),
        ({"text": "\0"}, "'text' is empty"),
        ({"prompt": "q", "completion": TURNS}, "'completion' is not text"),
        ({"prompt": TURNS[:1], "completion": "a"}, "'completion' is not a list of messages"),
        ({"prompt": TURNS, "completion": TURNS[:1]}, "no assistant turn"),
        (
            {"instruction": "q", "output": "a", "history": "x"},
            "history is not a list of question and answer pairs",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "history is not a list of question and answer pairs",
        ),
        ({"conversations": [{"value": "x"}]}, "malformed message (role or content is missing)"),
    ],
)
def test_row_faults(row, reason):
    with pytest.raises(RowFault) as caught:
        normal(row)
    assert caught.value.reason == reason


def test_faults_name_the_files_column():
    shape = found({"answer": "x"}, columns={"text": "answer"})
    for row, reason in (({}, "missing column 'answer'"), ({"answer": ""}, "'answer' is empty")):
        with pytest.raises(RowFault, match=reason):
            shape.normalise(row)
    with pytest.raises(RowFault, match="not an object"):
        shape.normalise([1])


@pytest.mark.parametrize(
    ("value", "text", "repair"),
    [
        (7, "7", "number or boolean turned into text"),
        (True, "true", "number or boolean turned into text"),
        (2.5, "2.5", "number or boolean turned into text"),
        ("a\0b", "ab", "NUL characters removed"),
        ("\ufeffa", "a", "byte order mark removed"),
        ("a\ud800b", "a\ufffdb", "lone surrogates replaced"),
    ],
)
def test_repairs(value, text, repair):
    assert normal({"text": value}) == (TextRow(text), {repair})


def test_clean_text_is_left_alone():
    for text in ("naïve 日本 🎉", "  spaces kept ", "mid\ufeffword"):
        assert normal({"text": text}) == (TextRow(text), set())


def test_role_names_are_repaired_except_in_sharegpt():
    renamed = [{"role": "Human", "content": "q"}, {"role": "model", "content": "a"}]
    assert normal({"messages": renamed}) == (ConversationRow(PAIR), {"role renamed"})
    assert normal({"conversations": SHARED})[1] == set()
