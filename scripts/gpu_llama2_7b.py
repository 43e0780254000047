#!/usr/bin/env python
"""The 24 GB claim: trains recipes/llama2_7b_instruct.yaml for 20 steps on random weights of Llama-2-7B's shape.

Random weights are right for memory and speed. The recipe caps torch's allocator at 24 GiB. Every row is longer
than max_length, so every micro-batch has the largest size that the recipe allows. Needs a CUDA device, 32 GB of
host memory and 16 GB of disk; prints a markdown table.

    scripts/gpu_llama2_7b.py [overrides, such as training.gradient_checkpointing=false]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qhybrid.training.run import versions

RECIPE = Path(__file__).parent.parent / "recipes" / "llama2_7b_instruct.yaml"
SHAPE = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
WORDS = "one two three four five six seven eight nine ten"


def make_model(folder: Path) -> None:
    """A checkpoint of random bf16 weights, and a byte-level tokenizer within its vocabulary."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(SHAPE)
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    torch.cuda.empty_cache()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)


def make_rows(file: Path, number: int) -> None:
    """Rows far beyond max_length; the answer begins at once, so nearly all positions are trained."""
    row = {"instruction": "Count.", "output": f"{WORDS} " * 400}
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(number)), encoding="utf-8")


def run_and_watch(command: list[str]) -> int:
    """Run `command` and return the most bytes of the device that it took, all told.

    The cap holds for torch's allocator alone; the CUDA context and other libraries' memory are beside it.
    """

    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    before = peak = used()
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, used())
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return peak - before


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; without one the claim is not measured")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        make_rows(folder / "rows.jsonl", 340)
        overrides = [
            f"model.path={folder / 'model'}",
            f"data.sources={folder / 'rows.jsonl'}",
            "data.eval_fraction=0",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "training.max_steps=20",
            f"output_dir={folder / 'run'}",
            *sys.argv[1:],
        ]
        command = [sys.executable, "-m", "qhybrid.cli.main", "sft", str(RECIPE), *overrides]
        device_bytes = run_and_watch(command)
        figures = json.loads((folder / "run" / "run.json").read_text())["figures"]
    print(f"{torch.cuda.get_device_name()}; " + ", ".join(f"{name} {v}" for name, v in versions().items()) + "\n")
    print("| figure | value |\n|---|---|")
    print(f"| tokens/s | {figures['tokens_per_second']:,.0f} |")
    print(f"| peak allocated | {figures['peak_cuda_max_allocated_bytes'] / 2**30:.2f} GiB |")
    print(f"| peak reserved | {figures['peak_cuda_max_reserved_bytes'] / 2**30:.2f} GiB |")
    print(f"| peak on the device, CUDA context included | {device_bytes / 2**30:.2f} GiB |")
    print(f"| loss, first step and last tenth | {figures['first_loss']:.3f}, {figures['last_tenth_loss']:.3f} |")


if __name__ == "__main__":
    main()
