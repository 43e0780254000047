"""Checkpoints of which one knows what they must hold, and the processes that are killed while they write them.

As a script: `save FOLDER` saves until it is killed, `each-call FOLDER` leaves what a kill before each call leaves.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from qhybrid.disk import write_bytes
from qhybrid.training.checkpoint import newest_sealed, prune, recover, remove_leftovers, staged, step_of

SIZES = {"adapter.safetensors": 40_000, "optimizer.safetensors": 150_000, "trainer_state.json": 10_000}
LIMIT = 2


def content_of(step: int, version: int = 0) -> dict[str, bytes]:
    chance = random.Random(1000 * step + version)
    return {name: chance.randbytes(size) for name, size in SIZES.items()}


def save(checkpoints: Path, step: int, version: int = 0) -> Path:
    with staged(checkpoints, step) as folder:
        for name, content in content_of(step, version).items():
            write_bytes(folder / name, content)
    return checkpoints / f"checkpoint-{step}"


def holds(folder: Path, version: int = 0) -> bool:
    """Whether every file is what was saved at the folder's step."""
    content = content_of(step_of(folder), version)
    return all((folder / name).read_bytes() == expected for name, expected in content.items())


# ---- killed at random moments ----


def save_for_ever(checkpoints: Path) -> None:
    """Go on as a resumed run does. Every third checkpoint is saved twice, the second in place of the first."""
    remove_leftovers(checkpoints)
    newest = newest_sealed(checkpoints)
    step = 0 if newest is None else step_of(newest)
    while True:
        step += 1
        for _ in range(2 if step % 3 == 0 else 1):
            save(checkpoints, step)
            print(step, flush=True)
            prune(checkpoints, newest=step, limit=LIMIT, keep=None)


# ---- killed before each call that changes the disk ----


def before(folder: Path, case: str) -> None:
    """The checkpoints that a case begins with."""
    if case != "the first save":
        save(folder, 1)
    if case in ("replace", "replace a damaged one", "prune", "recover", "undo", "undo in place"):
        save(folder, 2)
    if case == "replace a damaged one":
        (folder / "checkpoint-2" / "adapter.safetensors").write_bytes(b"damaged")
    if case == "prune":
        save(folder, 3)
        save(folder, 4)
    if case in ("recover", "undo", "undo in place", "remove leftovers"):
        save(folder / "new", 2, version=1).rename(folder / ".checkpoint-2.partial")
        (folder / "new").rmdir()
    if case in ("recover", "undo", "undo in place"):
        (folder / "checkpoint-2").rename(folder / ".checkpoint-2.replaced")
    if case.startswith("undo"):
        (folder / ".checkpoint-2.partial" / "adapter.safetensors").write_bytes(b"damaged")
    if case == "undo in place":
        (folder / ".checkpoint-2.partial").rename(folder / "checkpoint-2")


CASES = {
    "the first save": lambda folder: save(folder, 1),
    "another step": lambda folder: save(folder, 2, version=1),
    "replace": lambda folder: save(folder, 2, version=1),
    "replace the only one": lambda folder: save(folder, 1, version=1),
    "replace a damaged one": lambda folder: save(folder, 2, version=1),
    "prune": lambda folder: prune(folder, newest=4, limit=1, keep=folder / "checkpoint-2"),
    "recover": lambda folder: recover(folder),
    "undo": lambda folder: recover(folder),
    "undo in place": lambda folder: recover(folder),
    "remove leftovers": lambda folder: remove_leftovers(folder),
}


def kill_before_each_call(root: Path) -> None:
    """For each case and each of its calls, a folder as the kill before that call leaves it."""
    for case, action in CASES.items():
        ended, number = False, 0
        while not ended:
            folder = root / case / str(number)
            folder.mkdir(parents=True)
            before(folder, case)
            child = os.fork()
            if child == 0:
                try:
                    _kill_at(number)
                    action(folder)
                finally:
                    os._exit(0 if sys.exc_info()[0] is None else 1)
            _, status = os.waitpid(child, 0)
            ended = os.WIFEXITED(status)
            assert os.waitstatus_to_exitcode(status) == (0 if ended else -signal.SIGKILL)
            number += 1


def _kill_at(number: int) -> None:
    """Die before the call of that number that could change the disk; files that are open stay half written."""
    calls = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal calls
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE != os.O_RDONLY
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    {"save": save_for_ever, "each-call": kill_before_each_call}[sys.argv[1]](Path(sys.argv[2]))
