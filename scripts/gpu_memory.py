#!/usr/bin/env python
"""Measures what recipes take of a GPU, beside what was predicted, and finds the memory they fit into by bisection.

    scripts/gpu_memory.py --out results.jsonl --minutes 8     # again, until it says that nothing is left
    scripts/gpu_memory.py --out results.jsonl --simulate      # the simulated steps as well; they need no GPU
    scripts/gpu_memory.py --report results.jsonl              # writes docs/data/gpu_memory.md and its picture

Every recipe (scripts/gpu_memory_cases.py) trains four optimizer steps on full rows in a process of its own
(scripts/gpu_memory_run.py), on a model of the right shape whose NF4 weights are random from the start. What the
file holds is not done again, so the matrix can be split over several calls; a run that failed is tried again. With
--device cpu three tiny recipes go through the same code, which tests the scripts and measures no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_memory_cases import case_names, edge_names
from gpu_memory_report import Line, Results, edge_bounds, write_report

ROOT = Path(__file__).resolve().parent.parent
RUN = Path(__file__).with_name("gpu_memory_run.py")
GIB = 2**30
EDGE_MIB = 4  # the bisection ends when a cap that passes and one that does not are this near
GRACE_SECONDS = 60  # a run that was begun within --minutes may take this much longer


class OutOfTime(Exception):
    """--minutes have passed."""


class Runner:
    """Starts gpu_memory_run.py, and adds what it prints to the results."""

    def __init__(self, results: Results, device: str, minutes: float) -> None:
        self._results = results
        self._device = device
        self._end = time.monotonic() + 60 * minutes
        self._began_one = False
        self._machine: dict[str, Any] = {"device": device}

    def machine(self) -> Line:
        """Versions and GPU; they stand first in what is printed, and some of them in every line."""
        line = self._run("machine", "", "--machine")
        self._machine |= {"gpu": line.get("gpu"), "torch": line.get("versions", {}).get("torch")}
        return line

    def __call__(self, kind: str, recipe: str, cap: int | None = None) -> Line:
        """The line of that run: from the file, or from a new process.

        Raises:
            OutOfTime: there is no line yet, and no time to make one.
        """
        known = self._results.get(kind, recipe, cap)
        if known is not None:
            return known
        arguments = [recipe, *(["--simulate"] if kind == "simulated" else [])]
        if cap is not None:
            arguments += ["--cap", str(cap)]
        began = time.monotonic()
        line = self._run(kind, recipe, *arguments, cap=cap)
        print(f"{_in_a_line(line)}  {recipe}  ({time.monotonic() - began:.0f} s)", flush=True)
        return line

    def _run(self, kind: str, recipe: str, *arguments: str, cap: int | None = None) -> Line:
        left = self._end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        command = [sys.executable, str(RUN), *arguments, "--device", self._device]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=left + GRACE_SECONDS, env=environment
            )
            found = _last_object(done.stdout)
            if found is None:
                found = {"status": "failed", "error": f"exit {done.returncode}: {done.stderr.strip()[-500:]}"}
        except subprocess.TimeoutExpired:
            if self._began_one:  # it gets the whole time in the next call
                raise OutOfTime from None
            found = {"status": "too slow", "error": f"not done in {left + GRACE_SECONDS:.0f} s"}
        self._began_one = self._began_one or kind != "machine"
        line = {"kind": kind, "recipe": recipe or found.get("gpu") or "", **self._machine, **found}
        if cap is not None:
            line["cap_mib"] = cap
        self._results.add(line)
        return line


def _last_object(text: str) -> Line | None:
    """The JSON object in the last line that is one: libraries print what they like."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def _in_a_line(line: Line) -> str:
    if line["status"] == "failed":
        return f"failed: {line['error'].splitlines()[-1]}\n   "
    if line["kind"] == "simulated":
        return f"simulated {line.get('simulated_allocated', 0) / GIB:.3f} GiB"
    cap = f"cap {line['cap_mib']} MiB: " if "cap_mib" in line else ""
    ratio = ""
    if line["status"] == "ok" and not cap:
        allocated = line["predicted_allocated"] / line["max_memory_allocated"]
        reserved = line["predicted_reserved"] / line["max_memory_reserved"]
        ratio = f"{line['max_memory_allocated'] / GIB:.3f} GiB, {allocated:.4f} reserved {reserved:.4f}"
    return f"{cap}{line['status']} {ratio}"


# ---- the edge ----


def find_edge(recipe: str, results: Results, run: Callable[..., Line]) -> None:
    """The smallest cap of torch's allocator with which the steps pass, to EDGE_MIB."""
    while (bounds := edge_bounds(results, recipe)) is not None and bounds[1] - bounds[0] > EDGE_MIB:
        if run("try", recipe, sum(bounds) // 2)["status"] not in ("ok", "oom"):
            return


# ---- the command ----


def run_all(options: argparse.Namespace) -> None:
    """Whatever the file lacks: the measured runs, the edges, and the simulated runs where they are asked for."""
    results = Results(options.out)
    run = Runner(results, options.device, options.minutes)
    names = [name for name in case_names(options.device) if options.only in name]
    names.sort(key=lambda name: ("measured", name, None) in results.lines)  # what failed comes again at the end
    try:
        machine = run.machine()
        print(
            json.dumps({key: machine[key] for key in machine if key not in ("kind", "recipe")}, indent=1),
            flush=True,
        )
        if machine["status"] != "ok":
            sys.exit("the libraries cannot be loaded; not measured")
        has_device = options.device == "cpu" or machine["gpu"] is not None
        if not has_device and not options.simulate:
            sys.exit("this needs a CUDA device; not measured. --simulate needs none, --device cpu is a dry run")
        for name in names if has_device else ():
            if "liger" in name and importlib.util.find_spec("liger_kernel") is None:
                print(f"left out, since liger-kernel is not installed: {name}", flush=True)
            else:
                run("measured", name)
        for name in edge_names(options.device) if has_device else ():
            if name in names:
                find_edge(name, results, run)
        for name in names if options.simulate else ():
            run("simulated", name)
    except OutOfTime:
        print("the time is over; call this again for the rest")
    else:
        failed = sum(line["status"] == "failed" for line in results.lines.values())
        print(f"nothing is left{f', but {failed} failed and will be tried again' if failed else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_memory.jsonl"), help="results, added as they come")
    parser.add_argument("--minutes", type=float, default=8.0, help="no run is begun later")
    parser.add_argument("--only", default="", help="recipes whose line has this in it")
    parser.add_argument("--simulate", action="store_true", help="the simulated steps as well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--report", type=Path, metavar="JSONL", help="report on this file, run nothing")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="in the place of docs/, for the report")
    options = parser.parse_args()
    if options.report is not None:
        write_report(options.report, options.to)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
