"""Planted ranks: do AdaLoRA, GoRA and EVA find the ranks that a teacher has, and what is it worth to know them?

    python scripts/evidence/planted_ranks.py                  # writes docs/data/evidence/planted_ranks.json
    python scripts/evidence/planted_ranks.py --work FOLDER    # keeps what is done there, and goes on from it
    python scripts/evidence/planted_ranks.py --variants effect size    # terms of equal size, too
    python scripts/evidence/plot_planted_ranks.py             # draws docs/images/planted_ranks.png

A tiny LLaMA is briefly pretrained; a teacher is the same model with known ranks planted in its modules; students
of eight arms distil it, all at the same budget of parameters as what is planted. Each seed has a base, planted
directions, initial values and an order of the data of its own. Learning rates are chosen on one more seed, with as
many tries for every arm. No network, no GPU; half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from planted_results import summary, tables
from planted_students import ARMS, Student, adalora_student, learn, student_of
from planted_teachers import (
    PLANTS,
    ROOT,
    Lesson,
    Sizes,
    functional_truth,
    planted,
    pretrained,
    settings_of_plants,
    teacher_of,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qhybrid.cli.main import quiet_libraries

OUTPUT = ROOT / "docs" / "data" / "evidence" / "planted_ranks.json"
NUM_PROCESSES = 2
PACKAGES = ("qhybrid", "torch", "transformers", "peft")

SEARCH_SEED, SEARCH_PLANT = 1000, "uniform"
SAME_ON_UNIFORM = "oracle"  # the arm that is the uniform one there
LEARNING_RATES = (5e-3, 1e-2, 2e-2, 4e-2)

# How large the planted terms are, and the arms whose students learn from such teachers. GoRA's and EVA's maps need
# no learning.
VARIANTS: dict[str, tuple[str, ...]] = {"effect": ARMS, "size": ("adalora",)}
MAIN = "effect"

# AdaLoRA on the search seed: learning rate, alpha and settings. alpha is twice the rank unless given.
ADALORA_PLANT = "decreasing"
ADALORA_TRIES: tuple[dict[str, Any], ...] = (
    {"learning_rate": 5e-3},
    {"learning_rate": 2e-2},
    {"learning_rate": 8e-2},
    {"learning_rate": 5e-3, "alpha": 32.0},
    {"learning_rate": 2e-2, "alpha": 32.0},
    {"learning_rate": 2e-2, "alpha": 128.0},
    {"learning_rate": 2e-2, "alpha": 32.0, "regularizer_weight": 0.0},
    {"learning_rate": 2e-2, "alpha": 32.0, "regularizer_weight": 1.0},
    {"learning_rate": 2e-2, "alpha": 32.0, "regularizer_in_scores": True},
)


@dataclass(frozen=True)
class Task:
    """A part of the whole that runs by itself, and whose result is a file."""

    kind: str  # "base", "search", "adalora" or "plant"
    seed: int
    plant: str = ""
    variant: str = MAIN
    arm: str = ""
    number: int = 0  # of ADALORA_TRIES

    @property
    def file(self) -> str:
        """The result's name."""
        return "-".join(str(part) for part in asdict(self).values() if part != "") + ".json"


