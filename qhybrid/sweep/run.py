"""A sweep from its recipe to its table: the search for each arm's learning rate, then seeds at the best one."""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qhybrid.disk import write_atomically
from qhybrid.errors import SweepError, TrainingError
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.sweep.folder import SweepFolder, claimed
from qhybrid.sweep.measures import value_of
from qhybrid.sweep.order import LOG, RUN, Order
from qhybrid.sweep.outcome import Outcome, outcome_of, read_outcome, write_outcome
from qhybrid.sweep.pool import Ended, Job, Pool, context
from qhybrid.sweep.pruning import Pruner, RunTail
from qhybrid.sweep.results import LOWER_IS_BETTER, SweepResults, read_results, write_results
from qhybrid.sweep.setup import PRELOAD, RunKey, Setup, set_up, settled, work
from qhybrid.sweep.summary import summarise
from qhybrid.sweep.text import as_markdown
from qhybrid.training.run import Run
from qhybrid.training.signals import stop_signals
from qhybrid.units import format_bytes, format_duration


def run_sweep(
    loaded: LoadedRecipe,
    output: Path,
    *,
    jobs: int | None = None,
    console: Console | None = None,
    prepare: Callable[[], None],
    announce: Callable[[Setup], None] = lambda setup: None,
) -> SweepResults:
    """Make all runs that the recipe's sweep asks for and that are not there yet, and write the results.

    Started again after an interruption of any kind, it goes on: runs that have ended are kept, and one that was
    under way goes on from its newest checkpoint. So does a sweep that was given more arms, rates or seeds.

    Args:
        output: the sweep's folder.
        jobs: runs at a time, at most; by cores and memory when left out.
        console: where progress is shown; standard output by default.
        prepare: is called first in every process.
        announce: is given what is settled before the first run.

    Raises:
        QhybridError: the sweep cannot be made as asked; or a run failed, and its log is named.
    """
    console = console or Console()
    loaded = settled(loaded)
    with stop_signals(lambda text: None), claimed(output) as folder:
        started = folder.started
        is_grown = started is not None and folder.is_grown(loaded.recipe)
        if started is not None and not is_grown and folder.results_file.is_file():
            _say(console, f"{folder.path} holds the finished sweep of this recipe; nothing to do")
            return read_results(folder.path)
        how = context(PRELOAD)
        date = started.date if started else datetime.date.today().isoformat()
        setup = set_up(loaded, how, jobs=jobs, date=date, started=started, prepare=prepare)
        if started is None:
            folder.begin(loaded.recipe, setup.started)
        elif is_grown:
            folder.grow(loaded.recipe)
        announce(setup)
        runs = _Runs(setup, folder, Pool(how, setup.at_once, setup.free_bytes), prepare, console)
        runs.make(setup.search, is_search=True)
        best = {arm.name: best_rate(setup, arm.name, runs.outcomes) for arm in setup.arms}
        final = tuple(
            RunKey(arm.name, rate, seed)
            for arm in setup.arms
            if (rate := best[arm.name]) is not None
            for seed in setup.sweep.seeds
        )
        runs.make(final, is_search=False)
        keys = dict.fromkeys((*setup.search, *final))  # a run of the search may be one of the final ones
        results = summarise(setup, best, {key: runs.outcomes[key] for key in keys})
        write_atomically(folder.table_file, as_markdown(results))
        write_results(results, folder.path)
        return results


def look_ahead(loaded: LoadedRecipe, *, jobs: int | None = None, prepare: Callable[[], None]) -> Setup:
    """What `run_sweep` would announce. Writes nothing; the model may be downloaded.

    Raises:
        QhybridError: the sweep cannot be made as asked.
    """
    date = datetime.date.today().isoformat()
    return set_up(settled(loaded), context(PRELOAD), jobs=jobs, date=date, started=None, prepare=prepare)


