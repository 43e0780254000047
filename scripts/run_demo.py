#!/usr/bin/env python
"""The demo: score a real model, fine-tune it, score it again, and show what changed.

Runs the same commands that a user would: `qhybrid eval`, `qhybrid sft demo`, `qhybrid eval`. The evaluation rows
share no sentence form, name, item or city with the training rows (scripts/make_demo_data.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qhybrid.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
EVAL_FILE = ROOT / "recipes" / "data" / "orders_eval.jsonl"
QHYBRID = [sys.executable, "-m", "qhybrid.cli.main"]


def score(folder: Path, name: str, *model: str) -> tuple[dict, list[dict]]:
    """Figures and answers of `qhybrid eval`."""
    predictions = folder / f"{name}.jsonl"
    command = [*QHYBRID, "eval", str(EVAL_FILE), *model, "--batch-size", "60", "--max-new-tokens", "56"]
    result = subprocess.run(
        [*command, "--predictions", str(predictions), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout), [json.loads(line) for line in predictions.read_text().splitlines()]


def right_fields(answer: dict) -> float:
    """The share of fields with the right value, if the answer is JSON at all, however it is laid out."""
    try:
        generated = json.loads(answer["generated"].strip().removeprefix("```json").strip("`\n "))
    except ValueError:
        return 0.0
    expected = json.loads(answer["expected"])
    if not isinstance(generated, dict):
        return 0.0
    return sum(generated.get(key) == value for key, value in expected.items()) / len(expected)


def main() -> None:
    console = Console()
    overrides = sys.argv[1:]
    recipe = load_recipe("demo", overrides).recipe
    first, number = recipe.output_dir, 1
    while Path(recipe.output_dir).exists():  # an earlier demo is kept
        number += 1
        overrides = [*sys.argv[1:], f"output_dir={first}-{number}"]
        recipe = load_recipe("demo", overrides).recipe
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        console.rule("1 of 3: the model as it comes")
        before, answers_before = score(folder, "before", "--model", recipe.model.path)
        console.print(f"exact match {before['exact_match']:.1%}, loss {before['loss']:.3f}")
        console.rule("2 of 3: fine-tuning")
        subprocess.run([*QHYBRID, "sft", "demo", *overrides], check=True)
        console.rule("3 of 3: the model with its adapter")
        after, answers_after = score(folder, "after", "--adapter", recipe.output_dir)

    table = Table(title=f"{before['rows']} held-out orders, none seen in training")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    fields = [sum(map(right_fields, answers)) / len(answers) for answers in (answers_before, answers_after)]
    table.add_row("exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}")
    table.add_row("right fields, any layout", f"{fields[0]:.1%}", f"{fields[1]:.1%}")
    table.add_row("loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
    table.add_row("perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")
    console.print(table)
    asked = answers_after[0]["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0].splitlines()[-1]
    console.print("\nOne of them:", asked, markup=False, highlight=False, soft_wrap=True)
    console.print(
        "before:", answers_before[0]["generated"].strip()[:200], markup=False, highlight=False, soft_wrap=True
    )
    console.print(
        "after: ", answers_after[0]["generated"].strip()[:200], markup=False, highlight=False, soft_wrap=True
    )
    console.print(
        f"\n{(time.perf_counter() - began) / 60:.1f} minutes; the run is in {recipe.output_dir}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
