"""Answers to held-out rows before and after training: by the base model alone, and with the adapter.

They are kept in RUN/samples.json, so that a later report needs no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from qhybrid.architecture.layout import first_fault
from qhybrid.disk import write_atomically
from qhybrid.errors import DataError, RunFolderError
from qhybrid.recipe.load import parse_recipe
from qhybrid.recipe.tasks import FOLDER
from qhybrid.report.page import Answers, Block, Note, Section
from qhybrid.report.records import Record
from qhybrid.report.run_facts import RunFacts, read_plain_text
from qhybrid.training.run import Run

_FORMAT_VERSION = 1
_BATCH = 8  # answers at a time
_HOW = "`qhybrid report RUN --samples 4` lets the base model and the adapter answer four held-out rows."


class Sample(Record):
    """One held-out row and its answers; what is cut off reached the limit of tokens."""

    prompt: str
    expected: str
    base: str
    adapter: str
    base_is_cut_off: bool
    adapter_is_cut_off: bool


class Samples(Record):
    """samples.json."""

    format_version: int
    adapter_sha256: str  # of the adapter's tensors: they answer for no other
    max_new_tokens: int
    samples: list[Sample]


def require_adapter(run: Run) -> None:
    """Refuse a run that has nothing to answer with.

    Raises:
        RunFolderError: it has no adapter.
    """
    if not run.adapter.is_dir():
        tasks = sorted(file.parent for file in run.folder.glob(f"{FOLDER}/*/run.json"))
        if tasks:
            raise RunFolderError(
                f"the run in {run.folder} has an adapter for each task", hint=f"name one: {tasks[0]}"
            )
        raise RunFolderError(
            f"the run in {run.folder} has not finished: it has no adapter that could answer",
            hint="leave --samples out",
        )


def make_samples(
    run: Run, number: int, max_new_tokens: int, tell: Callable[[str], None] = lambda text: None
) -> None:
    """Let the base model and the adapter answer `number` held-out rows greedily, and write samples.json.

    The rows are spread evenly over those that the run evaluated on. Both get the very tokens of the prompt that
    training had, and share one base model in memory.

    Args:
        tell: is told how far it is.

    Raises:
        RunFolderError: the run has not finished, or its data has changed since.
        DataError: it has no held-out rows with a prompt.
        AdapterError, ModelError: the adapter or its base model cannot be loaded.
    """
    require_adapter(run)
    status = run.status or {}
    from qhybrid.base.tokenizer import load_tokenizer
    from qhybrid.data.prepare import prepare_data
    from qhybrid.serving.generate import answer_all
    from qhybrid.serving.load import BaseChoice, load_engine

    tell("reading the data")
    recipe, _ = parse_recipe(run.recipe_file.read_text(encoding="utf-8"), str(run.recipe_file))
    data = prepare_data(recipe, load_tokenizer(recipe.model), base_folder=run.folder, date=status.get("date"))
    if status.get("data_fingerprint") not in (None, data.fingerprint):
        raise RunFolderError(
            f"the data of the run in {run.folder} has changed since it was trained",
            hint="bring the old files back: rows that are held out now may have been trained on",
        )
    prompts = _prompts(data.eval, number)
    tell("loading the model")
    engine = load_engine([("adapter", run.adapter)], BaseChoice())
    tokenizer = engine.models["adapter"].prompter.tokenizer
    rows, texts = [], {}
    for name in ("adapter", engine.base):
        served = engine.models[name]
        for prompt, _ in prompts:
            room = served.max_context - len(prompt)
            completion = served.completion(prompt, max_tokens=max(1, min(max_new_tokens, room)))
            rows.append(completion)
            texts[completion] = ""

    def collect(row: Any, text: str) -> None:
        texts[row] += text
        tell(f"answering: {sum(each.finish_reason is not None for each in rows)} of {len(rows)}")

    answer_all(engine, rows, _BATCH, collect)
    samples = [
        Sample(
            prompt=tokenizer.decode(prompt),
            expected=tokenizer.decode(expected, skip_special_tokens=True),
            base=texts[base],
            adapter=texts[adapter],
            base_is_cut_off=base.finish_reason == "length",
            adapter_is_cut_off=adapter.finish_reason == "length",
        )
        for (prompt, expected), adapter, base in zip(
            prompts, rows[: len(prompts)], rows[len(prompts) :], strict=True
        )
    ]
    content = Samples(
        format_version=_FORMAT_VERSION,
        adapter_sha256=_sha256(run),
        max_new_tokens=max_new_tokens,
        samples=samples,
    )
    write_atomically(run.samples_file, json.dumps(content.model_dump(), ensure_ascii=False, indent=2) + "\n")


def _prompts(rows: Any, number: int) -> list[tuple[list[int], list[int]]]:
    """The tokens of prompts and of the answers that are expected, from rows with "input_ids" and "labels"."""
    from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
    from qhybrid.evaluation.evaluate import answer_start

    found = []
    if rows is not None:
        columns = rows.with_format("numpy")
        found = [EncodedRow(row["input_ids"], row["labels"]) for row in columns]
        found = [row for row in found if answer_start(row) > 1]
    if not found:
        raise DataError(
            "the run has no held-out rows with a prompt to answer",
            hint="samples need data.eval_sources or data.eval_fraction",
        )
    chosen = [found[i * len(found) // number] for i in range(number)] if number < len(found) else found
    pairs = []
    for row in chosen:
        start = answer_start(row)
        expected = [token for token in row.labels[start:].tolist() if token != IGNORED_LABEL]
        pairs.append((row.input_ids[:start].tolist(), expected))
    return pairs


def _sha256(run: Run) -> str:
    from qhybrid.adapters.folder import WEIGHTS

    with (run.adapter / WEIGHTS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def samples_section(facts: RunFacts) -> Section | None:
    """The samples that were kept, or how to get some; None for a run of several tasks, which have their own."""
    if facts.tasks:
        return None
    title = "Before and after"
    samples, problem = _read(facts.run)
    if samples is None or not samples.samples:
        blocks: list[Block] = [Note(problem, "warning")] if problem else []
        return Section("samples", title, f"There are no samples yet. {_HOW}", blocks)
    return Section("samples", title, _words(samples), [_shown(i, s) for i, s in enumerate(samples.samples, 1)])


def _read(run: Run) -> tuple[Samples | None, str | None]:
    """samples.json, and what is wrong with it."""
    try:
        samples = Samples.model_validate_json(read_plain_text(run.samples_file))
        if samples.adapter_sha256 != _sha256(run):
            return None, "samples.json belongs to an earlier adapter, and is left out."
        return samples, None
    except FileNotFoundError:
        return None, None
    except ValidationError as error:
        return None, f"samples.json is not as qhybrid writes it: {first_fault(error)}."
    except (OSError, ValueError) as error:
        return None, f"samples.json cannot be read: {getattr(error, 'strerror', None) or error}."


def _words(samples: Samples) -> str:
    number = len(samples.samples)
    exact = {
        name: sum(_is_exact(getattr(sample, name), sample) for sample in samples.samples)
        for name in ("base", "adapter")
    }
    cut = sum(sample.base_is_cut_off or sample.adapter_is_cut_off for sample in samples.samples)
    text = (
        f"{number} held-out row{'s' * (number != 1)}, answered greedily. The base model alone gave the expected "
        f"text in {exact['base']} of {number}, with the adapter it came in {exact['adapter']} of {number}. So few "
        "rows show what has changed, not how much: `qhybrid eval` measures that."
    )
    return text + (f" Answers were cut off at {samples.max_new_tokens} tokens." if cut else "")


def _is_exact(text: str, sample: Sample) -> bool:
    return text.strip() == sample.expected.strip()


def _shown(number: int, sample: Sample) -> Answers:
    def answer(title: str, text: str, is_cut_off: bool) -> tuple[str, str, str]:
        verdict = "right" if _is_exact(text, sample) else "wrong"
        return title, text + (" …" if is_cut_off else "") or "(nothing)", verdict

    return Answers(
        f"Row {number}",
        sample.prompt,
        (
            answer("base model alone", sample.base, sample.base_is_cut_off),
            answer("with the adapter", sample.adapter, sample.adapter_is_cut_off),
            ("expected", sample.expected, ""),
        ),
    )
