"""Recipes with slips: a mistyped key is told the right name, and no text or override ends in a traceback."""

from __future__ import annotations

import contextlib
import random
import string
from collections.abc import Sequence
from typing import Any

import pytest
from helpers import GOOD_RECIPE as GOOD
from helpers import record_figure
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.errors import QhybridError, RecipeError
from qhybrid.recipe.aliases import CONVERTED, MEANT, TOP_LEVEL, WITHOUT_COUNTERPART, own_name
from qhybrid.recipe.band import AdaLoraSection, BandSection
from qhybrid.recipe.load import dump_recipe, parse_recipe, resolve
from qhybrid.recipe.monitoring import MonitoringSection
from qhybrid.recipe.schema import (
    DataSection,
    DistributedSection,
    MemorySection,
    ModelSection,
    QuantizationSection,
    Recipe,
    SourceSection,
)
from qhybrid.recipe.training_fields import OWNED_ELSEWHERE, TrainingSection
from qhybrid.recipe.yaml_source import dump_yaml

SECTIONS: dict[tuple[str | int, ...], Any] = {
    (): Recipe,
    ("model",): ModelSection,
    ("quantization",): QuantizationSection,
    ("adapters", 0): BandSection,
    ("adapters", 0, "adalora"): AdaLoraSection,
    ("data",): DataSection,
    ("data", "sources", 0): SourceSection,
    ("training",): TrainingSection,
    ("memory",): MemorySection,
    ("distributed",): DistributedSection,
    ("monitoring",): MonitoringSection,
}


def mistyped(key: str, generator: random.Random) -> str:
    """`key` with one letter wrong, missing, too much, or in its neighbour's place."""
    place = generator.randrange(len(key))
    letter = generator.choice(string.ascii_lowercase)
    return generator.choice(
        [
            key[:place] + letter + key[place + 1 :],
            key[:place] + key[place + 1 :],
            key[:place] + letter + key[place:],
            key[:place] + key[place : place + 2][::-1] + key[place + 2 :],
        ]
    )


def is_a_name(path: tuple[str | int, ...], word: str) -> bool:
    """Whether `word` means something at `path`: then it is no typo."""
    foreign = {*TOP_LEVEL, *CONVERTED, *WITHOUT_COUNTERPART, *TrainingSection.model_fields} if not path else set()
    return word in SECTIONS[path].model_fields or own_name(path, word) != word or word in foreign | MEANT.keys()


def recipe_with(path: tuple[str | int, ...], key: str) -> str:
    """A good recipe with `key` put into the section at `path`."""
    values: dict[str, Any] = {
        "model": {"path": "x"},
        "adapters": [{"kind": "adalora", "adalora": {"beta1": 0.9}}],
        "data": {"sources": [{"path": "a"}]},
        "output_dir": "o",
    }
    section: Any = values
    for part in path:
        section = section.setdefault(part, {}) if isinstance(part, str) else section[part]
    section[key] = 1
    return dump_yaml(values)


@pytest.mark.parametrize("sections", [SECTIONS, {**SECTIONS, ("training",): None}], ids=["all", "our own"])
def test_of_100_typos_100_are_refused_and_90_get_the_right_hint(sections):
    """Over all keys, and once more over those that are not trl's, which are shorter and so harder to tell."""
    generator = random.Random(13)
    keys = [
        (path, key)
        for path, section in sections.items()
        for key in (section.model_fields if section else ())
        if section is not TrainingSection or key not in OWNED_ELSEWHERE  # which are refused when spelt right
    ]
    hinted, tried, wrong = 0, 0, []
    while tried < 100:
        path, key = generator.choice(keys)
        typo = mistyped(key, generator)
        if typo == key or is_a_name(path, typo):
            continue
        tried += 1
        text = recipe_with(path, typo)
        line = next(number for number, row in enumerate(text.splitlines(), 1) if f"{typo}: 1" in row)
        with pytest.raises(RecipeError) as caught:
            parse_recipe(text, "r.yaml")
        place = ".".join(map(str, (*path, typo)))
        message = str(caught.value)
        assert message.startswith(f"r.yaml:{line}: {place}: unknown key"), message
        if f"did you mean {key!r}?" in message:
            hinted += 1
        else:
            wrong.append(message)
    assert hinted >= 90, wrong
    which = "all keys" if sections[("training",)] else "our own keys"
    record_figure(10, f"one-letter typos of {which}", f"{tried}/100 refused, {hinted} with the right hint")


# ---- any text ----

FRAGMENTS = st.sampled_from(
    [
        *(": ", "\n", "\n  ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!", "!x ", "? ", "|", ">", "%"),
        *("'", '"', "~", ".nan", "-.inf", "1e999", "2e-4", "-1", "0", "true", "null", "\0", "\t", "\ufeff", "²"),
        *("adapters", "training", "data", "sources", "lora_rank", "bf16", "fp16", "template", "datasets"),
        *("deepspeed", "zero_stage", "chat_template", "gradient_checkpointing_kwargs", "every_n_layers", "vram"),
    ]
)  # fmt: skip
NOISE = st.text(max_size=6) | FRAGMENTS
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), NOISE), min_size=1, max_size=6)


def edited(text: str, edits: Sequence[tuple[float, int, str]]) -> str:
    """`text` in which pieces of some characters are replaced."""
    for where, length, piece in edits:
        start = int(where * len(text))
        text = text[:start] + piece + text[start + length :]
    return text


def survives(text: str, overrides: Sequence[str] = ()) -> None:
    """Only our errors come out; what is taken can be written and read again."""
    with contextlib.suppress(QhybridError):
        recipe, _ = parse_recipe(text, "r.yaml", overrides)
        parse_recipe(dump_recipe(resolve(recipe)), "again.yaml")


@given(st.lists(NOISE, max_size=40).map("".join))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_text_is_a_recipe_or_our_error(text):
    survives(text)


@given(EDITS)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_edit_of_a_recipe_is_a_recipe_or_our_error(edits):
    survives(edited(GOOD, edits))


KEYS = st.sampled_from(
    sorted({key for section in SECTIONS.values() for key in section.model_fields} | {*TOP_LEVEL, *CONVERTED})
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NOISE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | NOISE, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["model", "adapters", "data", "training", "distributed"]) | KEYS, VALUES))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_right_keys_with_any_value_are_a_recipe_or_our_error(values):
    survives(dump_yaml({"model": {"path": "x"}, "adapters": [{}], "data": {"sources": "a"}, **values}))


PARTS = KEYS | st.sampled_from(["0", "1", "mid", "bottom", "band0", ""]) | NOISE


@given(st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=4).map(".".join), NOISE), min_size=1, max_size=3))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_override_is_taken_or_our_error(pairs):
    survives(GOOD, [f"{key}={value}" for key, value in pairs])
