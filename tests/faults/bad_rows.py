"""Data files of 1,000 rows with ten kinds of fault, in the forms and types of file that people have."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

NUM_ROWS = 1000
EACH = 17  # rows of each fault
EACH_REPAIR = 11
MAX_TOKENS = 96
CUT_OFF = f"no trained token left after truncation to {MAX_TOKENS} tokens"
LONG = "Name the planet. " * 100

Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """One form of rows in one type of file."""

    suffix: str
    good: Callable[[int], tuple[Any, Turns]]  # a row, and what the model must see of it
    faults: Sequence[tuple[str, Any]]  # the reason that is reported, and the row; ten kinds
    repairs: Sequence[tuple[str, Any, Turns]]
    write: Callable[[Path, list[Any]], list[int]]  # gives each row's number


# ---- forms ----


def turns(*contents: str) -> Turns:
    return [(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]


def messages(*pairs: tuple[Any, Any]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def sharegpt(*pairs: tuple[Any, Any]) -> dict:
    return {"conversations": [{"from": speaker, "value": content} for speaker, content in pairs]}


def alpaca(instruction: Any, output: Any, **more: Any) -> dict:
    return {"instruction": instruction, "output": output, **more}


def good_messages(number: int) -> tuple[dict, Turns]:
    seen = turns(f"question {number}", f"answer {number}", f"more {number}", f"reply {number}")
    if number % 3 == 0:
        seen = [("system", f"be kind {number}"), *seen]
    return messages(*seen), seen


def good_sharegpt(number: int) -> tuple[dict, Turns]:
    # every fourth begins with the model, as many files that were cut out of longer talks do
    seen = turns("user", "assistant", f"more {number}", f"reply {number}")[number % 4 == 0 :]
    names = {"user": "human", "assistant": "gpt"}
    row = sharegpt(*((names[role], content) for role, content in seen))
    return {**row, "system": f"rule {number}" if number % 5 == 0 else ""}, (
        [("system", f"rule {number}"), *seen] if number % 5 == 0 else seen
    )


def good_alpaca(number: int) -> tuple[dict, Turns]:
    more = f'"row {number}",\nline two' if number % 2 else ""
    question = f"question {number}\n\n{more}" if more else f"question {number}"
    return alpaca(f"question {number}", f"answer {number}, and so on", input=more), turns(
        question, f"answer {number}, and so on"
    )


# What every type of file can hold
SYSTEM, ASKED, TOLD = ("system", "s"), ("user", "q"), ("assistant", "a")
MESSAGES_FAULTS: list[tuple[str, Any]] = [
    ("'messages' is empty", messages()),
    ("'content' is null", messages(("user", None), TOLD)),
    ("'content' is empty", messages(ASKED, ("assistant", " \n"))),
    ("unknown role 'narrator'", messages(ASKED, ("narrator", "a"))),
    ("system message not first", messages(ASKED, SYSTEM, TOLD)),
    ("more than one system message", messages(SYSTEM, SYSTEM, ASKED, TOLD)),
    ("no assistant turn", messages(ASKED, ASKED)),
    (CUT_OFF, messages(("user", LONG), TOLD)),
]
SHAREGPT_FAULTS: list[tuple[str, Any]] = [
    ("not an object", [{"from": "human", "value": "q"}]),
    ("missing column 'conversations'", {"conversation": []}),
    ("'conversations' is not a list of messages", {"conversations": "human: q\ngpt: a"}),
    ("malformed message (role or content is missing)", {"conversations": [{"value": "q"}, {"value": "a"}]}),
    ("'value' is empty", sharegpt(("human", "q"), ("gpt", ""))),
    ("unknown role 'narrator'", sharegpt(("human", "q"), ("narrator", "a"))),
    ("no assistant turn", sharegpt(("human", "q"))),
    (CUT_OFF, sharegpt(("human", LONG), ("gpt", "a"))),
]
ALPACA_FAULTS: list[tuple[str, Any]] = [
    ("'output' is null", alpaca("q", None)),
    ("'output' is empty", alpaca("q", "")),
    ("'instruction' is empty", alpaca(" ", "a")),
    (CUT_OFF, alpaca(LONG, "a")),
]
JSONL_FAULTS: list[tuple[str, Any]] = [
    ("invalid JSON", b'{"messages": [{"role": "user", "content": "cut o'),
    ("not valid UTF-8", '{"text": "caf\u00e9"}'.encode("latin-1")),
]
NUL, BOM = "NUL characters removed", "byte order mark removed"
NUMBER, SURROGATE = "number or boolean turned into text", "lone surrogates replaced"


def question_and_answer(row: Callable[[Any, Any], Any], *, typed: bool) -> list[tuple[str, Any, Turns]]:
    """Rows that are repaired; `typed` for files whose columns have a type and whose text is UTF-8."""
    repairs: list[tuple[str, Any, Turns]] = [
        (NUL, row("q\0", "a\0b"), turns("q", "ab")),
        (BOM, row("\ufeffq", "a"), turns("q", "a")),
    ]
    if not typed:
        repairs += [
            (NUMBER, row(1, True), turns("1", "true")),
            (SURROGATE, row("q", "a\ud83d"), turns("q", "a\ufffd")),
        ]
    return repairs


# ---- files ----


def write_jsonl(path: Path, rows: list[Any]) -> list[int]:
    """One row a line; a blank line after every 50th, which counts as a line and is no row."""
    lines: list[bytes] = []
    numbers = []
    for index, row in enumerate(rows):
        lines.append(row if isinstance(row, bytes) else json.dumps(row).encode())
        numbers.append(len(lines))
        if index % 50 == 49:
            lines.append(b"  ")
    path.write_bytes(b"\r\n".join(lines))
    return numbers


def write_json(path: Path, rows: list[Any]) -> list[int]:
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    return list(range(1, len(rows) + 1))


def write_csv(path: Path, rows: list[Any]) -> list[int]:
    """Blank lines are no rows, and a cell may hold several lines: numbers count rows below the header."""
    parts = [b"instruction,output,input,history\n"]
    for index, row in enumerate(rows):
        if not isinstance(row, bytes):
            line = io.StringIO()
            csv.writer(line).writerow([row["instruction"], row["output"], row.get("input", "")])
            row = line.getvalue().encode()
        parts.append(row)
        if index % 50 == 49:
            parts.append(b"\n")
    path.write_bytes(b"".join(parts))
    return list(range(1, len(rows) + 1))


def write_parquet(path: Path, rows: list[Any]) -> list[int]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, bytes) for value in values):  # text that is not UTF-8: a writer that never looked
            raw = [value.encode() if isinstance(value, str) else value for value in values]
            columns[name] = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
        else:
            columns[name] = pyarrow.array(values)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=300)
    return list(range(1, len(rows) + 1))


def as_messages(question: Any, answer: Any) -> dict:
    return messages(("user", question), ("assistant", answer))


def as_sharegpt(question: Any, answer: Any) -> dict:
    return sharegpt(("human", question), ("gpt", answer))


RENAMED = ("role renamed", messages(("Human", "q"), ("model", "a")), turns("q", "a"))
MALFORMED = ("malformed message (role or content is missing)", messages((None, "q"), TOLD))
BAD_HISTORY = "history is not a list of question and answer pairs"

CASES = {
    "messages in JSONL": Case(
        "jsonl",
        good_messages,
        [*MESSAGES_FAULTS, *JSONL_FAULTS],
        [*question_and_answer(as_messages, typed=False), RENAMED],
        write_jsonl,
    ),
    "messages in JSON": Case(
        "json",
        good_messages,
        [
            *MESSAGES_FAULTS,
            ("not an object", None),
            ("message has tool_calls, which cannot be trained yet",
             {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}]}),
        ],
        [*question_and_answer(as_messages, typed=False), RENAMED],
        write_json,
    ),
    "messages in Parquet": Case(
        "parquet",
        good_messages,
        [*MESSAGES_FAULTS, MALFORMED, ("'messages' is null", {"messages": None})],
        [*question_and_answer(as_messages, typed=True), RENAMED],
        write_parquet,
    ),
    "sharegpt in JSONL": Case(
        "jsonl",
        good_sharegpt,
        [*SHAREGPT_FAULTS, *JSONL_FAULTS],
        question_and_answer(as_sharegpt, typed=False),
        write_jsonl,
    ),
    "sharegpt in JSON": Case(
        "json",
        good_sharegpt,
        [
            *SHAREGPT_FAULTS,
            ("'conversations' is empty", sharegpt()),
            ("'value' is not text", sharegpt(("human", {"text": "q"}), ("gpt", "a"))),
        ],
        question_and_answer(as_sharegpt, typed=False),
        write_json,
    ),
    "alpaca in JSONL": Case(
        "jsonl",
        good_alpaca,
        [
            *ALPACA_FAULTS,
            *JSONL_FAULTS,
            ("not an object", "instruction"),
            ("missing column 'output'", {"instruction": "q"}),
            ("'output' is not text", alpaca("q", ["a"])),
            (BAD_HISTORY, alpaca("q", "a", history=[["only a question"]])),
        ],
        question_and_answer(alpaca, typed=False),
        write_jsonl,
    ),
    "alpaca in CSV": Case(
        "csv",
        good_alpaca,
        [
            (CUT_OFF, alpaca(LONG, "a")),
            ("'output' is empty", alpaca("q", "")),
            ("'output' is empty", b'q,"\0"\n'),
            ("'instruction' is empty", b",a,,\n"),
            ("missing column 'output'", b"q\n"),
            ("not valid UTF-8", "q,caf\u00e9\n".encode("latin-1")),
            ("more cells than the header has columns", b"q,a,,,and more\n"),
            ("invalid CSV", b'"q"uestion,a\n'),
            ("invalid CSV over several lines, and what else is in them is lost", b'q,"a\nb"c\n'),
            (BAD_HISTORY, b"q,a,,text\n"),
        ],
        question_and_answer(alpaca, typed=True),
        write_csv,
    ),
    "alpaca in Parquet": Case(
        "parquet",
        good_alpaca,
        [
            *ALPACA_FAULTS,
            ("'output' is empty", alpaca("q", "\0\0")),
            ("'instruction' is null", alpaca(None, "a")),
            ("not valid UTF-8", alpaca(b"caf\xe9", "a")),
            ("not valid UTF-8", alpaca("q", b"\xff\xfe")),
            (BAD_HISTORY, alpaca("q", "a", history=[["only a question"]])),
            ("'history' is null", alpaca("q", "a", history=[["asked", None]])),
        ],
        question_and_answer(alpaca, typed=True),
        write_parquet,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BadFile:
    """A written file, the numbers of its faulty and repaired rows, and what must be seen of the rest."""

    path: Path
    dropped: dict[str, list[int]]
    repaired: dict[str, list[int]]
    kept: list[Turns]


def write_bad_file(folder: Path, name: str) -> BadFile:
    """1,000 rows: ten kinds of fault 17 times each and some that are repaired, in places drawn once."""
    case = CASES[name]
    assert len(case.faults) == 10
    rows: list[Any] = []
    seen: list[Turns | None] = []
    for number in range(NUM_ROWS):
        row, expected = case.good(number)
        rows.append(row)
        seen.append(expected)
    # Not among the first rows: a Parquet writer takes a column's type from them, as a CSV reader its dialect.
    places = iter(random.Random(7).sample(range(5, NUM_ROWS), NUM_ROWS - 5))
    reasons: list[tuple[dict[str, list[int]], str, int]] = []
    dropped: dict[str, list[int]] = {}
    repaired: dict[str, list[int]] = {}
    for reason, row in case.faults:
        for place in (next(places) for _ in range(EACH)):
            rows[place], seen[place] = row, None
            reasons.append((dropped, reason, place))
    for reason, row, expected in case.repairs:
        for place in (next(places) for _ in range(EACH_REPAIR)):
            rows[place], seen[place] = row, expected
            reasons.append((repaired, reason, place))
    path = folder / f"rows.{case.suffix}"
    numbers = case.write(path, rows)
    for by_reason, reason, place in sorted(reasons, key=lambda entry: entry[2]):
        by_reason.setdefault(reason, []).append(numbers[place])
    return BadFile(path, dropped, repaired, [expected for expected in seen if expected is not None])