@cache
def _base(folder: Path, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(sizes.config)
    model.load_state_dict(load_file(folder / f"base-{seed}.safetensors"))
    return model.eval().requires_grad_(False)


class _Class:
    """A teacher and what belongs to it."""

    def __init__(self, folder: Path, sizes: Sizes, task: Task) -> None:
        self.sizes, self.seed = sizes, task.seed
        self.base = _base(folder, sizes, task.seed)
        self.truth = planted(sizes, task.plant, task.seed)
        effect = task.variant == "effect"
        self.teacher = teacher_of(self.base, self.truth, sizes, task.seed, equal_effect=effect)
        self.lesson = Lesson(self.base, self.teacher, sizes, task.seed)

    def student(self, arm: str) -> Student:
        return student_of(arm, self.base, self.teacher, self.truth, self.lesson, self.sizes, self.seed)

    def learn(self, student: Student, learning_rate: float) -> dict[str, Any]:
        """What a student ends with, as JSON has it: `left` is KL by window over that of the base."""
        end = learn(student, self.base, self.lesson, self.sizes, learning_rate=learning_rate, seed=self.seed)
        left = (end.missed / self.lesson.start).tolist()
        return {"left": left, "ranks": end.ranks, "scores": end.scores, "parameters": end.parameters}


def _left(result: dict[str, Any]) -> float:
    return sum(result["left"]) / len(result["left"])


def find(folder: Path, sizes: Sizes, task: Task, learning_rates: dict[str, float]) -> Any:
    """The result of one task."""
    if task.kind == "base":
        weights = {name: value.clone() for name, value in pretrained(sizes, task.seed).state_dict().items()}
        save_file(weights, folder / f"base-{task.seed}.safetensors")
        return None
    group = _Class(folder, sizes, task)
    if task.kind == "search":
        student = group.student(task.arm)
        return {str(rate): _left(group.learn(student, rate)) for rate in LEARNING_RATES}
    if task.kind == "adalora":
        tried = dict(ADALORA_TRIES[task.number])
        rate = tried.pop("learning_rate")
        result = group.learn(adalora_student(sizes, **tried), rate)
        return {**result, "truth": {row.module: row.rank for row in group.truth}}
    found: dict[str, Any] = {
        "start": group.lesson.start,
        "truth": {row.module: row.rank for row in group.truth},
        "functional": functional_truth(group.base, group.teacher, group.truth, group.lesson.held_out),
        "maps": {},
        "arms": {},
    }
    for arm in ("gora", "eva", *VARIANTS[task.variant]):
        student = group.student(arm)
        if arm in ("gora", "eva"):
            found["maps"][arm] = {row.module: row.rank for row in student.layout}
            found["maps"][f"{arm} importance"] = student.importance
        if arm in VARIANTS[task.variant] and arm not in found["arms"]:
            is_known = arm == SAME_ON_UNIFORM and task.plant == SEARCH_PLANT  # as the uniform arm, in every bit
            found["arms"][arm] = (
                found["arms"]["uniform"] if is_known else group.learn(student, learning_rates[arm])
            )
    found["maps"]["adalora"] = found["arms"]["adalora"]["ranks"]
    found["maps"]["adalora scores"] = found["arms"]["adalora"].pop("scores")
    return found


def _run(folder: Path, sizes: Sizes, task: Task, learning_rates: dict[str, float]) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    found = find(folder, sizes, task, learning_rates)
    seconds = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    part = folder / f"{task.file}.{os.getpid()}"
    part.write_text(json.dumps({"found": found, **seconds}))
    part.replace(folder / task.file)


class Work:
    """Runs tasks in processes of their own, and remembers what is done."""

    def __init__(self, folder: Path, sizes: Sizes, num_processes: int) -> None:
        self.folder, self.sizes = folder, sizes
        self.cpu_seconds = 0.0
        # Each process has one thread: the matrices are too small for more.
        self._pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))

    def results(self, tasks: Iterable[Task], learning_rates: dict[str, float] | None = None) -> dict[Task, Any]:
        """What the tasks find."""
        tasks = list(tasks)
        missing = {
            self._pool.submit(_run, self.folder, self.sizes, task, learning_rates or {}): task
            for task in tasks
            if not (self.folder / task.file).exists()
        }
        for future, task in missing.items():
            future.result()
            print(f"{time.strftime('%H:%M:%S')}  {task.file.removesuffix('.json')}", flush=True)
        read = {task: json.loads((self.folder / task.file).read_text()) for task in tasks}
        self.cpu_seconds += sum(each["cpu_seconds"] for each in read.values())
        return {task: each["found"] for task, each in read.items()}

    def close(self) -> None:
        """Let the processes go."""
        self._pool.shutdown()


def experiment(work: Work, num_seeds: int, plants: tuple[str, ...], variants: tuple[str, ...]) -> dict[str, Any]:
    """All tasks, and what they come to."""
    seeds = range(num_seeds)
    work.results(Task("base", seed) for seed in (SEARCH_SEED, *seeds))
    searched = work.results(
        Task("search", SEARCH_SEED, SEARCH_PLANT, arm=arm) for arm in ARMS if arm != SAME_ON_UNIFORM
    )
    searches = {task.arm: {float(rate): left for rate, left in found.items()} for task, found in searched.items()}
    rates = {arm: min(tried, key=tried.__getitem__) for arm, tried in searches.items()}
    rates[SAME_ON_UNIFORM] = rates["uniform"]
    tries = work.results(
        Task("adalora", SEARCH_SEED, ADALORA_PLANT, number=number) for number in range(len(ADALORA_TRIES))
    )
    found = work.results(
        (Task("plant", seed, plant, variant) for variant in variants for seed in seeds for plant in plants), rates
    )
    return {
        "learning_rates": {"tried": searches, "chosen": rates},
        **summary(
            [(ADALORA_TRIES[task.number], result) for task, result in tries.items()],
            {(task.variant, task.plant, task.seed): result for task, result in found.items()},
        ),
    }


def main() -> None:
    """Run everything, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plants", nargs="+", choices=PLANTS, default=PLANTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=(MAIN,))
    parser.add_argument("--work", type=Path, help="folder for what is done; a temporary one when left out")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    sizes = Sizes()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(folder, sizes, NUM_PROCESSES)
        try:
            found = experiment(work, arguments.seeds, tuple(arguments.plants), tuple(arguments.variants))
        finally:
            work.close()
    facts = {
        "sizes": asdict(sizes),
        "plants": settings_of_plants(),
        "num_seeds": arguments.seeds,
        "budget": sizes.budget,
        "processor_seconds": round(work.cpu_seconds),
        "machine": {"system": platform.system(), "processor": platform.machine(), "processes": NUM_PROCESSES},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        **found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(tables(facts))


if __name__ == "__main__":
    main()
