"""What a recipe says, cut to a length that fits into a message and without characters that steer a terminal."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

_MAX_CHARACTERS = 80

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = _MAX_CHARACTERS
_shortened.maxlevel = 3


def excerpt(value: object) -> str:
    """`repr(value)`, with an ellipsis in the middle where it is long or deep."""
    return _shortened.repr(value)


def excerpt_key(key: object) -> str:
    """A key as it is written; as in `excerpt` where that would be long or not printable."""
    text = str(key)
    return text if len(text) <= _MAX_CHARACTERS and text.isprintable() else excerpt(text)


def excerpt_list(items: Iterable[object], *, most: int = 10) -> str:
    """The first `most` of `items` as keys, and how many more there are."""
    listed = list(items)
    shown = ", ".join(excerpt_key(item) for item in listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most:,} more"
