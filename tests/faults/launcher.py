"""Real training processes that begin at once: they are forked from one that has imported everything.

As a script it is that process. It reads "NUMBER run|command RECIPE" from its input, and writes what they report:
"NUMBER pid 123", "NUMBER stepped 4", "NUMBER saving 4", "NUMBER saved 4", "NUMBER ended -9".
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from qhybrid.recipe.load import LoadedRecipe, dump_recipe

_SECONDS = 120  # for whatever is waited for


class Process:
    """One of them, as the test sees it."""

    def __init__(self) -> None:
        self.lines: queue.Queue[str] = queue.Queue()
        self.heard: list[str] = []
        self.pid = 0

    def wait_for(self, line: str) -> None:
        """Until it has reported this."""
        while line not in self.heard:
            self.heard.append(self.lines.get(timeout=_SECONDS))
            assert line in self.heard or not self.heard[-1].startswith("ended"), self.heard

    def ended(self) -> int:
        """Its exit code, once it has ended, or that of the signal with a minus; `heard` is then complete."""
        while not self.heard or not self.heard[-1].startswith("ended"):
            self.heard.append(self.lines.get(timeout=_SECONDS))
        return int(self.heard[-1].split()[1])

    def last(self, what: str) -> int:
        """The last step of which it reported this, or 0."""
        return max((int(line.split()[1]) for line in self.heard if line.startswith(f"{what} ")), default=0)


class Launcher:
    """A context manager around the process that starts others."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._all = folder, []

    def __enter__(self) -> Launcher:
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        self._root = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._root.stdin is not None
        self._root.stdin.close()
        self._root.wait(timeout=_SECONDS)

    def _listen(self) -> None:
        assert self._root.stdout is not None
        for line in self._root.stdout:
            number, _, said = line.strip().partition(" ")
            self._all[int(number)].lines.put(said)

    def start(self, loaded: LoadedRecipe, *, command: bool = False) -> Process:
        """Run the recipe, going on where it was; with `command` as `qhybrid sft`, from the beginning."""
        recipe = self._folder / f"{len(self._all)}.yaml"
        recipe.write_text(dump_recipe(loaded.recipe))
        process = Process()
        self._all.append(process)
        assert self._root.stdin is not None
        self._root.stdin.write(f"{len(self._all) - 1} {'command' if command else 'run'} {recipe}\n")
        self._root.stdin.flush()
        process.heard.append(process.lines.get(timeout=_SECONDS))
        process.pid = int(process.heard[0].split()[1])
        return process


# ---- the process itself ----


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, whatever kills this process


def _child(number: str, kind: str, recipe: str) -> int:
    import torch
    from runs import QUIET

    from qhybrid.cli.main import main
    from qhybrid.recipe.load import load_recipe
    from qhybrid.training.callbacks.record import RecordSteps
    from qhybrid.training.sft import run_sft
    from qhybrid.training.trainer import BandedTrainer

    torch.set_num_threads(1)
    save, end_step = BandedTrainer._save_checkpoint, RecordSteps.on_step_end

    def saving(self: BandedTrainer, *args: object) -> None:
        _say(f"{number} saving {self.state.global_step}")
        save(self, *args)
        _say(f"{number} saved {self.state.global_step}")

    def stepping(self: RecordSteps, args: object, state: object, control: object, **kwargs: object) -> None:
        end_step(self, args, state, control, **kwargs)
        _say(f"{number} stepped {state.global_step}")

    BandedTrainer._save_checkpoint, RecordSteps.on_step_end = saving, stepping
    if kind == "run":
        run_sft(load_recipe(recipe), resume=True, console=QUIET)
        return 0
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        main(["sft", recipe])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _collect(number: str, pid: int) -> None:
    _say(f"{number} ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


def _serve() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import runs  # noqa: F401 - with all that a run needs; nothing is computed here, or forking would not be safe

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    while line := sys.stdin.readline():
        number, kind, recipe = line.split()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(number, kind, recipe)
            finally:
                os._exit(code)
        _say(f"{number} pid {pid}")
        threading.Thread(target=_collect, args=(number, pid), daemon=True).start()


if __name__ == "__main__":
    _serve()
