#!/usr/bin/env python
"""What a run of a sweep costs beside its training, and what `qhybrid sft` and `qhybrid eval` by hand would.

Both train the same runs and score the same held-out rows. Of each the seconds beside the optimizer steps count:
start, imports, data, loading, saving, loading again, scoring. In turn, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from qhybrid.sweep.results import read_results
from qhybrid.training.events import read_events

QHYBRID = [sys.executable, "-m", "qhybrid.cli.main"]
ROOT = Path(__file__).parent.parent


def apart(recipe: str, overrides: list[str], folder: Path) -> float:
    """Seconds beside the steps of one run and its evaluation, each a process of its own."""
    began = time.perf_counter()
    subprocess.run([*QHYBRID, "sft", recipe, *overrides, f"output_dir={folder}"], check=True, capture_output=True)
    rows = ROOT / "recipes" / "data" / "orders_eval.jsonl"
    scored = [*QHYBRID, "eval", str(rows), "--adapter", str(folder), "--no-generation"]
    subprocess.run(scored, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    return seconds - sum(step["seconds"] for step in read_events(folder / "events.jsonl", "step"))


def together(recipe: str, overrides: list[str], folder: Path) -> list[float]:
    """The same of every run of a sweep of two arms."""
    sweep = ["sweep.arms=[uniform,random]", "sweep.learning_rates=[1e-3]", "sweep.seeds=[0]"]
    command = [*QHYBRID, "ranks", "sweep", recipe, *overrides, *sweep, "--output", str(folder), "--jobs", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return [run.other_seconds for run in read_results(folder).runs]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a run of a sweep costs beside its training.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="sweep_demo")
    parser.add_argument("overrides", nargs="*", default=["training.max_steps=2"])
    options = parser.parse_args()
    alone: list[float] = []
    swept: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            alone.append(apart(options.recipe, options.overrides, Path(temporary) / f"run{number}"))
            swept += together(options.recipe, options.overrides, Path(temporary) / f"sweep{number}")
    print(f"{platform.machine()}, torch {version('torch')}, transformers {version('transformers')}")
    for name, seconds in (("sft and eval", alone), ("a sweep's run", swept)):
        shown = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"{name:14} {statistics.median(seconds):6.1f} s beside the steps, median of {shown}")
    print(json.dumps({"ratio": round(statistics.median(swept) / statistics.median(alone), 3)}))


if __name__ == "__main__":
    main()
