"""The recipes that gpu_memory.py measures, each written as one line of words. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qhybrid.architecture.catalog import find_model
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import Recipe

# A line is: model, adapters, batch x length, then what differs from sdpa without padding, every layer
# checkpointed, adamw_torch_fused and trl's chunked loss.
CUDA_CASES = """
smollm2-135m, lora, 8x512, kept
smollm2-135m, lora, 8x512
smollm2-135m, rslora, 8x512, kept, padded
smollm2-135m, dora, 4x1024, kept, adamw_torch
smollm2-135m, adalora, 4x1024, kept
smollm2-135m, three bands, 8x512, kept, eager
smollm2-135m, three bands, 4x2048, adamw_bnb_8bit
smollm2-135m, lora, 4x1024, kept, smoothed
smollm2-135m, lora, 8x512, kept, fp32 adapters
tinyllama-1.1b, lora, 4x1024, kept
tinyllama-1.1b, rslora, 4x1024, padded, adamw_torch
tinyllama-1.1b, dora, 2x2048
tinyllama-1.1b, adalora, 4x1024, adamw_bnb_8bit
tinyllama-1.1b, three bands, 2x2048, kept, paged_adamw_8bit
tinyllama-1.1b, lora, 2x2048, half, eager
tinyllama-1.1b, lora, 2x1024, smoothed, accumulating
tinyllama-1.1b, lora, 4x1024, kept, liger
llama-3.2-1b, lora, 2x1024, kept
llama-3.2-1b, lora, 4x2048
llama-3.2-1b, dora, 2x1024, half, padded
llama-3.2-1b, adalora, 1x4096, adamw_torch
llama-3.2-1b, three bands, 2x2048, paged_adamw_8bit
llama-3.2-1b, lora, 1x1024, smoothed
llama-3.1-8b, lora, 1x2048
llama-3.1-8b, lora, 1x8192, paged_adamw_8bit
llama-3.1-8b, dora, 1x1024, kept
llama-3.1-8b, three bands, 2x1024, half, padded
llama-3.1-8b, lora on q and v, 1x2048, kept, adamw_bnb_8bit
llama-3.1-8b, lora, 8x2048, kept
llama-2-7b, lora, 1x2048
llama-2-7b, lora, 1x2048, kept
llama-2-7b, three bands, 4x1024
llama-2-7b, adalora, 1x1024, kept, adamw_torch
llama-2-7b, dora, 2x1024, eager, padded
llama-2-7b, rslora, 4x1024, half, adamw_bnb_8bit
qwen2.5-7b, lora, 1x2048
qwen2.5-7b, three bands, 1x4096, paged_adamw_8bit
qwen2.5-7b, dora, 2x1024, padded
qwen2.5-7b, lora, 1x1024, smoothed
"""
CUDA_EDGES = ("smollm2-135m, lora, 8x512, kept", "tinyllama-1.1b, dora, 2x2048", "llama-2-7b, lora, 1x2048")

CPU_CASES = """
tiny, three bands, 2x96, padded
tiny, lora, 2x96, kept, eager
tiny, adalora, 1x128, half, smoothed
"""
CPU_EDGES = ("tiny, lora, 2x96, kept, eager",)

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": 16}],
    "lora on q and v": [{"rank": 16, "target_modules": ["q_proj", "v_proj"]}],
    "rslora": [{"kind": "rslora", "rank": 64}],
    "dora": [{"kind": "dora", "rank": 16}],
    "adalora": [{"kind": "adalora", "rank": 16}],
    "three bands": [
        {"band": "bottom", "layers": "bottom", "rank": 8, "loraplus_lr_ratio": 4.0},
        {"band": "middle", "layers": "middle", "kind": "adalora", "rank": 16},
        {"band": "top", "layers": "top", "kind": "dora", "rank": 16},
    ],
}
_OPTIMIZERS = ("adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit")
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # by word: section, values
    "kept": {"training": {"gradient_checkpointing": False}},
    "half": {"memory": {"checkpoint_layers": "0%-50%"}},
    "eager": {"model": {"attn_implementation": "eager"}},
    "fp32 adapters": {"model": {"adapter_dtype": "float32"}},
    "smoothed": {"training": {"label_smoothing_factor": 0.1}},
    "accumulating": {"training": {"gradient_accumulation_steps": 2}},
    "liger": {"training": {"use_liger_kernel": True}},
    "padded": {},  # a matter of the rows
    **{name: {"training": {"optim": name}} for name in _OPTIMIZERS},
}
TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A recipe, the model's config.json, and whether its batches have padding."""

    name: str
    config: dict[str, Any]
    recipe: Recipe
    padded: bool


def case_names(device: str) -> list[str]:
    """The lines for a CUDA device, or those of the dry run on a CPU."""
    return (CUDA_CASES if device == "cuda" else CPU_CASES).strip().splitlines()


def edge_names(device: str) -> tuple[str, ...]:
    """The recipes whose out-of-memory edge is looked for."""
    return CUDA_EDGES if device == "cuda" else CPU_EDGES


def read_case(name: str, device: str) -> Case:
    """The case that the line `name` describes."""
    model, adapters, size, *words = name.split(", ")
    batch, length = map(int, size.split("x"))
    entry = find_model(model)
    assert entry is not None or model == "tiny", model
    values: dict[str, dict[str, Any]] = {
        "model": {"path": model},
        "training": {
            "per_device_train_batch_size": batch,
            "max_length": length,
            "gradient_checkpointing": True,
            "optim": "adamw_torch_fused",
            "use_cpu": device == "cpu",
        },
        "memory": {},
    }
    for word in words:
        for section, settings in SETTINGS[word].items():
            values[section] |= settings
    others = {"adapters": ADAPTERS[adapters], "data": {"sources": "unused.jsonl"}, "output_dir": "unused"}
    recipe = resolve(Recipe.model_validate({**values, **others}))
    return Case(name, entry.config if entry else TINY, recipe, "padded" in words)
