"""The page: everything from outside is escaped and redacted, and a browser lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re

from markupsafe import Markup
from report_helpers import PageText, require_self_contained

from qhybrid.report.page import Answers, Card, Figure, Folded, Gallery, Legend, Note, Page, Section, Table, render
from qhybrid.report.svg import Picture

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7*7 }}</style></pre>"


def page_of(text: str) -> str:
    """A page with `text` in every place that takes some."""
    picture = Picture(100, 50, text, "chart")
    picture.label(1, 2, text)
    picture.add("title", text, into=picture.add("rect", x=1.0, y=2.0, width=3.0, height=4.0))
    svg = picture.markup()
    blocks = [
        Figure(text, svg, text, [Legend(text, 1), Legend(text, 2, "fill"), Legend(text, 3, "dots")], frames=text),
        Gallery(text, [(text, svg)], text),
        Table(text, (text, text), [(text, text)], caption=text),
        Note(text, "warning"),
        Folded(text, text),
        Answers(text, text, [(text, text, "right"), (text, text, "")]),
    ]
    return render(
        Page(
            kind=text,
            title=text,
            badge=(text, "good"),
            lead=text,
            cards=[Card(text, text, text)],
            notes=[Note(text)],
            sections=[Section("one", text, text, blocks)],
        )
    )


def test_hostile_text_is_text():
    page = page_of(EVIL)
    require_self_contained(page)
    parsed = PageText(page)
    assert "<script>alert" in parsed.text and "{{ 7*7 }}" in parsed.text  # as text
    assert "<script>alert" not in page and "<img" not in page
    assert any(attributes.get("data-frames") == EVIL for attributes in parsed.of("figure"))
    assert all(attributes["aria-label"] == EVIL for attributes in parsed.of("svg") if attributes.get("role"))


def test_secrets_are_hidden_before_they_are_escaped(monkeypatch):
    secret = "s3cret<&>\"'rest-of-it"
    monkeypatch.setenv("SOME_TOKEN", secret)
    monkeypatch.setenv("HOME", "/home/someone")
    page = page_of(f"a {secret} b /home/someone/data.jsonl https://me:pass-word@host/x")
    for word in ("s3cret", "rest-of-it", "/home/someone", "pass-word"):
        assert word not in page
    assert "~/data.jsonl" in page


def test_code_in_sentences():
    page = page_of("say `a < b` now")
    assert "<code>a &lt; b</code>" in page and "`a &lt; b`" in page  # in sentences, not in cells


def test_no_text_is_no_error():
    page = page_of("a\ud800b\x00c\x1b[31md\U0001f600 \u202e")
    page.encode("utf-8")
    assert "\x00" not in page and "\x1b" not in page and "a\ufffdb\ufffdc" in page


def test_the_policy_allows_its_own_style_and_script_alone():
    page = page_of("x")
    policy = next(
        m["content"] for m in PageText(page).of("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "*" not in policy
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_picture_is_not_escaped_twice():
    page = page_of("a & b")
    assert "&amp;amp;" not in page and isinstance(Picture(1, 1, "", "chart").markup(), Markup)
