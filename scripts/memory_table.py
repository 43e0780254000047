"""The closed form of the memory plan against the simulated step, over 65 recipes from 135M to 70B parameters.

    python scripts/memory_table.py                 # about 15 minutes on two cores; writes docs/data/memory_table.*
    python scripts/memory_table.py --only smollm2  # shapes or settings whose name has this in it; writes nothing

No weights, no GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import spec_from_config
from qhybrid.cli.main import quiet_libraries
from qhybrid.planner.memory import predict
from qhybrid.planner.workload import how_it_runs
from qhybrid.recipe.load import parse_recipe, resolve
from qhybrid.recipe.schema import Recipe

SHAPES = ("smollm2-135m", "tinyllama-1.1b", "llama-3.2-3b", "llama-3.1-8b", "llama-2-70b")
OUTPUT = Path(__file__).parent.parent / "docs" / "data"

THREE_BANDS = [
    {"band": "bottom", "layers": "bottom", "rank": 8, "loraplus_lr_ratio": 4},
    {"band": "middle", "layers": "middle", "kind": "adalora", "rank": 16},
    {"band": "top", "layers": "top", "kind": "dora", "rank": 16},
]
CHECKPOINTED = {"gradient_checkpointing": True}
KEPT = {"gradient_checkpointing": False}

# name: (bands, training, other sections)
SETTINGS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "lora r16, 1x2048, checkpointed": ([{"rank": 16}], {"max_length": 2048, **CHECKPOINTED}, {}),
    "lora r16, 1x1024, kept": ([{"rank": 16}], {"max_length": 1024, **KEPT}, {}),
    "three bands, 4x512 padded, checkpointed": (
        THREE_BANDS,
        {"max_length": 512, "per_device_train_batch_size": 4, **CHECKPOINTED},
        {},
    ),
    "three bands, 2x512 padded, kept": (
        THREE_BANDS,
        {"max_length": 512, "per_device_train_batch_size": 2, **KEPT},
        {},
    ),
    "dora r32, 1x2048, half of the layers checkpointed": (
        [{"rank": 32, "kind": "dora"}],
        {"max_length": 2048, **CHECKPOINTED},
        {"memory": {"checkpoint_layers": "0%-50%"}},
    ),
    "adalora r64, 1x1024, adamw 8-bit, checkpointed": (
        [{"rank": 64, "kind": "adalora"}],
        {"max_length": 1024, "optim": "adamw_bnb_8bit", **CHECKPOINTED},
        {},
    ),
    "rslora r128, 1x512, paged adamw 8-bit, checkpointed": (
        [{"rank": 128, "kind": "rslora"}],
        {"max_length": 512, "optim": "paged_adamw_8bit", "gradient_accumulation_steps": 4, **CHECKPOINTED},
        {},
    ),
    "lora r16 dropout, 2x1024 packed, flash, checkpointed": (
        [{"rank": 16, "dropout": 0.1}],
        {"max_length": 1024, "per_device_train_batch_size": 2, "packing": True, **CHECKPOINTED},
        {"model": {"attn_implementation": "flash_attention_2"}},
    ),
    "lora r16 on q and v, 1x4096, foreach adamw, checkpointed": (
        [{"rank": 16, "target_modules": ["q_proj", "v_proj"]}],
        {"max_length": 4096, "optim": "adamw_torch", **CHECKPOINTED},
        {},
    ),
    "lora r64 in fp32, 1x1024, kept": (
        [{"rank": 64}],
        {"max_length": 1024, **KEPT},
        {"model": {"adapter_dtype": "float32"}},
    ),
    "lora r16, 1x1024, eager attention, checkpointed": (
        [{"rank": 16}],
        {"max_length": 1024, **CHECKPOINTED},
        {"model": {"attn_implementation": "eager"}},
    ),
    "lora r16, 1x1024, label smoothing, checkpointed": (
        [{"rank": 16}],
        {"max_length": 1024, "label_smoothing_factor": 0.1, **CHECKPOINTED},
        {},
    ),
    "lora r16 in the top third, 1x2048, kept": (
        [{"rank": 16, "layers": "top"}],
        {"max_length": 2048, **KEPT},
        {},
    ),
}


@dataclass(frozen=True)
class Line:
    """One recipe: bytes of the closed form and of the simulation, and the seconds that each took."""

    shape: str
    setting: str
    closed: int
    simulated: int
    reserved: int  # what torch's allocator takes for the simulated step, by a replay
    moment: str
    closed_seconds: float
    simulated_seconds: float

    @property
    def ratio(self) -> float:
        return self.closed / self.simulated


def cases() -> Iterator[tuple[str, str, Recipe]]:
    """Every shape with every setting: (shape, setting, recipe)."""
    for shape in SHAPES:
        for name, (bands, training, others) in SETTINGS.items():
            values = {
                "model": {"path": shape, **others.get("model", {})},
                "adapters": bands,
                "data": {"sources": "rows.jsonl"},
                "training": {"per_device_train_batch_size": 1, **training},
                "output_dir": "run",
                **{key: value for key, value in others.items() if key != "model"},
            }
            yield shape, name, resolve(parse_recipe(json.dumps(values), name)[0])


def compare(shape: str, name: str, recipe: Recipe) -> Line:
    """Both predictions of one recipe."""
    from qhybrid.simulation.step import simulate

    entry = find_model(shape)
    assert entry is not None
    spec = spec_from_config(entry.config)
    began = time.perf_counter()
    layout = build_layout(recipe, spec)
    closed = predict(recipe, spec, layout)
    between = time.perf_counter()
    padded = how_it_runs(recipe, spec, "cuda").masked
    simulated = simulate(recipe, entry.config, padded=padded)
    end = time.perf_counter()
    return Line(
        shape, name, closed.peak, simulated.peak_bytes, simulated.reserved_bytes, closed.moment,
        round(between - began, 4), round(end - between, 2),
    )  # fmt: skip


def to_text(lines: list[Line]) -> str:
    """The table and its summary, as markdown."""
    rows = ["| model | recipe | closed form | simulated | ratio | peak in |", "|---|---|---|---|---|---|"]
    for line in lines:
        rows.append(
            f"| {line.shape} | {line.setting} | {line.closed / 2**30:.3f} GiB | {line.simulated / 2**30:.3f} GiB "
            f"| {line.ratio:.4f} | {line.moment} |"
        )
    within = sum(abs(line.ratio - 1) <= 0.03 for line in lines)
    lowest, highest = min(line.ratio for line in lines), max(line.ratio for line in lines)
    closed = sorted(line.closed_seconds for line in lines)[len(lines) // 2]
    simulated = sorted(line.simulated_seconds for line in lines)[len(lines) // 2]
    rows += [
        "",
        f"{len(lines)} recipes: {within} within 3%; ratios from {lowest:.4f} to {highest:.4f}. "
        f"Median time: closed form {closed * 1000:.0f} ms, simulation {simulated:.0f} s.",
        "",
        f"{platform.machine()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"peft {version('peft')}, trl {version('trl')}, bitsandbytes {version('bitsandbytes')}.",
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes or settings whose name has this in it")
    only = parser.parse_args().only
    quiet_libraries()
    lines = []
    for shape, name, recipe in cases():
        if only and only not in shape and only not in name:
            continue
        line = compare(shape, name, recipe)
        lines.append(line)
        waste = line.reserved / line.simulated
        print(
            f"{line.ratio:.4f}  reserved {waste:.3f}  {shape}  {name}  ({line.simulated_seconds:.0f} s)",
            flush=True,
        )
    text = to_text(lines)
    print(text)
    if not only:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "memory_table.md").write_text(text, encoding="utf-8")
        (OUTPUT / "memory_table.json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