def best_rate(setup: Setup, arm: str, outcomes: dict[RunKey, Outcome]) -> float | None:
    """The rate with the best mean over the seeds of the search, of those at which all runs finished; else None."""
    name, labels = setup.sweep.measure.metrics[0], setup.sweep.measure.labels or ()
    sign = 1 if name in LOWER_IS_BETTER else -1
    scores: dict[float, float] = {}
    for rate in setup.sweep.rates_of(arm):
        ended = [outcomes[RunKey(arm, rate, seed)] for seed in setup.sweep.seeds_of_search]
        values = [value_of(name, one.rows, len(labels)) for one in ended if one.rows is not None]
        if len(values) == len(ended):
            scores[rate] = sign * sum(values) / len(values)
    return min(scores, key=lambda rate: (scores[rate], rate)) if scores else None


class _Runs:
    """The runs of one sweep: which have ended and how, and making the others."""

    def __init__(
        self,
        setup: Setup,
        folder: SweepFolder,
        pool: Pool,
        prepare: Callable[[], None],
        console: Console,
    ) -> None:
        self.outcomes: dict[RunKey, Outcome] = {}
        self._setup, self._folder, self._pool = setup, folder, pool
        self._prepare, self._console = prepare, console
        self._keys: dict[str, RunKey] = {}
        self._began: dict[str, float] = {}
        self._tails: dict[str, RunTail] = {}
        self._stopped: dict[str, int] = {}  # by run, the step at which it was found hopeless
        prune = setup.sweep.prune
        self._pruner = Pruner(prune, folder.journal) if prune else None
        self._num_done = self._num_all = 0

    def make(self, keys: Sequence[RunKey], *, is_search: bool) -> None:
        """Make those of `keys` that have not ended."""
        missing = []
        for key in keys:
            outcome = self.outcomes.get(key) or read_outcome(self._folder.run(key.name))
            if outcome and is_search and self._pruner and not self._pruner.knows(key.name):
                # It ended, and the sweep was killed before it was judged.
                step = self._hopeless_at(key, outcome.eval_losses, outcome.total_steps)
                if step is not None:
                    seconds = outcome.seconds + outcome.other_seconds
                    outcome = self._pruned(key, step, outcome.eval_losses[step], seconds)
            if outcome is None:
                missing.append(key)
            else:
                self._note(key, outcome, is_search)
        self._keys = {key.name: key for key in missing}
        kept = f", {len(keys) - len(missing)} of them are there" if len(missing) < len(keys) else ""
        what = "search for learning rates" if is_search else "seeds at the best rates"
        _say(self._console, f"{what}: {len(keys)} runs{kept}")
        self._num_done, self._num_all = len(keys) - len(missing), len(keys)
        with self._console.status(what) as status:  # on a terminal; elsewhere nothing
            self._pool.run(
                [self._job(key) for key in missing],
                started=lambda job: None,
                ended=lambda ended: self._end(ended, is_search),
                watch=lambda names: status.update(self._watch(names, is_search)),
            )

    def _job(self, key: RunKey) -> Job:
        folder = self._folder.run(key.name)
        self._tails[key.name] = RunTail(folder / RUN / "events.jsonl")

        def arguments() -> tuple:
            began = self._began[key.name] = time.time()
            recipe = self._setup.arm(key.arm).recipe(key.learning_rate, key.seed, str(folder / RUN))
            loaded = replace(self._setup.loaded, recipe=recipe, places=None)
            started, measure = self._setup.started, self._setup.sweep.measure
            return Order(folder, loaded, measure, started.date, started.threads, began), self._prepare

        return Job(key.name, self._setup.needed_bytes[key.arm], work, arguments)

    def _watch(self, names: tuple[str, ...], is_search: bool) -> str:
        """Stop what is hopeless. Returns how far the others have come."""
        words = []
        for name in names:
            tail = self._tails[name]
            if tail.refresh() and is_search and name not in self._stopped:
                step = self._hopeless_at(self._keys[name], tail.losses, tail.total_steps)
                if step is not None:
                    self._stopped[name] = step
                    self._pool.stop(name)
            words.append(f"{name}, step {tail.step} of {tail.total_steps}" if tail.total_steps else name)
        return "; ".join(words)

    def _end(self, ended: Ended, is_search: bool) -> None:
        key = self._keys[ended.name]
        folder, tail = self._folder.run(key.name), self._tails[key.name]
        tail.refresh()
        outcome = read_outcome(folder)
        if is_search:
            # What stopped it counts, whatever others have shown since. It may also have been too quick to stop.
            step = self._stopped.get(key.name, self._hopeless_at(key, tail.losses, tail.total_steps))
            if step is not None:
                outcome = self._pruned(key, step, tail.losses[step], time.time() - self._began[key.name])
        if outcome is None:
            raise TrainingError(
                f"the run {key.name} failed: {_last_words(folder / LOG, ended.exit_code)}",
                hint=f"{folder / LOG} has its output; the same command goes on with the sweep",
            )
        self._num_done += 1
        self._note(key, outcome, is_search)
        _say(self._console, f"[{self._num_done}/{self._num_all}] {self._words(key, outcome)}")

    def _pruned(self, key: RunKey, step: int, loss: float, seconds: float) -> Outcome:
        """Write that the run was given up at that step, with that loss, after so many seconds."""
        assert self._setup.sweep.prune is not None
        share, folder = self._setup.sweep.prune.percentile, self._folder.run(key.name)
        note = f"loss {loss:.4f} at step {step}: not among the best {share:g}% there"
        run = Run(folder / RUN)
        pruned = outcome_of(run, "pruned", until=step, process_seconds=seconds, note=note)
        write_outcome(pruned, folder)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # saved when it was stopped
        return pruned

    def _hopeless_at(self, key: RunKey, losses: dict[int, float], total_steps: int) -> int | None:
        """The step at which the pruner gives the run up. The control never is, and its runs end first.

        Every evaluation is asked for, in order, so that it does not matter when this process saw it.
        """
        control = [one for one in self._setup.search if one.arm == self._setup.sweep.control]
        if self._pruner is None or key in control or any(one not in self.outcomes for one in control):
            return None
        seen: dict[int, float] = {}
        for step in sorted(losses):
            seen[step] = losses[step]
            if step < total_steps and self._pruner.is_hopeless(seen, total_steps):
                return step
        return None

    def _note(self, key: RunKey, outcome: Outcome, is_search: bool) -> None:
        """Take the outcome.

        Raises:
            SweepError: its held-out rows are not those of another run with its seed.
        """
        for other, known in self.outcomes.items():
            if other.seed == key.seed and outcome.rows is not None and known.rows is not None:
                if known.rows.fingerprint == outcome.rows.fingerprint:
                    break
                raise SweepError(
                    f"the held-out rows of {key.name} are not those of {other.name}: the data has changed",
                    hint=f"bring the data files back that the sweep was started with, remove "
                    f"{self._folder.run(key.name)} or {self._folder.run(other.name)}, whichever was made with "
                    "other data, and start the sweep again",
                )
        self.outcomes[key] = outcome
        if is_search and self._pruner:
            self._pruner.ended(key.name, key.arm, key.learning_rate, key.seed, outcome)

    def _words(self, key: RunKey, outcome: Outcome) -> str:
        what = f"{key.arm}  lr {key.learning_rate:g}  seed {key.seed}: "
        if outcome.rows is None:
            return what + f"{outcome.status} ({outcome.note})"
        measure = self._setup.sweep.measure
        figures = [
            f"{name.replace('_', ' ')} {value_of(name, outcome.rows, len(measure.labels or ())):.4f}"
            for name in measure.metrics
        ]
        times = (
            f"{format_duration(outcome.seconds)} of steps, {format_duration(outcome.other_seconds)} beside them"
        )
        return what + f"{', '.join(figures)}; {times}; {format_bytes(outcome.peak_bytes or 0)}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _last_words(log: Path, exit_code: int) -> str:
    """The error that ends a run's log, else how its process ended."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = text.rpartition("\nerror: ")[2] if "\nerror: " in text else text.rpartition("error: ")[2]
    if exit_code == 1 and "error: " in text:
        return found.strip()
    return f"its process ended with {'signal' if exit_code < 0 else 'code'} {abs(exit_code)}"
