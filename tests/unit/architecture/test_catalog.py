"""The catalog of model facts: counts follow from the shapes, and a name is found or refused, never guessed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qhybrid.architecture import catalog
from qhybrid.architecture.catalog import catalog_names, find_model, nearest_names
from qhybrid.architecture.spec import spec_from_config


def entry_of(name: str) -> catalog.CatalogEntry:
    entry = find_model(name)
    assert entry is not None
    return entry


def count_parameters(config: dict[str, Any]) -> int:
    """From the architecture alone, without ModelSpec: embeddings, linears with their biases, RMSNorms."""
    hidden, ffn, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * ffn
    layer += 2 * hidden  # input_layernorm and post_attention_layernorm
    layer += q + 2 * kv if family == "qwen2" else 0  # the biases of q, k and v
    layer += 2 * head_dim if family == "qwen3" else 0  # q_norm and k_norm
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return embeddings + config["num_hidden_layers"] * layer + hidden


@pytest.mark.parametrize("name", catalog_names())
def test_the_count_follows_from_the_config(name):
    entry = entry_of(name)
    assert count_parameters(entry.config) == entry.num_parameters


@pytest.mark.parametrize("name", catalog_names())
def test_every_entry_is_a_model_spec(name):
    entry = entry_of(name)
    spec = spec_from_config(entry.config, name)
    linears = spec.num_linear_parameters + spec.num_layers * sum(
        lin.out_features for lin in spec.linears if lin.bias
    )
    rest = entry.num_parameters - linears
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    norms = spec.hidden_size * (2 * spec.num_layers + 1)
    norms += 2 * spec.head_dim * spec.num_layers if spec.model_type == "qwen3" else 0
    assert rest == embeddings + norms


@pytest.mark.parametrize("name", catalog_names())
def test_what_a_config_must_say(name):
    config = entry_of(name).config
    assert config["hidden_act"] == "silu"
    assert config["max_position_embeddings"] >= 2048
    assert config["rms_norm_eps"] in (1e-5, 1e-6)
    assert config["rope_theta"] >= 10000
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert 0 <= config.get(token, 0) < config["vocab_size"]


def test_names_and_hub_ids_are_unique():
    raw = json.loads(catalog._FILE.read_text(encoding="utf-8"))
    assert tuple(raw) == catalog_names()
    ids = [hub_id.casefold() for name in catalog_names() for hub_id in entry_of(name).hub_ids]
    assert len(ids) == len(set(ids))
    assert all(hub_id.count("/") == 1 for hub_id in ids)


def test_no_name_stands_for_two_models():
    """A name that two entries would claim must be given by neither."""
    claims: dict[str, set[str]] = {}
    for name in catalog_names():
        entry = entry_of(name)
        for hub_id in entry.hub_ids:
            organisation, model = hub_id.split("/")
            if organisation == entry.hub_id.split("/")[0]:
                claims.setdefault(catalog._canonical(model), set()).add(name)
        claims.setdefault(catalog._canonical(name), set()).add(name)
    assert {name: models for name, models in claims.items() if len(models) > 1} == {}


@pytest.mark.parametrize("name", catalog_names())
def test_short_names_and_all_hub_ids_are_found(name):
    entry = entry_of(name)
    assert entry.name == name
    assert entry.hub_ids[0] == entry.hub_id
    for hub_id in entry.hub_ids:
        for written in (hub_id, hub_id.lower(), hub_id.upper(), f"{hub_id}@main", f" {hub_id}@0123abc "):
            assert entry_of(written).name == name
    for written in (
        name.upper(),
        f"{name}@main",
        name.replace("-", "_"),
        name.replace(".", "_"),
        name.replace("-", " "),
    ):
        assert entry_of(written).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("llama2_7b", "llama-2-7b"),
        ("Llama2-7B", "llama-2-7b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("llama-2-7b-chat", "llama-2-7b"),
        ("Llama-2-13b-chat-hf@main", "llama-2-13b"),
        ("Meta-Llama-3-8B", "llama-3-8b"),
        ("llama-3-8b-instruct", "llama-3-8b"),
        ("llama3_1_8b", "llama-3.1-8b"),
        ("Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("qwen2.5-7b-instruct", "qwen2.5-7b"),
        ("Qwen2_5-0_5B-Instruct", "qwen2.5-0.5b"),
        ("Qwen3-8B-Base", "qwen3-8b"),
        ("mistral_7b_instruct_v0.3", "mistral-7b-v0.3"),
        ("TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("SmolLM2-135M-Instruct", "smollm2-135m"),
        ("Phi-3-mini-4k-instruct", "phi-3-mini-4k"),
    ],
)
def test_forgiving_spellings(written, name):
    assert entry_of(written).name == name


@pytest.mark.parametrize(
    "written",
    [
        "",
        "@main",
        "/",
        "llama",
        "llama-7b",
        "llama-2",
        "mistral-7b",  # v0.1 or v0.3: they differ in vocabulary
        "mistral-7b-instruct",
        "mistralai/Mistral-7B-Instruct-v0.2",
        "llama-3-18b",  # runs of digits are not torn apart
        "llama-3-1.8b",
        "llama31-8b",
        "qwen25-7b",
        "qwen3.1-7b",
        "qwen3-17b",
        "Qwen3-4B-Instruct-2507",
        "Qwen/Qwen2.5-Coder-7B",
        "qwen2.5-7b-instruct-1m",
        "TinyLlama/TinyLlama-1.1B-Chat-v0.4",  # three more tokens
        "unsloth/Phi-3-mini-4k-instruct",
        "somebody/Llama-2-7b-hf",  # a mirror that nobody checked
        "models/llama-2-7b",
        "./Llama-2-7b-hf",
        "llama-2-7b-hf-gguf",
        "llama-2-7b\\",
    ],
)
def test_what_is_not_certain_is_not_found(written):
    assert find_model(written) is None


def test_nearest_names_for_the_hint():
    assert set(nearest_names("mistral-7b")) == {"mistral-7b-v0.1", "mistral-7b-v0.3"}
    assert nearest_names("lama-2-7b")[0] == "llama-2-7b"
    assert nearest_names("Qwen/Qwen2.5-7B-Instruc")[0] == "qwen2.5-7b"
    assert nearest_names("somebody/Llama-2-7b-hf@main")[0] == "llama-2-7b"
    assert nearest_names("zzz") == []
    assert len(nearest_names("qwen2.5")) <= 3


def test_a_changed_config_does_not_change_the_catalog():
    config = entry_of("llama-3.1-8b").config
    config["rope_scaling"]["factor"] = 99.0
    del config["vocab_size"]
    assert entry_of("llama-3.1-8b").config["rope_scaling"]["factor"] == 8.0
    assert hash(entry_of("llama-3.1-8b")) == hash(entry_of("llama-3.1-8b"))
