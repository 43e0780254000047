"""What peft saved, read as plain factors, held against peft's own arithmetic; and refusals."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.peft_folder import CONFIG, WEIGHTS, write_peft_folder
from qhybrid.adapters.peft_patterns import selects
from qhybrid.errors import AdapterError

KINDS = {
    "lora": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6, r"layers\.[01]\.mlp\.gate_proj": 5},
        "alpha_pattern": {"up_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "rslora patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}
    },
}  # fmt: skip


def saved_by_peft(folder, **settings):
    """A peft model on a tiny LLaMA whose B are not zero, and the folder that peft made of it."""
    config = LoraConfig(target_modules=["q_proj", "up_proj", "gate_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model(num_hidden_layers=2), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_of_every_module_is_pefts_own(kind, tmp_path):
    model = saved_by_peft(tmp_path / "a", **KINDS[kind])
    adapter = read_plain(tmp_path / "a")
    assert len(adapter.modules) == 6 and adapter.base_minus is None
    for module in adapter:
        layer = model.get_base_model().get_submodule(module.module)
        assert module.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        # Both are fp32 products of the same numbers.
        expected = layer.get_delta_weight("default")
        assert torch.allclose(module.delta(), expected, rtol=1e-6, atol=1e-6), module.module
        if kind == "dora":
            assert torch.equal(module.magnitude, layer.lora_magnitude_vector["default"].weight)
        else:
            assert module.magnitude is None


def test_ranks_and_alphas_of_patterns_are_met(tmp_path):
    saved_by_peft(tmp_path / "a", **KINDS["patterns"])
    found = {module.module: (module.rank, module.scaling) for module in read_plain(tmp_path / "a")}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 7 / 2)
    assert found["model.layers.1.self_attn.q_proj"] == (2, 8 / 2)
    assert found["model.layers.1.mlp.up_proj"] == (6, 3 / 6)
    assert found["model.layers.0.mlp.gate_proj"] == (5, 8 / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_can_be_written_and_read_again(kind, tmp_path):
    saved_by_peft(tmp_path / "a", **KINDS[kind])
    adapter = read_plain(tmp_path / "a")
    write_peft_folder(adapter.modules, "base", tmp_path / "b")
    again = {module.module: module for module in read_plain(tmp_path / "b")}
    for module in adapter:
        other = again[module.module]
        assert torch.equal(module.a, other.a) and torch.equal(module.b, other.b)
        assert module.scaling == pytest.approx(other.scaling, rel=1e-12)
        assert (module.magnitude is None) == (other.magnitude is None)


def test_pissa_says_that_its_base_is_not_the_model(tmp_path):
    model = saved_by_peft(tmp_path / "a", r=4, lora_alpha=4, init_lora_weights="pissa")
    adapter = read_plain(tmp_path / "a")
    assert adapter.base_minus == "pissa"
    for module in adapter:
        expected = model.get_base_model().get_submodule(module.module).get_delta_weight("default")
        assert torch.allclose(module.delta(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves(dtype, tmp_path):
    saved_by_peft(tmp_path / "a", r=2)
    file = tmp_path / "a" / WEIGHTS
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    adapter = read_plain(tmp_path / "a")
    assert all(module.a.dtype == module.b.dtype == dtype for module in adapter)
    assert adapter.info.adapter_dtype == ("bfloat16" if dtype == torch.bfloat16 else "float32")


CONFIG_FAULTS = [
    ({"peft_type": "LOHA"}, "its method is LOHA"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"bias": "all"}, "bias 'all'"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "olora"}, "initialised by olora, which changes the base model"),
    ({"init_lora_weights": "loftq"}, "initialised by loftq"),
    ({"r": 0}, "its r is 0"),
    ({"r": True}, "its r is True"),
    ({"lora_alpha": float("nan")}, "its lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, "its lora_alpha is inf"),
    ({"lora_alpha": 10**400}, "its lora_alpha is 1000"),
    ({"lora_alpha": 1.1e6}, "at most 1,000,000"),
    ({"rank_pattern": {"q_proj": 10**400}}, "rank_pattern of 'q_proj' is 1000"),
    ({"lora_alpha": "8"}, "its lora_alpha is '8'"),
    ({"rank_pattern": [1]}, "rank_pattern is no mapping"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern has '('"),
    ({"rank_pattern": {"([a-z0-9_.]+)+!": 2}}, "rank_pattern has '([a-z0-9_.]+)+!', which is not read here"),
    ({"rank_pattern": {"(?=q)q_proj": 2}}, "which is not read here"),
    ({"rank_pattern": {r"(q)_proj\1": 2}}, "which is not read here"),
    ({"alpha_pattern": {"(a|b)*q_proj": 2}}, "which is not read here"),
    ({"alpha_pattern": {"q" * 501: 2}}, "alpha_pattern has a key of 501 characters"),
    ({"alpha_pattern": {f"q{i}": 2 for i in range(4097)}}, "more than 4096 keys"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is None"),
    ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern of 'q_proj' is '4'"),
    ({"r": 3}, "has rank 2, its configuration says 3"),
    ({"use_dora": True}, "magnitudes of model.layers"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
    ({"revision": {}}, "revision is {}"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    saved_by_peft(folder, r=2, lora_alpha=4)
    return (folder / CONFIG).read_text(), load_file(folder / WEIGHTS)


def refusal(folder, config, tensors):
    """The message with which such a folder is refused."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        read_plain(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"), CONFIG_FAULTS, ids=[f"{change!s:.60}" for change, _ in CONFIG_FAULTS]
)
def test_configurations_that_cannot_be_read_are_refused_by_what_is_wrong(change, message, sound, tmp_path):
    config, tensors = sound
    assert message in refusal(tmp_path / "a", json.dumps({**json.loads(config), **change}), tensors)


