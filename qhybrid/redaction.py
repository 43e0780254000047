"""Takes secrets and the home directory out of text before it is written or printed.

Hidden are the values of environment variables that name a secret, the token of the Hugging Face login, what looks
like one, and what stands before the @ of a URL. The home directory becomes "~", which readers of recipes expand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"

_SECRET_ENDINGS = ("TOKEN", "_KEY", "SECRET", "PASSWORD")
_MIN_SECRET_LENGTH = 8  # shorter values, such as "1" or "none", occur in harmless text

# In "https://user:password@host" what lies between the slashes and the @. One slash is enough: that is what is
# left of two when a URL is taken for a path. The second form is a password with a slash in it.
_USERINFO = re.compile(
    r"([A-Za-z][A-Za-z0-9+.\-]*:/+)(?:([^\s/?#'\"<>]+)@|([^\s/?#@:'\"<>]*:(?!\d+/)[^\s'\"<>]*)@)"
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

# What may stand before a path: nothing that belongs to a longer one. Escapes of JSON and of terminals end in a
# letter or a digit, but do.
_PATH_BEGINS = r"(^|[^\w.\-]|\\[ntr]|\\u[0-9a-f]{4}|(?:\x1b|\\x1b|\\u001b)\[[0-9;]*m)"
_PATH_ENDS = r"(?![\w\-]|\.\w)"


def redacted(text: str) -> str:
    """`text` without secrets, and with "~" in the place of the home directory."""
    secrets, homes = _rules()
    return _apply(text, secrets, homes)


def redacted_values(value: Any) -> Any:
    """`value` with `redacted` applied to every text in it; dicts, lists and tuples are copied."""
    secrets, homes = _rules()

    def walk(inner: Any) -> Any:
        if isinstance(inner, str):
            return _apply(inner, secrets, homes)
        if isinstance(inner, dict):
            return {walk(key): walk(item) for key, item in inner.items()}
        if isinstance(inner, (list, tuple)):
            return [walk(item) for item in inner]
        return inner

    return walk(value)


def redacted_traceback(error: BaseException) -> str:
    """What Python prints for an exception that nobody caught, redacted. Values of variables are not in it."""
    return redacted("".join(traceback.format_exception(error)))


@contextmanager
def redacted_output() -> Iterator[None]:
    """Within, everything that Python writes to standard output and standard error is redacted."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _RedactedStream(before[0]), _RedactedStream(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _RedactedStream:
    """A text stream that redacts each piece it is given; in all else it is the stream that it wraps.

    A secret that is split between two calls of `write` is not recognised.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if not (getattr(stream, "encoding", None) or "utf").lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")  # as click does it on streams with a buffer

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # a way around
            raise AttributeError(name)
        return getattr(self._stream, name)


def _rules() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The secrets and the names of the home directory, as they are now."""
    secrets = set()
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRET_ENDINGS):
            secrets.add(value.strip())
        if "://" in value:
            secrets |= _passwords(value)
    with contextlib.suppress(OSError, ValueError):
        secrets.add(login_token_file().read_text(encoding="utf-8").strip())
    home = os.path.expanduser("~").rstrip("/")
    homes = {home, os.path.realpath(home)} if home.startswith("/") else set()
    return tuple(sorted(s for s in secrets if len(s) >= _MIN_SECRET_LENGTH)), tuple(sorted(homes - {"/"}))


def _passwords(text: str) -> set[str]:
    """The passwords in the URLs of `text`, as written and with their %-escapes resolved."""
    found = set()
    for match in _USERINFO.finditer(text):
        password = (match[2] or match[3]).partition(":")[2]
        found |= {password, unquote(password)}
    return found


def login_token_file() -> Path:
    """Where `hf auth login` saves its token."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))


def _apply(text: str, secrets: tuple[str, ...], homes: tuple[str, ...]) -> str:
    secret_pattern, home_pattern = _patterns(secrets, homes)
    if secret_pattern is not None:
        text = secret_pattern.sub(HIDDEN, text)
    text = _HUB_TOKEN.sub(HIDDEN, text)
    if "@" in text:
        text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    return text if home_pattern is None else home_pattern.sub(r"\1~", text)


@lru_cache(maxsize=8)
def _patterns(
    secrets: tuple[str, ...], homes: tuple[str, ...]
) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    return (
        re.compile(_any_of(secrets)) if secrets else None,
        re.compile(f"{_PATH_BEGINS}(?:{_any_of(homes)}){_PATH_ENDS}") if homes else None,
    )


def _any_of(texts: tuple[str, ...]) -> str:
    """A pattern of `texts` and of the forms that JSON, Python and URLs give them, the longest first."""
    forms = {form for text in texts for form in _forms(text)}
    return "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))


def _forms(text: str) -> set[str]:
    as_json = (json.dumps(text, ensure_ascii=escaped)[1:-1] for escaped in (True, False))
    both_quotes = repr(text + "\"'")[1:-4]  # in a text with both kinds, repr escapes the single ones
    return {text, *as_json, repr(text)[1:-1], both_quotes, quote(text)}
