"""Bands, layouts and model specs."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from helpers import TINY, make_recipe, tiny_layout
from hypothesis import given
from hypothesis import strategies as st

from qhybrid.architecture.bands import build_layout, parse_layers
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import SUPPORTED_MODEL_TYPES, read_spec, spec_from_config
from qhybrid.errors import LayoutError, ModelError

LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


def layout_of(bands, config):
    return build_layout(make_recipe(adapters=bands), spec_from_config(config))


def test_published_parameter_counts():
    """Llama-2-7B, rank 16 on all linears: 39,976,960. The seed article's 41,843,520 is wrong;
    41,943,040 is Llama-3-8B's."""
    uniform = [{"layers": "all", "rank": 16}]
    assert layout_of(uniform, LLAMA_2_7B).num_parameters == 39_976_960
    assert layout_of(uniform, LLAMA_3_8B).num_parameters == 41_943_040
    assert spec_from_config(LLAMA_2_7B).num_linear_parameters == 6_476_005_376


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-2", [0, 1, 2]),
        ("4", [4]),
        ("0, 3,5-6", [0, 3, 5, 6]),
        ("bottom", [0, 1, 2]),
        ("middle", [3, 4, 5, 6]),
        ("TOP", [7, 8, 9]),
        ("all", list(range(10))),
        ("30%-70%", [3, 4, 5, 6]),
        ("0%-25%", [0, 1, 2]),
        ("25%-100%", [3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_layers_of_ten(text, layers):
    assert list(parse_layers(text, 10, "b")) == layers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-10", "0 to 9"),
        ("12", "out of range"),
        ("5-3", "backwards"),
        ("buttom", "did you mean 'bottom'"),
        ("70%-30%", "must rise"),
        ("0%-120%", "100%"),
        ("0-3,2", "twice"),
        ("1%-2%", "no layer"),
        ("", "does not name layers"),
        ("-1", "does not name layers"),
    ],
)
def test_layers_that_do_not_work_name_the_band(text, words):
    with pytest.raises(LayoutError) as caught:
        parse_layers(text, 10, "myband")
    assert words in str(caught.value) and "'myband'" in str(caught.value)


@given(st.integers(3, 200))
def test_thirds_and_percentages_tile_any_depth(num_layers):
    thirds = [parse_layers(word, num_layers, "b") for word in ("bottom", "middle", "top")]
    assert sum(thirds, ()) == tuple(range(num_layers))
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1


@given(st.integers(10, 200), st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True))
def test_neighbouring_percentages_leave_no_gap(num_layers, cuts):
    edges = [0, *sorted(cuts), 100]
    covered: list[int] = []
    for low, high in itertools.pairwise(edges):
        try:
            covered += parse_layers(f"{low}%-{high}%", num_layers, "b")
        except LayoutError:
            continue  # the slice is thinner than a layer
    assert covered == list(range(num_layers))


def test_kinds_scale_as_their_papers_say():
    bands = [
        {"band": "a", "layers": "0", "kind": "lora", "rank": 4, "alpha": 12},
        {"band": "b", "layers": "1", "kind": "rslora", "rank": 4, "alpha": 12},
        {"band": "c", "layers": "2", "kind": "dora", "rank": 4, "alpha": 12},
        {"band": "d", "layers": "3", "kind": "adalora", "rank": 4, "alpha": 12, "adalora": {"init_rank": 6}},
    ]
    scalings = {row.band: row.scaling for row in tiny_layout(bands)}
    assert scalings == {"a": 3.0, "b": 6.0, "c": 3.0, "d": 2.0}


def test_parameter_counts_by_kind():
    for kind, extra in (("lora", 0), ("rslora", 0), ("dora", 96), ("adalora", 6)):
        band = {"layers": "0", "kind": kind, "rank": 4, "target_modules": "up_proj"}
        if kind == "adalora":
            band["adalora"] = {"init_rank": 6}
        (row,) = tiny_layout([band])
        assert row.num_parameters == row.rank * (64 + 96) + extra


def test_two_bands_may_share_layers_but_not_modules():
    bands = [
        {"band": "a", "layers": "all", "target_modules": ["attention"]},
        {"band": "b", "layers": "0-2", "kind": "dora", "target_modules": ["mlp"]},
    ]
    layout = tiny_layout(bands)
    assert len(layout) == 6 * 4 + 3 * 3
    assert [row.layer for row in layout] == sorted(row.layer for row in layout)
    bands[1]["target_modules"] = ["re:.*_proj"]
    with pytest.raises(LayoutError) as caught:
        tiny_layout(bands)
    assert "'a'" in str(caught.value) and "'b'" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("qproj", "did you mean 'q_proj'"),
        ("re:nothing", "matches no"),
        ("lm_head", "matches no"),
        ("attn", "q_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(target, words):
    with pytest.raises(LayoutError) as caught:
        tiny_layout([{"band": "low", "target_modules": ["v_proj", target]}])
    assert words in str(caught.value) and "'low'" in str(caught.value)


def test_a_rank_above_the_weight_is_an_error():
    with pytest.raises(LayoutError, match="above 32"):
        tiny_layout([{"band": "x", "rank": 33}])


def test_layout_survives_json_and_refuses_other_files():
    layout = tiny_layout()
    assert Layout.from_json(layout.to_json()) == layout
    for text in ("", "[]", "{}", '{"format_version": 9, "rows": []}', '{"format_version": 1, "rows": [{"a": 1}]}'):
        with pytest.raises(LayoutError):
            Layout.from_json(text)


def test_the_table_names_every_band_and_the_total():
    text = tiny_layout().to_text()
    assert "6→3" in text and "lora (LoRA+ 4)" in text and "dora" in text
    assert f"total: 42 modules, {tiny_layout().num_parameters:,} parameters" in text


def config_class(model_type):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("changes", [{}, {"head_dim": 24, "attention_bias": True, "mlp_bias": True}])
def test_specs_match_transformers_own_modules(model_type, changes):
    """Contract with transformers: names, shapes and biases of every decoder linear."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = config_class(model_type)(**{**TINY, "num_hidden_layers": 2, "head_dim": 16, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = spec_from_config(json.loads(config.to_json_string(use_diff=False)))
    expected = {
        spec.module_name(layer, lin): (lin.out_features, lin.in_features, lin.bias)
        for layer in range(spec.num_layers)
        for lin in spec.linears
    }
    actual = {
        name: (*module.weight.shape, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert actual == expected
    assert (spec.vocab_size, spec.hidden_size) == (128, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "supported"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -4}, "not a usable size"),
        ({"hidden_size": "64"}, "not a usable size"),
        ({"num_hidden_layers": 10**9}, "not a usable size"),
        ({"num_key_value_heads": 3}, "cannot share"),
    ],
)
def test_absurd_configs_are_refused(change, words):
    with pytest.raises(ModelError, match=words):
        spec_from_config({**TINY, **change})


def test_config_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert read_spec(tmp_path) == read_spec(tmp_path / "config.json") == spec_from_config(TINY)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name in ("bad.json", "list.json", "missing.json"):
        with pytest.raises(ModelError):
            read_spec(tmp_path / name)


def test_rslora_keeps_its_scale_when_the_rank_grows():
    small, large = (
        tiny_layout([{"kind": "rslora", "rank": rank, "alpha": 8}]).rows[0].scaling for rank in (4, 16)
    )
    assert math.isclose(small / large, 2.0)
