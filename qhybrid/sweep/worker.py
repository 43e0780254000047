"""What the processes of a sweep do: look at model and data, or make one run of `qhybrid sft` and measure it.

Where it can be, each is forked from a process that has imported this module, so that imports are paid for once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from rich.console import Console

from qhybrid.architecture.spec import read_spec
from qhybrid.base.locate import model_folder
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.data.prepare import prepare_data, prepare_held_out
from qhybrid.data.tokenize import EncodedRow
from qhybrid.errors import NonFiniteError, QhybridError, TrainingError
from qhybrid.evaluation.answers import require_answers
from qhybrid.evaluation.evaluate import Scores, evaluate
from qhybrid.evaluation.labels import label_rows
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.schema import Recipe
from qhybrid.recipe.sweep import MeasuresSection
from qhybrid.redaction import redacted_output, redacted_traceback
from qhybrid.sweep.order import RUN, Order, Probe
from qhybrid.sweep.outcome import Outcome, RowFigures, outcome_of, write_outcome
from qhybrid.training.memory import hardware_of
from qhybrid.training.preflight import settle
from qhybrid.training.run import Run
from qhybrid.training.sft import run_sft

_DEFAULT_NEW_TOKENS = 128
_SECONDS_TO_LEAVE = 180  # for a process of an earlier sweep that was killed, and saves


def probe(
    answer: Connection, prepare: Callable[[], None], loaded: LoadedRecipe, measure: MeasuresSection, date: str
) -> None:
    """Send a `Probe` of the recipe, or the error that it meets. The model is on this machine afterwards."""
    prepare()
    try:
        recipe = settle(loaded)
        spec = read_spec(model_folder(recipe.model))
        hardware = hardware_of(recipe)
        tokenizer = load_tokenizer(recipe.model)
        data = prepare_data(recipe, tokenizer, base_folder=loaded.folder, date=date)
        rows = _held_out(recipe, tokenizer, loaded, measure, date)
        if measure.labels is not None:
            label_rows(tokenizer, rows, measure.labels)
        if "exact_match" in measure.metrics:
            require_answers(tokenizer, rows, measure.answer_after)
        if hardware.device == "cuda":
            free = (hardware.budget.vram or 0) - hardware.budget.context
        else:
            free = psutil.virtual_memory().available
        fingerprint = f"{data.fingerprint}-{_fingerprint(rows)}"
        answer.send(Probe(spec, hardware, free, data.longest, fingerprint, len(rows)))
    except QhybridError as error:
        answer.send(error)
    except Exception as error:  # what this process prints goes nowhere
        answer.send(TrainingError(f"looking at model and data failed:\n{redacted_traceback(error)}"))


def work(order: Order, prepare: Callable[[], None]) -> None:
    """Train and measure, and write outcome.json. Exit code 1: what went wrong ends the log; 128 + n: signal n."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(order.threads)
    code = 0
    with redacted_output(), _alone_in(order.folder):
        prepare()
        try:
            write_outcome(_run(order), order.folder)
            shutil.rmtree(order.folder / RUN / "checkpoints", ignore_errors=True)  # the adapter is there
        except KeyboardInterrupt as error:
            code = getattr(error, "exit_code", 130)
        except QhybridError as error:
            print(f"error: {error}", flush=True)
            code = 1
        except Exception as error:
            print(redacted_traceback(error), flush=True)
            code = 1
    sys.stdout.flush()
    sys.exit(code)


def _run(order: Order) -> Outcome:
    run = Run(order.folder / RUN)
    try:
        figures = run_sft(order.loaded, resume=True, console=Console(), date=order.date).figures
    except NonFiniteError as error:
        return outcome_of(run, "diverged", process_seconds=time.time() - order.began, note=error.message)
    rows, seconds = _figures(order, run), time.time() - order.began
    if not all(map(math.isfinite, rows.losses)):
        note = "the loss of a held-out row is not finite"
        return outcome_of(run, "diverged", process_seconds=seconds, note=note)
    return outcome_of(
        run,
        "finished",
        rows=rows,
        adapter_of_step=figures.get("adapter_of_step"),
        peak_bytes=figures.get("peak_cuda_max_reserved_bytes", figures["peak_process_bytes"]),
        process_seconds=seconds,
    )


def _figures(order: Order, run: Run) -> RowFigures:
    """The adapter on the held-out rows, loaded as `qhybrid eval` does it: so it is the same after a restart."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, tokenizer, info = load_adapter_for_inference(run.adapter)
    measure = order.measure
    rows = _held_out(settle(order.loaded), tokenizer, order.loaded, measure, info.date)
    labelled = label_rows(tokenizer, rows, measure.labels) if measure.labels is not None else None
    generates = "exact_match" in measure.metrics
    scores: Scores = evaluate(
        model,
        tokenizer,
        rows,
        batch_size=measure.batch_size,
        max_new_tokens=(measure.max_new_tokens or _DEFAULT_NEW_TOKENS) if generates else None,
        answer_after=measure.answer_after,
        labelled=labelled,
    )
    return RowFigures(
        fingerprint=_fingerprint(rows),
        losses=scores.row_losses,
        tokens=scores.row_tokens,
        exact=tuple(None if answer is None else answer.is_exact for answer in scores.answers),
        expected=scores.labels.expected if scores.labels else (),
        predicted=scores.labels.predicted if scores.labels else (),
    )


def _held_out(
    recipe: Recipe, tokenizer, loaded: LoadedRecipe, measure: MeasuresSection, date: str | None
) -> list[EncodedRow]:
    rows = prepare_held_out(recipe, tokenizer, base_folder=loaded.folder, date=date)
    return rows[: measure.rows]


def _fingerprint(rows: Sequence[EncodedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.input_ids.tobytes())
        digest.update(row.labels.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _leave_with_parent() -> None:
    """When the sweep is gone, in whatever way, save and leave."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no process of an earlier sweep, which was killed, is in the run's folder any more."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            deadline = time.monotonic() + _SECONDS_TO_LEAVE
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
