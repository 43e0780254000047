"""One HTML file from sections of text, tables and pictures: no script, style or picture from anywhere else."""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from qhybrid import __version__
from qhybrid.report.svg import shown

_FOLDER = Path(__file__).parent
GENERATOR = f"qhybrid {__version__}"


@dataclass(frozen=True)
class Legend:
    """What a colour stands for; style is a line's, or "fill"."""

    name: str
    colour: int
    style: str = "line"


@dataclass(frozen=True)
class Figure:
    """A picture with what the reader should see in it.

    Attributes:
        wide: it takes the page's whole width.
        frames: JSON for page.js, which then lets the reader choose a moment.
    """

    title: str
    picture: Markup
    caption: str
    legend: Sequence[Legend] = ()
    wide: bool = False
    frames: str | None = None
    kind: str = "figure"


@dataclass(frozen=True)
class Gallery:
    """Small pictures with short titles, to be compared."""

    title: str
    pictures: Sequence[tuple[str, Markup]]
    caption: str
    kind: str = "gallery"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `left` columns to the left, the others, which hold numbers, to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    caption: str = ""
    wide: bool = True
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Note:
    """A sentence; tone "warning" stands out."""

    text: str
    tone: str = "plain"
    kind: str = "note"


@dataclass(frozen=True)
class Folded:
    """A long text that opens on a click."""

    title: str
    text: str
    kind: str = "folded"


@dataclass(frozen=True)
class Answers:
    """A prompt and texts that answer it: (title, text, verdict), the verdict right, wrong or empty."""

    title: str
    prompt: str
    answers: Sequence[tuple[str, str, str]]
    kind: str = "answers"


Block = Figure | Gallery | Table | Note | Folded | Answers


@dataclass(frozen=True)
class Section:
    """A part of the page, with an id of letters for links to it."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Card:
    """A figure in large type: what it is, its value, and a few words to it."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report. `badge` is a word and its tone: good, warning or bad."""

    kind: str
    title: str
    badge: tuple[str, str]
    lead: str
    cards: Sequence[Card]
    notes: Sequence[Note]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML. Every text is escaped and redacted; a policy in it forbids whatever is not its own."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    now = datetime.datetime.now().astimezone()
    return environment.get_template("page.html").render(
        page=page,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        generator=GENERATOR,
        made=f"{now:%Y-%m-%d %H:%M %Z}",
    )


def is_report(file: Path) -> bool:
    """Whether a file was written by `render`."""
    try:
        with file.open("rb") as stream:
            return b'<meta name="generator" content="qhybrid ' in stream.read(2000)
    except OSError:
        return False


def _shown(value: Any) -> Any:
    """What jinja writes for a value: plain text is redacted here, before it is escaped."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return shown(value)
    return value


def _prose(text: str) -> Markup:
    """A sentence, with what stands in `backticks` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(_shown(text)))))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
