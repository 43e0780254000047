"""The event log: one JSON object a line, written as it happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qhybrid.redaction import redacted_values


class EventLog:
    """Appends events to a file; each line has "event" and "time" (seconds since 1970) first."""

    def __init__(self, file: Path) -> None:
        # A link in its place could lead to any file of the user's.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = open(descriptor, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if not _ends_a_line(file):  # the disk was full, or the machine fell; what comes now must not be lost too
            self._file.write("\n")

    def write(self, event: str, **facts: Any) -> None:
        """Append one event, redacted. NaN and infinities, which JSON lacks, are written as text."""
        record = redacted_values({"event": event, "time": round(time.time(), 3), **facts})
        self._file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. What could not be written is told by `write`, and not again."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_events(file: Path, event: str | None = None) -> list[dict[str, Any]]:
    """All events of a log, or those of one kind. A last line that was cut off by a crash is left out."""
    return [record for record in iterate_events(file) if event is None or record.get("event") == event]


def iterate_events(file: Path) -> Iterator[dict[str, Any]]:
    """The events of a log one after the other, never all in memory; a line that is none is left out."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
