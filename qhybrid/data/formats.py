"""Formats: which of the five formats a source has, found from its columns, or an error that shows the way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qhybrid.data.normalise import normalise_row
from qhybrid.data.rows import NOT_AN_OBJECT, Row, RowFault
from qhybrid.errors import DataError
from qhybrid.recipe.excerpt import excerpt_list
from qhybrid.recipe.schema import SourceSection


@dataclass(frozen=True)
class _Format:
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_FORMATS = {
    "text": _Format(("text",)),
    "prompt_completion": _Format(("prompt", "completion")),
    "messages": _Format(("messages",)),
    "alpaca": _Format(("instruction", "output"), ("input", "system", "history")),
    "sharegpt": _Format(("conversations",), ("system",)),
}

_ALL_COLUMNS = sorted({name for shape in _FORMATS.values() for name in shape.required + shape.optional})

# Names that files use for what we call prompt, completion, text and messages: for the example in an error.
_SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "problem", "source", "user", "context"),
    "completion": ("answer", "response", "output", "solution", "target", "reply", "assistant"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "body", "document", "article", "passage", "sentence"),
}


@dataclass(frozen=True)
class SourceFormat:
    """The format of one source: its name, the column names to read it by, and whether we found it ourselves."""

    name: str
    columns: Mapping[str, str]
    found: bool

    def normalise(self, value: object) -> tuple[Row, set[str]]:
        """The normal form of one row, and the reasons for which it had to be repaired.

        Raises:
            RowFault: the row cannot be used.
        """
        if not isinstance(value, dict):
            raise RowFault(NOT_AN_OBJECT)
        return normalise_row(self.name, value, self.columns)


def find_format(source: SourceSection, first_rows: Sequence[Mapping[str, object]]) -> SourceFormat:
    """The format of `source`: the one it names, or the one format whose columns most of `first_rows` have.

    Raises:
        DataError: `columns` does not fit the formats or the file, or no format or more than one fits.
    """
    present = list(dict.fromkeys(str(name) for row in first_rows for name in row))
    _check_columns(source, present)
    fits = [name for name in _FORMATS if _fits(name, source.columns, first_rows)]
    if source.format != "auto":
        if source.format not in fits:
            raise _wrong_format(source, present)
        return SourceFormat(source.format, source.columns, found=False)
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")  # beside a structured format it holds the same row, rendered (as in tatsu-lab/alpaca)
    if len(fits) == 1:
        return SourceFormat(fits[0], source.columns, found=True)
    if fits:
        raise DataError(
            f"the columns fit {len(fits)} formats: {' and '.join(fits)}. {_listed(present)}",
            where=source.path,
            hint=f"say which one with {' or '.join(f'format: {name}' for name in fits)}",
        )
    raise DataError(
        f"no known format has these columns. {_listed(present)}",
        where=source.path,
        hint=f"name the columns, for example {_example(present)}\nknown formats: {_known_formats()}",
    )


def _fits(name: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether most rows have all that the format needs, and the recipe's columns belong to that format."""
    shape = _FORMATS[name]
    if not columns.keys() <= set(shape.required + shape.optional):
        return False
    needed = [columns.get(column, column) for column in shape.required]
    return sum(all(column in row for column in needed) for row in rows) * 2 > len(rows)


def _check_columns(source: SourceSection, present: Sequence[str]) -> None:
    for ours, theirs in source.columns.items():
        if ours not in _ALL_COLUMNS:
            near = difflib.get_close_matches(ours, _ALL_COLUMNS, n=1)
            if theirs in _ALL_COLUMNS:
                hint = f"write our name first: columns: {{{theirs}: {ours}}}"
            else:
                hint = f"did you mean {near[0]}?" if near else f"our names are {', '.join(_ALL_COLUMNS)}"
            raise DataError(f"columns: {ours!r} is not a column of any format", where=source.path, hint=hint)
        if theirs not in present:
            near = difflib.get_close_matches(theirs, present, n=1, cutoff=0.4)
            raise DataError(
                f"columns: {ours} is to be read from {theirs!r}, which the file does not have. {_listed(present)}",
                where=source.path,
                hint=f"did you mean columns: {{{ours}: {near[0]}}}?" if near else "name one of these columns",
            )


def _wrong_format(source: SourceSection, present: Sequence[str]) -> DataError:
    shape = _FORMATS[source.format]
    strange = sorted(source.columns.keys() - set(shape.required + shape.optional))
    if strange:
        return DataError(
            f"columns: {strange[0]!r} is not a column of the format {source.format}",
            where=source.path,
            hint=f"{source.format} has {', '.join(shape.required + shape.optional)}",
        )
    missing = [name for name in shape.required if source.columns.get(name, name) not in present]
    lacking = f"the column {missing[0]!r}" if missing else "all its columns in most rows"
    return DataError(
        f"the format {source.format} needs {lacking}, which the file does not have. {_listed(present)}",
        where=source.path,
        hint=f"name the columns and leave format out, for example {_example(present)}",
    )


def _listed(present: Sequence[str]) -> str:
    return f"Columns: {excerpt_list(present, most=30) or 'none'}"


def _known_formats() -> str:
    parts = []
    for name, shape in _FORMATS.items():
        optional = f", optional {', '.join(shape.optional)}" if shape.optional else ""
        parts.append(f"{name} ({', '.join(shape.required)}{optional})")
    return "; ".join(parts)


def _example(present: Sequence[str]) -> str:
    """A `columns:` line to paste, guessed from the names that the file has."""
    guess: dict[str, str] = {}
    for ours, synonyms in _SYNONYMS.items():
        free = {name.lower(): name for name in reversed(present) if name not in guess.values()}
        theirs = next((free[name] for name in (ours, *synonyms) if name in free), None)
        if theirs is not None:
            guess[ours] = theirs
    for names in (("prompt", "completion"), ("messages",), ("text",)):
        if guess.keys() >= set(names):
            return _columns_line((name, guess[name]) for name in names)
    if len(present) > 1:
        return _columns_line(zip(("prompt", "completion"), present, strict=False))
    return _columns_line([("text", present[0] if present else "YOUR_COLUMN")])


def _columns_line(pairs: Iterable[tuple[str, str]]) -> str:
    return "columns: {" + ", ".join(f"{ours}: {theirs}" for ours, theirs in pairs) + "}"
