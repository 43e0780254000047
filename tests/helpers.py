"""Small models, recipes and data that the tests build for themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.schema import Recipe

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

THREE_BANDS = [
    {"band": "low", "layers": "bottom", "kind": "lora", "rank": 4, "loraplus_lr_ratio": 4},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 6}},
    {"band": "high", "layers": "top", "kind": "dora", "rank": 4},
]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any):
    """A randomly initialised LLaMA with hidden size 64 and 6 layers, unless `changes` say otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {key: value for key, value in {**TINY, **changes}.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**config)).to(dtype).eval()


def make_recipe(**sections: Any) -> Recipe:
    """A valid recipe; sections given here replace the defaults."""
    values = {
        "model": {"path": "tiny", "dtype": "float32"},
        "adapters": THREE_BANDS,
        "data": {"sources": "rows.jsonl"},
        "output_dir": "out",
        **sections,
    }
    return parse_recipe(json.dumps(values), "test")[0]


def tiny_layout(bands: list[dict[str, Any]] | None = None, **changes: Any) -> Layout:
    """The layout of `bands` (three bands by default) on the tiny model."""
    return build_layout(make_recipe(adapters=bands or THREE_BANDS).adapters, spec_from_config({**TINY, **changes}))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def randomize_adapters(model, seed: int = 1, scale: float = 0.05) -> None:
    """Give every trained parameter a random change, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
