"""Quantities as people write them: parse and print bytes, counts, fractions and durations."""

from __future__ import annotations

import re

_BYTE_UNITS = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` ("24GiB", "500 MB") stands for.

    Raises:
        ValueError: no unit, an unknown unit, or not a positive amount.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory; write for example 24GiB")
    amount, unit = float(match[1]), match[2].upper()
    if not unit:
        raise ValueError(f"{text!r} has no unit; write {match[1]}GiB or {match[1]}GB")
    if unit not in _BYTE_UNITS:
        raise ValueError(f"{text!r} has an unknown unit; use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    if amount <= 0:
        raise ValueError(f"{text!r} must be more than zero")
    return int(amount * _BYTE_UNITS[unit])


def parse_count(text: str) -> int:
    """Return the number that `text` ("20M", "1.5 B", "300k", "39_976_960") stands for; k, M and B are decimal.

    Raises:
        ValueError: not such a text, or not a whole number above zero.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMbBgG]?)\s*", text)
    if match is None or len(text) > 40:
        raise ValueError(f"{text[:40]!r} is not a count; write for example 20M")
    factor = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}[match[2].lower()]
    number = float(match[1].replace("_", "").replace(",", "")) * factor
    if number < 1 or number != int(number):
        raise ValueError(f"{text!r} is not a whole number above zero")
    return int(number)


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` with a binary unit and two decimals: 3341000000 becomes "3.11 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"


def format_count(number: int) -> str:
    """A count with thousands separators: 39976960 becomes "39,976,960"."""
    return f"{number:,}"


def format_duration(seconds: float) -> str:
    """`seconds` as "45s", "3m 20s" or "2h 05m"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m {seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"
