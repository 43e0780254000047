"""The keys of peft's rank_pattern and alpha_pattern, which are regular expressions: read without backtracking."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qhybrid.errors import AdapterError

MOST_KEYS, LONGEST = 4096, 500  # of patterns; of a key or a tensor's name, in characters
# One step of a pattern's key: a character or a class, with how often; the begin or end of a group; or, an edge.
_STEP = re.compile(
    r"(?P<one>[^()\[\]{}\\|*+?^$]|\\(?:[dw]|[^\w\s])|\[\^?(?:[\w.-]|\\[dw.-])+\])"
    r"(?:(?P<sign>[*+?])\??|\{(?P<least>\d{1,2})(?P<most>,\d{0,2})?\}\??)?"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\))(?P<maybe>\??)|(?P<other>[|^$])"
)


def require_key(key: str, pattern: str, where: str) -> None:
    """Refuse a key that is no regular expression, or one beyond what `selects` reads."""
    if len(key) > LONGEST:
        raise AdapterError(f"its {pattern} has a key of {len(key)} characters", where=where)
    try:
        re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"its {pattern} has {key!r}: {error}", where=where) from None
    if "".join(step[0] for step in _STEP.finditer(key)) != key:
        raise AdapterError(
            f"its {pattern} has {key!r}, which is not read here",
            where=where,
            hint="names, alternatives, character classes, and repeats of one character or class are",
        )


def first_of(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that selects the module `name`, as peft takes it."""
    return next((value for key, value in patterns.items() if selects(key, name)), default)


def selects(key: str, name: str) -> bool:
    """Whether the regular expression (.*\\.)?(key)$ matches `name`, which is how peft reads a pattern's key.

    All ways through the expression are followed at once, as the set of places in `name` that they have come to,
    so that no key takes long: backtracking can take for ever.
    """
    if re.fullmatch(r"[\w.]+", key):
        start = len(name) - len(key)
        return (start == 0 or name[:start].endswith(".")) and all(
            one in (".", other) for one, other in zip(key, name[start:], strict=True)
        )
    end = len(name)
    here = {0, *(i + 1 for i in range(end) if name[i] == ".")}
    groups: list[tuple[set[int], set[int]]] = [(here, set())]  # where each began, and its alternatives' ends
    for step in _STEP.finditer(key):
        if step["open"]:
            groups.append((here, set()))
        elif step["close"]:
            began, ends = groups.pop()
            here = here | ends | (began if step["maybe"] else set())
        elif step["other"] == "|":
            began, ends = groups[-1]
            ends |= here
            here = began
        elif step["other"]:
            here = here & {0 if step["other"] == "^" else end}
        else:
            here = _after_repeats(here, step, name)
    return end in here | groups[0][1]


def _after_repeats(here: set[int], step: re.Match[str], name: str) -> set[int]:
    """Where one may be after a character or a class, as often as its step says."""
    one = re.compile(step["one"])
    least, most = {"*": (0, None), "+": (1, None), "?": (0, 1), None: (1, 1)}[step["sign"]]
    if step["least"]:
        least = most = int(step["least"])
        if step["most"]:
            most = int(step["most"][1:]) if step["most"] != "," else None
    found = set(here) if least == 0 else set()
    for times in range(1, (len(name) if most is None else most) + 1):
        here = {i + 1 for i in here if i < len(name) and one.fullmatch(name[i])}
        if not here:
            break
        if times >= least:
            found |= here
    return found
