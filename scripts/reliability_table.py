#!/usr/bin/env python
"""Writes docs/reliability.md from the figures that the tests of faults and attacks measured.

    export QHYBRID_FIGURES=/tmp/figures.jsonl
    ./scripts/test --all tests/faults tests/attacks tests/integration/test_resume.py tests/unit/export \\
        tests/integration/test_export.py tests/integration/test_proof.py tests/integration/test_gguf_export.py
    scripts/reliability_table.py /tmp/figures.jsonl [more files]

Figures of one name are listed once, the last one measured.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from itertools import groupby
from pathlib import Path

from qhybrid.training.run import versions

DOCS = Path(__file__).parent.parent / "docs" / "reliability.md"
# What must hold, by the numbers that the tests give.
PROMISES = {
    1: "Killed while saving: the newest checkpoint is whole, and at most `save_steps` steps are lost",
    2: "A resumed run equals the uninterrupted one exactly (CPU, fp32)",
    3: "Settings take effect, after a resume too",
    4: "A full disk costs no earlier checkpoint, and is refused beforehand",
    5: "SIGTERM saves after the step, the evaluation's batch or the save under way, and leaves",
    6: "NaN and infinity stop before the optimizer's step and name the data rows; leaps are told, noise is not",
    7: "Damaged files are found before the first step, and named",
    8: "No pickle is opened",
    9: "No code from a model's repository runs; asking for it is refused",
    10: "Hostile recipes are refused in one message, in under half a second",
    11: "No name leads out of its folder",
    12: "No secret and no home folder in anything written",
    13: "Bad data rows are counted and numbered; nothing kept is lost",
    14: "Out of memory: the step is taken again with smaller micro-batches",
    15: "Merged, converted and exported adapters compute what was trained",
}
HEAD = """\
# What runs survive

How a run keeps its work, and what was tried to make it lose it. The tests are in `tests/faults/`,
`tests/attacks/`, `tests/integration/test_resume.py`, and for exports `tests/unit/export/` and
`tests/integration/test_{export,proof,gguf_export}.py`; by default the long sweeps run a fixed sample, with
`./scripts/test --all` in full. This page is written by `scripts/reliability_table.py` from such a full run.

## How it works
- A checkpoint is written into a hidden folder, every file synced to the disk, a manifest with sizes and
  SHA-256 hashes written last, and the folder renamed. Only then are older ones deleted, by step number. It is
  safetensors and JSON; nothing in it is pickled, and it holds everything whole, by name, whatever the number
  of processes. The result, `adapter/`, appears whole or not at all too.
- `--resume auto` takes the newest checkpoint that verifies, and says which file of a newer one was damaged.
  If checkpoints are there and none is whole, it stops instead of starting anew. The weights of the base model
  are hashed at the start (`base.json`), checked against the hub's own hashes where there are some, and a
  resumed run must have the same.
- SIGTERM and SIGINT during training save after the step under way and leave with 143 or 130. An evaluation
  that was cut short is made up for. A second Ctrl-C some seconds later leaves at once. Give containers time:
  `docker stop -t 120`.
- A loss or gradient norm that is not finite stops the run before the optimizer's step, with exit code 1; the
  event log and the message have the rows of the batch. A loss that leaps out of its noise is told
  (`loss_spike`).
- Before the start there must be room for two checkpoints. A disk that fills up later ends the run with what
  was saved.
- When memory runs out, one process takes the step again from its beginning in parts of half as many rows: the
  same rows, optimizer steps and learning rates. With one row at a time, or several processes, it stops and
  names a plan that takes less. Packed rows are split where one begins.
- Values of environment variables ending in TOKEN, _KEY, SECRET or PASSWORD, tokens of the hub, passwords in
  URLs and the home folder are replaced in everything that is written or printed.
"""


def main(files: list[str]) -> None:
    found: dict[tuple[int, str], str] = {}
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[record["item"], record["name"]] = record["figure"]
    lines = [HEAD, "## Figures"]
    for item, group in groupby(sorted(found), key=lambda key: key[0]):
        lines += ["", f"**{item}. {PROMISES[item]}.**", "", "| tried | result |", "|---|---|"]
        lines += [f"| {name} | {found[item, name]} |" for _, name in group]
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines += [
        "",
        f"Python {platform.python_version()}, {os.cpu_count()} cores, CPU only; {libraries}.",
        "Not measured: CUDA, real power failures, network file systems.",
        "",
    ]
    DOCS.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
