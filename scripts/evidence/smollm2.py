#!/usr/bin/env python
"""Which ranks: the sweeps behind the tables of SmolLM2 in docs/evidence.md.

    smollm2.py TASK RANK SOURCE --work FOLDER

TASK is mrpc or gsm8k; SOURCE is the folder with the task's data: train.jsonl and test.jsonl of MRPC with
sentence1, sentence2 and label; train_2000.jsonl and validation_300.jsonl of GSM8K with question and answer.
Neither is part of this project. The same command goes on where it was interrupted; at its end it writes
docs/data/evidence/TASK_rankRANK/, which smollm2_tables.py shows. An hour for each on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch.nn.functional import cross_entropy

from qhybrid.cli.main import quiet_libraries
from qhybrid.cli.ranks import announce_arms, show_results
from qhybrid.recipe.load import load_recipe
from qhybrid.sweep.run import run_sweep

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "docs" / "data" / "evidence"
TASKS = ("mrpc", "gsm8k")
# At rank 8 of GSM8K these would have been best at the lowest rate, or have bands of such kinds.
MORE_FOR = ("uniform", "random", "dora-uniform", "gora", "recipe")
MORE_FOR += ("lora-adalora-lora-own-rates", "lora-adalora-dora-own-rates")
MORE_RATES = [1.5e-3, 2.6e-3, 4.5e-3, 1.35e-2]


class PlainLogProbs:
    """In the place of trl's loss over pieces of the vocabulary: what it computes, and faster on a CPU.

    Entropy and accuracy, which trl logs and nothing here reads, are zero.
    """

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk_size, softcap, logit_scale, outputs):
        assert bias is None and softcap is None and temperature == logit_scale == 1
        log_probs = -cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
        zeros = torch.zeros_like(log_probs)
        return log_probs, zeros, None, None, zeros


def prepare() -> None:
    """In every process: trl's loss over labelled positions alone, as on a GPU, and over the whole vocabulary."""
    quiet_libraries()
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True
    trl.trainer.utils._ChunkedLogProbFunction = PlainLogProbs


def with_more_rates(recipe: Path) -> list[Any]:
    """The recipe's arms, some of them with one more rate between the two lowest."""
    arms = yaml.safe_load(recipe.read_text(encoding="utf-8"))["sweep"]["arms"]
    built_in = [{"arm": arm} if isinstance(arm, str) else arm for arm in arms]
    more = {"learning_rates": MORE_RATES}
    return [{**arm, **more} if arm.get("arm", arm.get("name")) in MORE_FOR else arm for arm in built_in]


def main() -> None:
    parser = argparse.ArgumentParser(description="The sweeps of docs/evidence.md.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("rank", type=int)
    parser.add_argument("source", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    options = parser.parse_args()
    data = options.source.resolve()
    if options.task == "mrpc":
        data = options.work.resolve() / "mrpc"
        converter = HERE.parent / "make_mrpc_data.py"
        subprocess.run([sys.executable, str(converter), str(options.source), str(data)], check=True)
    recipe = HERE / f"{options.task}.yaml"
    names = {"mrpc": ("mrpc_train", "mrpc_test"), "gsm8k": ("train_2000", "validation_300")}[options.task]
    train, held_out = (data / f"{name}.jsonl" for name in names)
    overrides = [
        f"data.sources.0.path={train}",
        f"data.eval_sources.0.path={held_out}",
        f"sweep.rank={options.rank}",
    ]
    name = f"{options.task}_rank{options.rank}"
    if name == "gsm8k_rank8":
        overrides.append(f"sweep.arms={json.dumps(with_more_rates(recipe))}")
    if name == "mrpc_rank4":
        overrides.append("sweep.seeds=[0,1,2]")
    results = run_sweep(
        load_recipe(str(recipe), overrides),
        options.work / name,
        jobs=2,
        console=Console(),
        prepare=prepare,
        announce=announce_arms,
    )
    show_results(results)
    target = OUTPUT / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("results.json", "results.md"):
        shutil.copy(options.work / name / file, target)


if __name__ == "__main__":
    main()
