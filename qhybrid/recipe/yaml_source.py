"""YAML text to plain values, with the line of every key: YAML 1.2 scalars, bounded in size and depth."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from qhybrid.errors import RecipeError
from qhybrid.recipe.excerpt import excerpt, excerpt_key

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000  # scalars, lists and mappings, after aliases are expanded

Path = tuple[str | int, ...]

# The core schema of YAML 1.2. PyYAML's own resolver follows 1.1: `2e-4` is text there, and `no` is False.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")

# What YAML does not take unescaped. Lone surrogates are bytes of a command line that were not UTF-8.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Source:
    """Parsed YAML: the values, and the line on which each key or list item stands."""

    name: str
    values: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)

    def where(self, path: Path) -> str:
        """ "file:line" of `path`, or of its nearest parent that stands in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def parse_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar under the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < 40:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float(special[1] + special[2].lower())
    return text


def parse_yaml(text: str, name: str) -> Source:
    """Parse a document whose top level is a mapping.

    Raises:
        RecipeError: not YAML, too large or too deep, a key given twice, a tag, or no mapping at the top.
    """
    lines: dict[Path, int] = {}
    values = _build(text, name, lines)
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of sections", where=name, hint="start with `model:`")
    return Source(name, values, lines)


def parse_value(text: str, name: str) -> Any:
    """Parse one value, as on the right of an override: `1e-4`, `[q_proj, v_proj]`, `true`."""
    return _build(text, name, {})


class _Dumper(yaml.SafeDumper):
    """Writes text that this module would read as something else in quotes."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(value), str) and value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass
class _Open:
    """A mapping or a sequence that is still being read."""

    container: Any  # dict or list
    path: Path
    line: int
    anchor: str | None
    key: str | None = None
    merged: dict[str, Any] = field(default_factory=dict)
    size: int = 1
    height: int = 1  # levels of lists and mappings, itself included


@dataclass(frozen=True)
class _Anchored:
    """A value that has a name, and what an alias of it adds."""

    value: Any
    size: int
    height: int


def too_large(name: str) -> RecipeError:
    """The error for a file, or an override, beyond MAX_BYTES."""
    return RecipeError(f"larger than {MAX_BYTES // 1024} KiB, as no recipe is", where=name)


def _build(text: str, name: str, lines: dict[Path, int]) -> Any:
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise too_large(name)
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        raise RecipeError(
            f"not valid YAML: the character {forbidden[0]!r} cannot stand in it",
            where=f"{name}:{text.count(chr(10), 0, forbidden.start()) + 1}",
            hint="a recipe is UTF-8 text without control characters",
        )
    try:
        return _from_events(text, name, lines)
    except yaml.MarkedYAMLError as error:
        line = min(error.problem_mark.line, text.count("\n")) + 1 if error.problem_mark else 1
        raise RecipeError(
            f"not valid YAML: {error.problem or error.context}",
            where=f"{name}:{line}",
            hint="indent with blanks: YAML takes no tabs"
            if "\t" in text.split("\n")[line - 1]
            else "check the indentation, and quote values that contain ': ' or start with % or @",
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())[:200]}", where=name) from None


def _from_events(text: str, name: str, lines: dict[Path, int]) -> Any:
    stack: list[_Open] = []
    anchors: dict[str, _Anchored] = {}
    root: list[Any] = []
    num_nodes = 0
    documents = 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def place(value: Any, size: int, height: int, line: int) -> None:
        """Put a finished value into the innermost open container."""
        if not stack:
            root.append(value)
            return
        top = stack[-1]
        top.size += size
        top.height = max(top.height, 1 + height)
        if isinstance(top.container, list):
            top.container.append(value)
            return
        if top.key is None:
            top.key = _as_key(value, f"{name}:{line}")
            if (*top.path, top.key) in lines:  # a merge key is not in the container
                raise RecipeError(f"the key {excerpt(top.key)} is given twice", where=f"{name}:{line}")
            lines[(*top.path, top.key)] = line
            return
        if top.key == "<<":  # merge key: what stands here wins over what is merged
            if not isinstance(value, dict):
                raise RecipeError("<< must name a mapping", where=f"{name}:{line}")
            top.merged = {**value, **top.merged}
        else:
            top.container[top.key] = value
        top.key = None

    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1
        here = f"{name}:{line}"
        if getattr(event, "tag", None) not in (None, "!"):
            raise RecipeError(f"YAML tags such as {excerpt(event.tag)} are not used in recipes", where=here)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RecipeError("one file holds one recipe; remove the second document", where=here)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if len(stack) >= MAX_DEPTH:
                raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", where=here)
            path = _child_path(stack[-1] if stack else None, here)
            lines.setdefault(path, line)
            container: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            num_nodes += 1
            stack.append(_Open(container, path, line, event.anchor))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            closed = stack.pop()
            for key, value in closed.merged.items():
                closed.container.setdefault(key, value)  # only a mapping has merge keys
            if closed.anchor:
                anchors[closed.anchor] = _Anchored(closed.container, closed.size, closed.height)
            place(closed.container, closed.size, closed.height, closed.line)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise RecipeError(f"the alias *{excerpt_key(event.anchor)} has no anchor before it", where=here)
            named = anchors[event.anchor]
            if len(stack) + named.height > MAX_DEPTH:
                raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", where=here)
            num_nodes += named.size
            if num_nodes <= MAX_NODES:
                # A copy, or an override of one place would change the others.
                place(copy.deepcopy(named.value), named.size, named.height, line)
        elif isinstance(event, yaml.ScalarEvent):
            value = _scalar(event, stack[-1].key if stack else None, here)
            if stack and isinstance(stack[-1].container, list):
                lines[(*stack[-1].path, len(stack[-1].container))] = line
            if event.anchor:
                anchors[event.anchor] = _Anchored(value, 1, 0)
            num_nodes += 1
            place(value, 1, 0, line)
        if num_nodes > MAX_NODES:
            raise RecipeError(f"more than {MAX_NODES:,} values; aliases count each time", where=here)
    return root[0] if root else None


def _scalar(event: yaml.ScalarEvent, key: str | None, here: str) -> Any:
    """The value of a scalar. No setting takes what is not finite, and some are never checked by the schema."""
    value = parse_scalar(event.value) if event.implicit[0] else event.value  # [0]: not quoted
    if isinstance(value, float) and not math.isfinite(value):
        name = f"{excerpt_key(key)}: " if key else ""
        raise RecipeError(
            f"{name}{excerpt_key(event.value)} is not a finite number", where=here, hint="quote it if it is text"
        )
    return value


def _child_path(parent: _Open | None, here: str) -> Path:
    if parent is None:
        return ()
    if isinstance(parent.container, list):
        return (*parent.path, len(parent.container))
    if parent.key is None:
        raise RecipeError("a key must be a word, not a list or a mapping", where=here)
    return (*parent.path, parent.key)


def _as_key(value: Any, here: str) -> str:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise RecipeError(f"{excerpt(value)} is not a usable key", where=here)
