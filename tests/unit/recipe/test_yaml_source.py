"""YAML reading: numbers, lines, and files made to hurt."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.errors import RecipeError
from qhybrid.recipe.yaml_source import dump_yaml, parse_value, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("", None),
        ('"2e-4"', "2e-4"),
        ("'3'", "3"),
        ("0-9", "0-9"),
        ("30%-70%", "30%-70%"),
        ("[a, 1]", ["a", 1]),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_value(text, "x")
    assert parsed == value and type(parsed) is type(value)


def test_every_key_and_item_has_its_line():
    source = parse_yaml("a: 1\nb:\n  - x\n  - y: 2\n\nc: {d: 3}\n", "f.yaml")
    assert source.values == {"a": 1, "b": ["x", {"y": 2}], "c": {"d": 3}}
    assert source.where(("b", 1, "y")) == "f.yaml:4"
    assert source.where(("b", 0)) == "f.yaml:3"
    assert source.where(("c", "d")) == "f.yaml:6"
    assert source.where(("b", 1, "missing")) == "f.yaml:4"
    assert source.where(("missing",)) == "f.yaml"


def test_anchors_and_merge_keys_work():
    source = parse_yaml("base: &b {rank: 8, alpha: 16}\ntop: {<<: *b, rank: 4}\nsame: *b\n", "f")
    assert source.values["top"] == {"rank": 4, "alpha": 16}
    assert source.values["same"] == {"rank": 8, "alpha": 16}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (BOMB, None, "aliases count"),
        ("a: " + "[" * 5000 + "]" * 5000, 1, "nested deeper"),
        ("a: 1\n" * 3, 2, "given twice"),
        ("a:\n  b: 1\n  b: 2\n", 3, "given twice"),
        ("a: !!python/object/apply:os.system ['true']", 1, "tags"),
        ("a: !x 1", 1, "tags"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: b: c", 1, "not valid YAML"),
        ("a: *nowhere", 1, "alias"),
        ("? [1, 2]\n: 3", 1, "key"),
        ("- 1\n- 2", None, "mapping"),
        ("just words", None, "mapping"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        ("a: \x01", None, "not valid YAML"),
        ("x" * 300_000, None, "larger than"),
    ],
)
def test_hostile_files_are_one_quick_error(text, line, words):
    began = time.perf_counter()
    with pytest.raises(RecipeError, match=words) as caught:
        parse_yaml(text, "bad.yaml")
    assert time.perf_counter() - began < 0.5
    if line is not None:
        assert str(caught.value).startswith(f"bad.yaml:{line}: ")


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_a_recipe_error(text):
    with contextlib.suppress(RecipeError):
        parse_yaml(text, "x")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcd", min_size=1), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=5), PLAIN, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_we_write_is_read_back(values):
    text = dump_yaml(values)
    assert parse_yaml(text, "x").values == values
