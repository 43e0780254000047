"""Watches which files Python opens, creates, links or renames: were any of them outside a folder?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qhybrid.redaction import login_token_file

# The interpreter, its packages and qhybrid itself are read whenever a module is imported for the first time.
_OWN = tuple(
    os.path.realpath(place)
    for place in (
        sys.prefix,
        sys.base_prefix,
        *filter(None, sys.path),
        "/proc",
        "/sys",
        "/dev/null",
        "/dev/urandom",
    )
)
_EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate")
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple) -> None:
    if _seen is not None and event in _EVENTS:
        _seen.extend(os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike)))


sys.addaudithook(_hook)


@contextmanager
def only_inside(*roots: Path) -> Iterator[None]:
    """Fails if within the block a file outside `roots` is opened, for reading or writing, or changed."""
    global _seen
    _seen = touched = []
    try:
        yield
    finally:
        _seen = None
    allowed = (*map(os.path.realpath, (*roots, login_token_file())), *_OWN)
    # The second argument of "open" is its mode, such as "r" or "rb": a name without a slash.
    outside = [
        path
        for path in touched
        if "/" in path and not any(_is_in(os.path.realpath(path), root) for root in allowed)
    ]
    assert not outside, outside


def _is_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root + os.sep)