_ONE = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[a-b1]"])
_ATOM = st.builds(str.__add__, _ONE, st.sampled_from(["", "", "", "?", "*", "+", "+?", "{2}", "{1,2}", "{2,}"]))
_KEY = st.recursive(
    st.lists(_ATOM | st.sampled_from(["^", "$"]), max_size=5).map("".join),
    lambda inner: st.one_of(
        st.builds("({}|{}){}".format, inner, inner, st.sampled_from(["", "?"])),
        st.builds("(?:{}){}".format, inner, inner),
        st.builds("{}|{}".format, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_KEY, st.lists(st.text("ab1.", min_size=1, max_size=8), min_size=1, max_size=8))
def test_keys_select_what_pefts_do(key, names):
    for name in names:
        assert selects(key, name) == bool(re.match(rf"(.*\.)?({key})$", name)), (key, name)


@pytest.mark.parametrize(
    "key",
    ["q_proj", "layers.1.self_attn.q_proj", "1.self_attn.q_proj", "elf_attn.q_proj", r"layers\.\d+\.mlp\..*_proj",
     r"model\.layers\.(0|1|12)\.self_attn\.(q|k)_proj", r"^model.*[kq]_proj", r".*\.1[0-9]?\..*",
     "up_proj|q_proj$"],
)  # fmt: skip
def test_keys_as_people_write_them_select_what_pefts_do(key):
    names = [
        f"model.layers.{layer}.{part}_proj"
        for layer in (0, 1, 2, 11, 12, 21)
        for part in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.gate")
    ]
    assert [selects(key, name) for name in names] == [get_pattern_key([key], name) == key for name in names]
    assert any(selects(key, name) for name in names) == (key != "elf_attn.q_proj")


def test_no_key_that_is_read_takes_long(sound, tmp_path):
    config, tensors = sound
    keys = {".*" * 100 + "!": 3, "(a|a)" * 90 + "!": 3, r"(\w?)?" * 80 + "!": 3, "q_proj|up_proj|gate_proj": 2}
    (tmp_path / CONFIG).write_text(json.dumps({**json.loads(config), "rank_pattern": keys}))
    save_file(tensors, tmp_path / WEIGHTS)
    started = time.perf_counter()
    assert {module.rank for module in read_plain(tmp_path)} == {2}
    assert time.perf_counter() - started < 5  # backtracking would need longer than the universe is old


@pytest.mark.parametrize("text", ["", "[1]", "{}", "{" * 100_000, '{"peft_type": '])
def test_what_is_no_configuration_is_refused(text, sound, tmp_path):
    assert CONFIG in refusal(tmp_path / "a", text, sound[1])


def test_tensors_that_do_not_fit_are_refused_by_name(sound, tmp_path):
    config, tensors = sound
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    nan = tensors[a].clone()
    nan[1, 3] = float("nan")
    for change, message in (
        ({b: None}, "model.layers.0.self_attn.q_proj has A alone"),
        ({a: None}, "has B alone"),
        ({a: torch.ones(2)}, "A and B of model.layers.0.self_attn.q_proj"),
        ({a: torch.ones(2, 0)}, "A and B of model.layers.0.self_attn.q_proj"),
        ({a: torch.ones(3, 64)}, "A and B of model.layers.0.self_attn.q_proj"),
        ({embedding: torch.ones(2, 4)}, "embed_tokens"),
        ({a: nan}, "A of model.layers.0.self_attn.q_proj holds values that are not finite"),
        ({a: torch.ones(2, 64, dtype=torch.int8)}, "stored as int8"),
        ({a: torch.ones(2, 64).to(torch.float8_e4m3fn)}, "stored as float8_e4m3fn"),
        (dict.fromkeys(tensors), "holds no adapter"),
    ):
        changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        assert message in refusal(tmp_path / "a", config, changed), message


def test_files_that_are_missing_or_damaged_are_refused(sound, tmp_path):
    config, tensors = sound
    (tmp_path / CONFIG).write_text(config)
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        read_plain(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError, match="can run code when opened"):
        read_plain(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-20])
    with pytest.raises(AdapterError, match=r"not a whole \.safetensors file"):
        read_plain(tmp_path)
    with pytest.raises(AdapterError, match="there is no folder"):
        read_plain(tmp_path / "nothing")
