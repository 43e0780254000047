#!/usr/bin/env python
"""What monitoring and the preconditioner add to a training step, and what spectra take at a 7B model's shapes.

A run of SmolLM2-135M that measures and preconditions at every step; the parts are timed inside of it, so that they
and the rest of their step meet the same machine. Then the spectra of random adapters of Llama-2-7B's shapes,
by Gram matrices as in training and by QR as in `qhybrid inspect`, with their largest difference.

    scripts/bench_monitoring.py --steps 8       on the CPU or the GPU that is there
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

from bench_sft import DEMO_MODEL, SHAPES, cpu_name, token_rows

from qhybrid.cli.main import quiet_libraries
from qhybrid.recipe.monitoring import SHORTEST_INTERVAL

WARM_UP = 2
SAMPLE = 7  # of the 7B model's modules, one layer's, that QR is timed on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16, help="of the 7B model's adapters")
    options = parser.parse_args()
    quiet_libraries()
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    print(f"{device}, {os.cpu_count()} cores; " + ", ".join(f"{name} {version(name)}" for name in packages))
    measure_run(options)
    measure_spectra(options.rank)


def measure_run(options: argparse.Namespace) -> None:
    """The demo's three bands on random rows."""
    import torch
    from datasets import Dataset
    from rich.console import Console
    from transformers import PrinterCallback
    from trl import SFTConfig

    import qhybrid.training.trainer as training
    from qhybrid.adapters.attach import attach
    from qhybrid.architecture.bands import build_layout
    from qhybrid.architecture.spec import read_spec
    from qhybrid.base.load import load_base
    from qhybrid.base.locate import model_folder
    from qhybrid.base.tokenizer import load_tokenizer
    from qhybrid.recipe.load import load_recipe
    from qhybrid.training.callbacks.allocate import AllocateRanks
    from qhybrid.training.callbacks.monitor import Monitor
    from qhybrid.training.callbacks.record import RecordSteps
    from qhybrid.training.display import ProgressDisplay
    from qhybrid.training.events import EventLog, read_events

    overrides = [f"model.path={DEMO_MODEL}", "monitoring.spectrum_steps=1", "training.preconditioner=riemannian"]
    recipe = load_recipe("demo", overrides).recipe
    layout = build_layout(recipe, read_spec(model_folder(recipe.model)))
    model = load_base(recipe.model, recipe.quantization)
    steps = WARM_UP + options.steps
    ids, labels = token_rows(options.batch * steps, options.length, model.config.vocab_size)
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name, function):
        def run(*args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            return result

        return run

    training.precondition = timed("preconditioner", training.precondition)
    Monitor._take_importance = timed("importance", Monitor._take_importance)
    Monitor.on_step_end = timed("spectra", Monitor.on_step_end)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.jsonl"
        events = EventLog(file)
        trainer = training.BandedTrainer(
            model=attach(model, layout, dtype=torch.bfloat16),
            recipe=recipe,
            layout=layout,
            find_rows=lambda batches: [],
            report=lambda event, **facts: None,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=options.batch,
                gradient_checkpointing=False,
                max_length=None,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
            processing_class=load_tokenizer(recipe.model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(AllocateRanks(trainer, events))
        trainer.add_callback(Monitor(trainer, events, file))
        trainer.add_callback(
            RecordSteps(trainer, events, ProgressDisplay(Console(quiet=True), line_every=steps, initial_ranks=0))
        )
        trainer.train()
        whole = [record["seconds"] for record in read_events(file, "step")]
        event_bytes = len(next(line for line in file.read_text().splitlines() if '"spectra"' in line))
    plain = [total - sum(parts) for total, *parts in zip(whole, *seconds.values(), strict=True)][WARM_UP:]
    print(f"SmolLM2-135M, NF4, the demo's bands, {len(layout)} modules, batch {options.batch} × {options.length} "
          f"tokens, {options.steps} steps; a step without the parts below: {median(plain):.2f} s\n")  # fmt: skip
    print(f"| part | milliseconds, median | of a step, if done at every step | at every {SHORTEST_INTERVAL}th |")
    print("|---|---|---|---|")
    for name, parts in seconds.items():
        share = median(part / rest for part, rest in zip(parts[WARM_UP:], plain, strict=True))
        rarely = "" if name == "preconditioner" else f"{share / SHORTEST_INTERVAL:.3%}"
        print(f"| {name} | {1e3 * median(parts[WARM_UP:]):.1f} | {share:.2%} | {rarely} |")
    print(f"\none spectra event: {event_bytes:,} bytes\n")


def measure_spectra(rank: int) -> None:
    """Random bf16 adapters on a model without weights."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
    from qhybrid.adapters.spectrum import factor
    from qhybrid.adapters.watch import spectra
    from qhybrid.architecture.bands import layout_of_bands
    from qhybrid.architecture.spec import spec_from_config
    from qhybrid.recipe.band import BandSection

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {"model_type": "llama", **SHAPES["llama-2-7b"]}
    layout = layout_of_bands((BandSection(rank=rank),), spec_from_config(config))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["llama-2-7b"]))
    model = attach(model, layout, dtype=torch.bfloat16)
    falling = torch.logspace(0, -3, rank, device=device)  # as trained ones do
    sample = {}
    for row, module in adapted_modules(model, layout):
        a = 0.01 * torch.randn(rank, row.in_features, device=device)
        b = 0.01 * torch.randn(row.out_features, rank, device=device) * falling
        module.lora_A[ADAPTER].weight = nn.Parameter(a.bfloat16())
        module.lora_B[ADAPTER].weight = nn.Parameter(b.bfloat16())
        if row.layer == 0:
            sample[row.module] = (b.bfloat16(), a.bfloat16(), row.scaling)

    def seconds(function):
        times = []
        for _ in range(3):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            result = function()
            times.append(time.perf_counter() - began)
        return median(times), result

    by_gram, found = seconds(lambda: spectra(model, layout))
    by_qr, exact = seconds(lambda: {name: factor(*parts).sigma.cpu() for name, parts in sample.items()})
    by_qr *= len(layout) / SAMPLE
    error = max(float((found[name].sigma - sigma).abs().max() / sigma[0]) for name, sigma in exact.items())
    print(f"Llama-2-7B, LoRA rank {rank} on all linears in bf16, {len(layout)} modules: {by_gram:.2f} s; by QR "
          f"in fp64 {by_qr:.2f} s (from one layer's); largest difference {error:.1e} of σ₁")  # fmt: skip


if __name__ == "__main__":
    main()
