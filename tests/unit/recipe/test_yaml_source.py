"""YAML reading: numbers, lines, anchors, and writing what reads back equal."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: b: c", 1, "not valid YAML"),
        ("a: 1\nb: *nowhere", 2, "alias"),
        ("? [1, 2]\n: 3", 1, "key"),
        ("~: 1", 1, "key"),
    ],
)
def test_mistakes_name_their_line(text, line, words):
    """tests/faults/test_hostile_recipes.py has what is no mistake."""
    with pytest.raises(RecipeError, match=words) as caught:
        parse_yaml(text, "bad.yaml")
    assert str(caught.value).startswith(f"bad.yaml:{line}: ")


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
