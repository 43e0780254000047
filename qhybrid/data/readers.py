"""Readers: the rows of a data file or a hub data set, each with the number a person would find it by."""

from __future__ import annotations

import difflib
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qhybrid.data.rows import INVALID_UTF8, UNREADABLE, RawRow
from qhybrid.data.text_readers import first_line, read_csv, read_json, read_jsonl
from qhybrid.errors import DataError
from qhybrid.recipe.schema import DataSection, SourceSection

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE_ENDING = re.compile(
    r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|feather|xlsx?|ya?ml|zip|gz|zst|bz2|xz)$", re.I
)


@dataclass(frozen=True)
class RowStream:
    """The rows of one source; `numbering` says what a row's number counts ("line", "data row", "row")."""

    numbering: str
    rows: Iterator[RawRow] = field(repr=False)


def open_source(source: SourceSection, base_folder: Path) -> RowStream:
    """The rows of `source`, read as they are asked for, at most `source.limit` of them.

    A local file wins over a hub data set of the same name. Relative paths are looked for in the current
    directory, then in `base_folder`.

    Raises:
        DataError: no such file, a folder, an unknown file type, an unreadable file, a hub data set that
            cannot be had; some of these only show while the rows are read.
    """
    path = find_file(source.path, base_folder)
    if path is None and _is_hub_name(source.path):
        stream = RowStream("row", _read_hub(source))
    else:
        stream = _open_file(source, path, base_folder)
    return RowStream(stream.numbering, islice(stream.rows, source.limit))


def check_local_source(source: SourceSection, base_folder: Path) -> None:
    """Raise what `open_source` would raise for a local file that is missing or of an unknown type."""
    path = find_file(source.path, base_folder)
    if path is not None or not _is_hub_name(source.path):
        _open_file(source, path, base_folder)


def with_whole_paths(data: DataSection, base_folder: Path) -> DataSection:
    """`data` with local files named from the root, so that it means the same wherever it is read again."""

    def whole(name: str) -> str:
        path = find_file(name, base_folder)
        return name if path is None else os.path.abspath(path)

    changes: dict[str, object] = {
        key: tuple(source.model_copy(update={"path": whole(source.path)}) for source in getattr(data, key))
        for key in ("sources", "eval_sources")
    }
    if data.chat_template is not None and data.chat_template.endswith((".jinja", ".j2")):
        changes["chat_template"] = whole(data.chat_template)
    return data.model_copy(update=changes)


def find_file(path: str, base_folder: Path) -> Path | None:
    """`path` from the current directory, else from `base_folder`; None when neither has it."""
    given = Path(os.path.expanduser(path))
    # os.path.exists says no where Path.exists raises: a name too long, a folder without permission
    return next((place for place in (given, base_folder / given) if os.path.exists(place)), None)


def missing_file_error(path: str, base_folder: Path, what: str) -> DataError:
    """The error for a file that is not there, with the nearest file names as its hint."""
    given = Path(os.path.expanduser(path))
    folders = [folder for folder in (given.parent, base_folder / given.parent) if os.path.isdir(folder)]
    if not folders:
        hint = f"there is no folder {str(given.parent)!r} here, nor beside the recipe"
    else:
        names = sorted({name for folder in folders for name in _file_names(folder)})
        near = difflib.get_close_matches(given.name, names, n=3, cutoff=0.5)
        listed = ", ".join(near or names[:5]) or "no file at all"
        hint = f"did you mean {listed}?" if near else f"that folder holds {listed}"
    return DataError(f"{what} was not found", where=path, hint=hint)


def _file_names(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in folder.iterdir() if item.is_file())
    except OSError:  # a folder that may not be listed has no names to offer
        return []


def _is_hub_name(path: str) -> bool:
    return _HUB_NAME.fullmatch(path) is not None and _FILE_ENDING.search(path) is None


