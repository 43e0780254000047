"""Text readers: the rows of JSONL, JSON and CSV files, one bad row at a time."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from qhybrid.data.rows import (
    BOM_REMOVED,
    INVALID_CSV,
    INVALID_CSV_LINES,
    INVALID_JSON,
    INVALID_UTF8,
    NUL_REMOVED,
    TOO_MANY_CELLS,
    RawRow,
)
from qhybrid.errors import DataError

_UTF8_BOM = b"\xef\xbb\xbf"
_BINARY_SIGNATURES = {
    b"\x1f\x8b": "gzip data",
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def _open_text(path: Path, where: str) -> BinaryIO:
    """The file's bytes, unzipped, after a look at the first of them for what is plainly not text."""
    with _open_bytes(path) as stream:
        head = stream.read(4096)
    kind = next((name for start, name in _BINARY_SIGNATURES.items() if head.startswith(start)), None)
    if kind is None and head.count(0) > len(head) // 5:
        kind = "binary data"
    if kind is not None:
        raise DataError(
            f"this is {kind}, not UTF-8 text",
            where=where,
            hint="save it as UTF-8 text, or give it the ending of what it is (.gz, .parquet)",
        )
    return _open_bytes(path)


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def read_jsonl(path: Path, where: str) -> Iterator[RawRow]:
    with _open_text(path, where) as stream:
        for number, line in enumerate(stream, start=1):
            repairs = set()
            if number == 1 and line.startswith(_UTF8_BOM):
                line = line.removeprefix(_UTF8_BOM)
                repairs.add(BOM_REMOVED)
            if b"\0" in line:
                line = line.replace(b"\0", b"")
                repairs.add(NUL_REMOVED)
            if line.strip():
                yield _parse_line(number, line, frozenset(repairs))


def _parse_line(number: int, line: bytes, repairs: frozenset[str]) -> RawRow:
    try:
        return RawRow(number, json.loads(line.decode("utf-8")), repairs=repairs)
    except UnicodeDecodeError:
        return RawRow(number, fault=INVALID_UTF8)
    except (ValueError, RecursionError):  # RecursionError: thousands of opening brackets
        return RawRow(number, fault=INVALID_JSON)


def read_json(path: Path, where: str) -> Iterator[RawRow]:
    with _open_text(path, where) as stream:
        content = stream.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{INVALID_UTF8} at byte {error.start}", where=f"{where}:{line}", hint="save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise _not_json(error, where) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{INVALID_JSON}: {first_line(error)}", where=where, hint="see its nesting") from None
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        raise DataError(
            "the file holds one value, not a list of rows",
            where=where,
            hint='write [{...}, {...}] or {"data": [{...}, {...}]}; one object a line goes in a .jsonl file',
        )
    for number, value in enumerate(document, start=1):
        yield RawRow(number, value)


def _not_json(error: json.JSONDecodeError, where: str) -> DataError:
    # "Extra data" after the first object is what JSON lines look like to a JSON parser.
    hint = "mend the file at this place"
    if error.msg == "Extra data":
        hint = "one object a line is JSON lines: rename the file to .jsonl"
    return DataError(
        f"{INVALID_JSON}: {error.msg} (column {error.colno})", where=f"{where}:{error.lineno}", hint=hint
    )


def read_csv(path: Path, where: str) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    with _open_text(path, where) as stream:
        # surrogateescape turns bytes that are not UTF-8 into marks, so one bad row does not end the file
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"the header cannot be read: {error}", where=f"{where}:1", hint="the first line names the columns"
            ) from None
        if header is not None and len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(
                f"two columns are called {twice!r}", where=f"{where}:1", hint="give each column its own name"
            )
        number = 0
        while True:
            number += 1
            lines_before = rows.line_num
            try:
                cells = next(rows, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise DataError(
                        f"a quoted cell of data row {number} is never closed",
                        where=f"{where}:{rows.line_num}",
                        hint='close the quote; a quote inside a quoted cell is written twice: ""',
                    ) from None
                # An open quote swallows the rows up to the next one. Read alone, their lines might be pieces of a
                # cell that look like rows.
                swallows = rows.line_num > lines_before + 1
                yield RawRow(number, fault=INVALID_CSV_LINES if swallows else INVALID_CSV)
                continue
            if cells is None or header is None:
                return
            if not cells:  # a blank line is no row
                number -= 1
            elif any(cells[len(header) :]):
                yield RawRow(number, fault=TOO_MANY_CELLS)
            elif any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
                yield RawRow(number, fault=INVALID_UTF8)
            else:
                yield RawRow(number, dict(zip(header, cells, strict=False)))


def first_line(error: Exception) -> str:
    """The first line of a library's message, without the home folder that it may name."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(str(Path.home()), "~")[:300]
