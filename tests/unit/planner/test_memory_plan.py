"""The closed form: golden sizes with their arithmetic, and what must hold for every recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from helpers import make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import ModelSpec, spec_from_config
from qhybrid.errors import LayoutError
from qhybrid.planner.holdings import base_weights
from qhybrid.planner.memory import predict
from qhybrid.planner.plan import Budget, make_plan
from qhybrid.planner.workload import checkpointed_layers, how_it_runs
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import Recipe

KINDS = st.sampled_from(["lora", "rslora", "dora", "adalora"])


def spec_of(name: str) -> ModelSpec:
    entry = find_model(name)
    assert entry is not None
    return spec_from_config(entry.config)


def small_spec(layers: int = 4, **changes: Any) -> ModelSpec:
    return spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 32000,
            **changes,
        }
    )


def recipe_of(
    kind: str = "lora",
    rank: int = 8,
    batch: int = 2,
    length: int = 256,
    checkpointed: bool = True,
    **sections: Any,
) -> Recipe:
    training = {
        "per_device_train_batch_size": batch,
        "max_length": length,
        "gradient_checkpointing": checkpointed,
        **sections.pop("training", {}),
    }
    bands = sections.pop("adapters", [{"kind": kind, "rank": rank}])
    model = {"path": "x", **sections.pop("model", {})}
    return resolve(make_recipe(model=model, adapters=bands, training=training, **sections))


def peak(recipe: Recipe, spec: ModelSpec, **others: Any) -> int:
    return predict(recipe, spec, build_layout(recipe, spec), **others).peak


def test_nf4_weights_of_llama_2_7b():
    # QLoRA's 4.127 bits: 1/2 byte, 1/64 byte for the scale, 4/16384 for the scale's scale. The 6,476,005,376
    # weights of the decoder's linears are 3,340,771,328 bytes; the rest are second-level codes, and rounding.
    spec = spec_of("llama-2-7b")
    assert spec.num_linear_parameters == 6_476_005_376
    quantized, plain = base_weights(spec, nf4=True, nested=True, width=2, rounding=512)
    exact = spec.num_linear_parameters * (1 / 2 + 1 / 64 + 4 / 16384)
    assert exact == 3_340_771_328
    assert 0 <= quantized - exact <= 224 * 4 * 1024  # 224 modules
    # Embedding and lm_head 2 x 32000 x 4096 values, 65 norms of 4096, in two bytes; two rotary buffers.
    assert plain == 2 * (2 * 32000 * 4096 + 65 * 4096) + 2 * 512


def test_adamw_states_follow_the_adapters_dtype():
    spec = small_spec()
    narrow, wide = (
        predict(recipe, spec, build_layout(recipe, spec))
        for recipe in (recipe_of(rank=64), recipe_of(rank=64, model={"adapter_dtype": "float32"}))
    )
    assert wide.components["adapters"] == 2 * narrow.components["adapters"]
    steps = 28 * 2 * 512  # one counter for each of 56 tensors
    assert narrow.components["optimizer states"] - steps == 2 * narrow.components["adapters"]
    assert wide.components["optimizer states"] - steps == 2 * wide.components["adapters"]


def test_adalora_is_counted_at_its_initial_rank_with_its_scores():
    spec = small_spec()
    recipe = recipe_of("adalora", adapters=[{"kind": "adalora", "rank": 8, "adalora": {"init_rank": 12}}])
    layout = build_layout(recipe, spec)
    found = predict(recipe, spec, layout)
    values = layout.num_parameters
    assert values == sum(12 * (row.in_features + row.out_features) + 12 for row in layout)
    # Importance and uncertainty in fp32, rounded to 512 bytes each, and a mask for each module.
    assert 0 <= found.components["AdaLoRA scores"] - 8 * values <= len(layout) * 7 * 512


def test_boundaries_of_checkpointed_layers():
    spec = small_spec(layers=6)
    found = predict(recipe_of(batch=1), spec, build_layout(recipe_of(batch=1), spec))
    assert found.moment == "loss, backward"
    assert found.components["checkpoints"] == 6 * 256 * 512 * 2  # layers x tokens x hidden size x two bytes


def test_components_sum_up_to_the_peak():
    spec = small_spec()
    for kind in ("lora", "dora", "adalora"):
        for checkpointed in (True, False):
            recipe = recipe_of(kind, checkpointed=checkpointed)
            found = predict(recipe, spec, build_layout(recipe, spec))
            assert sum(found.components.values()) == found.peak == max(found.moments.values())
            assert sum(found.bands.values()) == found.components["adapters"]


def test_components_of_a_plan_sum_up_to_what_is_needed():
    spec = small_spec()
    for device in ("cuda", "cpu"):
        plan = make_plan(recipe_of(), spec, Budget(None), device=device)
        assert sum(plan.components().values()) == plan.needed


@settings(max_examples=60, deadline=None)
@given(
    kind=KINDS,
    rank=st.integers(4, 40),
    batch=st.integers(1, 6),
    length=st.integers(32, 1500),
    layers=st.integers(1, 8),
    checkpointed=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    more=st.integers(1, 30),
)
def test_more_of_anything_never_lowers_the_prediction(
    kind, rank, batch, length, layers, checkpointed, attention, more
):
    model = {"attn_implementation": attention}
    given_ = {"kind": kind, "rank": rank, "batch": batch, "length": length, "checkpointed": checkpointed}
    base = peak(recipe_of(**given_, model=model), small_spec(layers))
    for changed in ({"rank": rank + more}, {"batch": batch + more}, {"length": length + more}):
        assert peak(recipe_of(**{**given_, **changed}, model=model), small_spec(layers)) >= base, changed
    assert peak(recipe_of(**given_, model=model), small_spec(layers + more)) >= base


@settings(max_examples=30, deadline=None)
@given(kind=KINDS, length=st.integers(64, 2000), layers=st.integers(2, 8), chosen=st.integers(1, 7))
def test_checkpointing_a_layer_more_never_costs_more_than_its_recomputation(kind, length, layers, chosen):
    """Between keeping all and recomputing all, memory falls layer by layer."""
    spec = small_spec(layers)
    chosen = min(chosen, layers - 1)
    few = peak(recipe_of(kind, length=length, memory={"checkpoint_layers": f"0-{chosen - 1}"}), spec)
    more = peak(recipe_of(kind, length=length, memory={"checkpoint_layers": f"0-{chosen}"}), spec)
    working = peak(recipe_of(kind, length=length), small_spec(1)) - peak(recipe_of(kind, length=1), small_spec(1))
    assert more <= few + working


def test_which_layers_are_checkpointed():
    bands = [{"band": "low", "layers": "0-1"}, {"band": "high", "layers": "2-3"}]
    one = recipe_of(adapters=bands, memory={"checkpoint_layers": "high"})
    assert checkpointed_layers(one, 4) == {2, 3}
    assert checkpointed_layers(recipe_of(adapters=bands, memory={"checkpoint_layers": "high+0"}), 4) == {0, 2, 3}
    assert checkpointed_layers(recipe_of(), 3) == {0, 1, 2}
    assert checkpointed_layers(recipe_of(checkpointed=False), 3) == frozenset()
    every_other = recipe_of(training={"gradient_checkpointing_kwargs": {"every_n_layers": 2}})
    assert checkpointed_layers(every_other, 5) == {0, 2, 4}
    newer_name = recipe_of(checkpointed=False, training={"activation_checkpointing": True})
    assert checkpointed_layers(newer_name, 2) == {0, 1}
    with pytest.raises(LayoutError, match="checkpoint_layers"):
        checkpointed_layers(recipe_of(memory={"checkpoint_layers": "7"}), 4)


def test_when_an_attention_mask_is_built():
    spec = small_spec()

    def masked(**training: Any) -> bool:
        return how_it_runs(recipe_of(training=training), spec, "cuda").masked

    assert masked()  # two rows: one is padded
    assert not masked(per_device_train_batch_size=1)
    assert masked(per_device_train_batch_size=2, packing=True)  # rows of one pack must not see each other
    flash = recipe_of(model={"attn_implementation": "flash_attention_2"})
    assert not how_it_runs(flash, spec, "cuda").masked
    windowed = small_spec(model_type="mistral", sliding_window=128)
    assert how_it_runs(recipe_of(batch=1), windowed, "cuda").masked
    assert not how_it_runs(recipe_of(batch=1, length=127), windowed, "cuda").masked


def test_a_longer_evaluation_batch_is_seen():
    spec = small_spec()
    training = {"eval_strategy": "epoch", "per_device_eval_batch_size": 64}
    recipe = recipe_of(batch=1, training=training, data={"sources": "r.jsonl", "eval_sources": "e.jsonl"})
    found = predict(recipe, spec, build_layout(recipe, spec))
    assert found.moment == "evaluation"
    assert found.peak > peak(recipe_of(batch=1), spec)


def test_paged_states_are_not_in_the_allocator():
    spec = small_spec()
    bands = [{"rank": 256, "target_modules": ["gate_proj", "up_proj", "down_proj"]}]
    recipe = recipe_of(adapters=bands, training={"optim": "paged_adamw_8bit"})
    layout = build_layout(recipe, spec)
    found = predict(recipe, spec, layout)
    # Two 8-bit states for each value of the tensors from 100,000 values on: all of them here.
    assert found.unified == 2 * layout.num_parameters
    assert found.components["optimizer states"] < layout.num_parameters // 8  # the scales alone
    assert predict(recipe, spec, layout, device="cpu").unified == 0  # bitsandbytes does not page there


def test_what_is_assumed_is_said():
    spec = small_spec(max_position_embeddings=2048)
    recipe = recipe_of(training={"max_length": None, "optim": "grokadamw", "torch_compile": True})
    said = " ".join(predict(recipe, spec, build_layout(recipe, spec)).assumptions)
    assert "2048 tokens" in said and "grokadamw" in said and "torch.compile" in said


def test_host_memory_on_a_cpu_holds_the_tensors():
    plan = make_plan(recipe_of(), small_spec(), Budget(None), device="cpu", process_bytes=10**9)
    assert plan.host == plan.needed > 10**9 + plan.prediction.peak - 1
    assert dataclasses.replace(plan, device="cuda").needed == plan.reserved + plan.budget.context