def _open_file(source: SourceSection, path: Path | None, base_folder: Path) -> RowStream:
    where = source.path
    if path is None:
        raise missing_file_error(source.path, base_folder, "this data file")
    if path.is_dir():
        inside = [name for name in _file_names(path) if _reader_for(name)][:5]
        listed = f"; it holds {', '.join(inside)}" if inside else ""
        raise DataError("this is a folder, not a file", where=where, hint=f"name one file in it{listed}")
    if not path.is_file():  # a pipe is read twice here, and may never end
        raise DataError("this is a pipe or a device, not a file", where=where, hint="write its content to a file")
    if source.subset is not None or source.split != "train":
        raise DataError(
            "split and subset have no effect on a file",
            where=where,
            hint="remove them from this source, or name a hub data set",
        )
    found = _reader_for(path.name)
    if found is None:
        raise DataError(
            f"files that end in {path.suffix or 'nothing'!r} cannot be read",
            where=where,
            hint="convert it to .jsonl, .json, .csv (these also with .gz) or .parquet",
        )
    numbering, reader = found
    return RowStream(numbering, _with_clear_errors(reader(path, where), where))


_Reader = Callable[[Path, str], Iterator[RawRow]]


def _reader_for(name: str) -> tuple[str, _Reader] | None:
    readers: dict[str, tuple[str, _Reader]] = {
        ".jsonl": ("line", read_jsonl),
        ".json": ("row", read_json),
        ".csv": ("data row", read_csv),
    }
    name = name.lower()
    if name.endswith(".parquet"):
        return "row", _read_parquet
    return readers.get(Path(name.removesuffix(".gz")).suffix)


def _with_clear_errors(rows: Iterator[RawRow], where: str) -> Iterator[RawRow]:
    try:
        yield from rows
    except EOFError:
        raise DataError(
            "the gzip file ends in the middle: it was cut off",
            where=where,
            hint="copy or download it again; `gzip -t FILE` tells whether it is whole",
        ) from None
    except (gzip.BadGzipFile, zlib.error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"the file is damaged or of another type than its name says: {first_line(error)}",
            where=where,
            hint="copy or download it again, or give it the ending of what it is",
        ) from None
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror or first_line(error)}",
            where=where,
            hint="check its permissions and that the disk is healthy",
        ) from None


def _read_parquet(path: Path, where: str) -> Iterator[RawRow]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two columns are called {twice!r}", where=where, hint="give each column its own name")
        # Dates are never trained on, and those in nanoseconds cannot always be turned into Python's.
        columns = [column.name for column in file.schema_arrow if not pyarrow.types.is_temporal(column.type)]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in _batch_rows(batch):
                number += 1
                yield RawRow(number, fault=row) if isinstance(row, str) else RawRow(number, row)


def _batch_rows(batch: pyarrow.RecordBatch) -> list[dict | str]:
    """The rows, with the fault in the place of one that cannot be read."""
    try:
        return batch.to_pylist()
    # Text columns are not checked when written, and a date inside a message may be in the year 36000: find the
    # rows that are wrong.
    except (UnicodeDecodeError, OverflowError) as error:
        if len(batch) == 1:
            return [INVALID_UTF8 if isinstance(error, UnicodeDecodeError) else UNREADABLE]
        return [row for index in range(len(batch)) for row in _batch_rows(batch.slice(index, 1))]


def _read_hub(source: SourceSection) -> Iterator[RawRow]:
    import datasets  # slow to import, and only this reader needs it

    try:
        dataset = datasets.load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # a dozen classes from four libraries, none of which a user should meet
        raise _hub_error(source, error) from None
    for number, row in enumerate(dataset, start=1):
        yield RawRow(number, row)


def _hub_error(source: SourceSection, error: Exception) -> DataError:
    message = first_line(error)
    if isinstance(error, ConnectionError) or "offline" in message.lower():
        hint = "this machine has no way to the hub; download the data set as a file and name that file"
    elif "config" in message.lower():
        hint = "set subset: to one of the configurations of this data set"
    elif "split" in message.lower():
        hint = "set split: to one of the splits of this data set"
    else:
        hint = "check the name; for a local file write its path with its ending (.jsonl, .json, .csv, .parquet)"
    return DataError(f"the hub data set cannot be loaded: {message}", where=source.path, hint=hint)
