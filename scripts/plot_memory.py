"""Draws what Llama-2-7B takes of a 24 GB card, by component, for a few recipes: docs/images/memory.png.

python scripts/plot_memory.py [OUTPUT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import spec_from_config
from qhybrid.planner.hardware import find_gpu
from qhybrid.planner.plan import Budget, Plan, make_plan
from qhybrid.recipe.load import load_recipe, parse_recipe, resolve
from qhybrid.recipe.schema import Recipe

OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "memory.png"
CARD = find_gpu("RTX 4090")

GROUPS = {
    "base weights (NF4)": ("base weights",),
    "unquantised weights": ("unquantised weights",),
    "adapters and their states": ("adapters", "gradients", "optimizer states", "AdaLoRA scores", "DoRA norms"),
    "activations and checkpoints": ("activations", "checkpoints", "inputs"),
    "working memory, loss, dequantised weights": ("working memory", "loss", "dequantised"),
    "CUDA, cuBLAS, allocator": ("cuBLAS", "allocator", "CUDA"),
}
COLOURS = ("#33658a", "#86bbd8", "#9d4edd", "#2a9d8f", "#f4a261", "#adb5bd")


def recipe_of(bands: list[dict[str, Any]], **training: Any) -> Recipe:
    values = {
        "model": {"path": "llama-2-7b"},
        "adapters": bands,
        "data": {"sources": "rows.jsonl"},
        "training": training,
        "output_dir": "run",
    }
    return resolve(parse_recipe(json.dumps(values), "plot")[0])


def recipes() -> dict[str, Recipe]:
    """What is drawn, from top to bottom."""
    shipped = resolve(load_recipe("llama2_7b_instruct").recipe)
    one = {"per_device_train_batch_size": 1, "max_length": 2048}
    return {
        "the shipped recipe: three bands,\n4 x 1,024 tokens, checkpointed": shipped,
        "LoRA r16, 1 x 2,048,\ncheckpointed": recipe_of([{"rank": 16}], **one),
        "LoRA r16, 1 x 2,048,\nnothing checkpointed": recipe_of(
            [{"rank": 16}], gradient_checkpointing=False, **one
        ),
        "LoRA r256, 1 x 2,048,\ncheckpointed": recipe_of([{"rank": 256}], **one),
        "LoRA r16, 4 x 2,048, eager attention,\ncheckpointed": recipe_of(
            [{"rank": 16}], per_device_train_batch_size=4, max_length=2048
        ).model_copy(update={"model": shipped.model.model_copy(update={"attn_implementation": "eager"})}),
    }


def grouped(plan: Plan) -> list[float]:
    """GiB of each group."""
    sizes = [0.0] * len(GROUPS)
    for name, size in plan.components().items():
        for index, starts in enumerate(GROUPS.values()):
            if name.startswith(starts):
                sizes[index] += size / 2**30
                break
        else:
            raise AssertionError(f"{name} belongs to no group")
    return sizes


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    entry = find_model("llama-2-7b")
    assert entry is not None
    spec = spec_from_config(entry.config)
    plans = {name: make_plan(recipe, spec, Budget(CARD.memory_bytes, CARD)) for name, recipe in recipes().items()}
    figure, axes = plt.subplots(figsize=(10, 4.6))
    names = list(plans)
    lefts = [0.0] * len(names)
    for index, (group, colour) in enumerate(zip(GROUPS, COLOURS, strict=True)):
        widths = [grouped(plan)[index] for plan in plans.values()]
        axes.barh(names, widths, left=lefts, color=colour, label=group, height=0.62)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for row, (plan, left) in enumerate(zip(plans.values(), lefts, strict=True)):
        axes.text(left + 0.2, row, f"{plan.needed / 2**30:.1f} GiB", va="center", fontsize=9)
    limit = CARD.memory_bytes / 2**30
    axes.axvline(limit, color="#d62828", linewidth=1.5)
    axes.text(limit - 0.15, -0.72, f"{CARD.name}: {limit:.1f} GiB", color="#d62828", ha="right", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(*lefts, limit) * 1.08)
    axes.set_xlabel("GiB needed, as planned")
    axes.set_title("Llama-2-7B in NF4: what a training step takes", loc="left", fontsize=11, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=3, frameon=False, fontsize=8.5)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
