"""Are two adapters of one base: by hashes where both know them, else by name and revision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qhybrid.adapters.bases import require_one_base
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter
from qhybrid.errors import AdapterError

INFO = AdapterInfo(
    base_model="org/base", base_revision=None, quantization="nf4", double_quant=True, dtype="bfloat16",
    adapter_dtype="bfloat16", attn_implementation="sdpa",
)  # fmt: skip
HASHED = {"base_config_sha256": "c1", "base_sha256": {"model.safetensors": "w1"}}


def adapter(name, **changes):
    return PlainAdapter((), dataclasses.replace(INFO, **changes), Path(name))


ALIKE = [
    ({}, {}),
    ({"base_model": "org/base/"}, {}),
    ({"base_revision": "abc"}, {}),
    (HASHED, {**HASHED, "base_model": "elsewhere"}),  # the same files under another name
    (HASHED, {**HASHED, "base_sha256": {"renamed.safetensors": "w1"}}),
    (HASHED, {}),  # one knows no hashes
]
UNLIKE = [
    ({}, {"base_model": "org/other"}, "name different base models: org/base and org/other"),
    ({}, {"base_model": ""}, "b does not say what its base model is"),
    ({"base_revision": "abc"}, {"base_revision": "def"}, "different revisions .* org/base@abc and org/base@def"),
    (HASHED, {**HASHED, "base_config_sha256": "c2"}, "their configurations differ"),
    (HASHED, {**HASHED, "base_sha256": {"model.safetensors": "w2"}}, "the weights differ"),
    (HASHED, {**HASHED, "base_sha256": {"1": "w1", "2": "w2"}}, "the weights differ"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_one_base(one, other):
    assert require_one_base([adapter("a", **one), adapter("b", **other)]) == []
    assert require_one_base([adapter("b", **other), adapter("a", **one)]) == []


@pytest.mark.parametrize(("one", "other", "message"), UNLIKE)
def test_different_bases_are_refused_unless_the_user_knows_better(one, other, message):
    pair = [adapter("a", **one), adapter("b", **other)]
    with pytest.raises(AdapterError, match=message) as caught:
        require_one_base(pair)
    assert "--same-base" in str(caught.value)
    assert require_one_base(pair, same_base=True) == [caught.value.message]


def test_every_pair_is_compared():
    """The first and the last differ; the one between knows no hashes."""
    last = adapter("c", **{**HASHED, "base_sha256": {"model.safetensors": "w2"}})
    with pytest.raises(AdapterError, match="a and c have different base models"):
        require_one_base([adapter("a", **HASHED), adapter("b"), last])
    assert require_one_base([adapter("a", base_model="")]) == []
