"""`qhybrid eval`: loss, perplexity, exact match and classification by label words on a data file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.cli.columns import columns as in_columns
from qhybrid.errors import AdapterError, DataError, ModelError

if TYPE_CHECKING:
    from qhybrid.evaluation.labels import LabelScores


@click.command("eval")
@click.argument("data", type=click.Path())
@click.option("--model", help="The base model: a folder, a hub id, a GGUF file or package:NAME/FILE.")
@click.option(
    "--adapter",
    type=click.Path(),
    help="An adapter folder or a run folder. It names its base model; --model says where that lies now.",
)
@click.option(
    "--quantization", type=click.Choice(["nf4", "none"]), help="Of the base model; nf4 unless the adapter says."
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of the base model.")
@click.option(
    "--attn-implementation", type=click.Choice(["sdpa", "eager", "flash_attention_2", "flash_attention_3"]),
    help="Of the base model; sdpa unless the adapter says.",
)  # fmt: skip
@click.option("--format", "row_format", default="auto", show_default=True, help="The format of the rows.")
@click.option("--columns", multiple=True, metavar="OURS=THEIRS", help="Map a column, as in prompt=question.")
@click.option("--chat-template", help="chatml, alpaca or a .jinja file; the model's own by default.")
@click.option("--limit", type=click.IntRange(1), help="The first rows only.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--no-generation", is_flag=True, help="Loss and perplexity only.")
@click.option("--answer-after", metavar="TEXT", help="Of answers only what follows TEXT counts: '####' for GSM8K.")
@click.option(
    "--labels", metavar="A,B", help="Classify by these words, in place of generation; the first is F1's."
)
@click.option("--predictions", type=click.Path(), help="Write prompt, expected and generated text as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    data: str,
    model: str | None,
    adapter: str | None,
    quantization: str | None,
    dtype: str | None,
    attn_implementation: str | None,
    row_format: str,
    columns: tuple[str, ...],
    chat_template: str | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    no_generation: bool,
    answer_after: str | None,
    labels: str | None,
    predictions: str | None,
    as_json: bool,
) -> None:
    """Score a base model (--model) or an adapter (--adapter) on the rows of DATA.

    Loss and perplexity are over the answers' tokens. Exact match is the share of rows for which greedy
    generation gives the answer's text exactly, or with --answer-after its result. With --labels yes,no every
    answer is one of these words, and the model's choice is the one that it gives the highest probability.
    """
    source = _source(data, row_format, columns, limit)
    if not model and not adapter:
        raise ModelError("nothing to evaluate", hint="give --model or --adapter")
    if adapter and (quantization or dtype):
        raise ModelError(
            "an adapter knows its quantization and dtype", hint="leave --quantization and --dtype out"
        )
    words = _labels(labels)
    generates = not no_generation and not words
    if answer_after is not None and not generates:
        raise DataError("--answer-after has no effect without generation", hint="leave it out")
    if answer_after == "":
        raise DataError("--answer-after is empty", hint="give the text that results stand after, such as '####'")
    if predictions and words:
        raise DataError(
            "--predictions are generated answers, and --labels generates none", hint="give one of them"
        )
    if predictions and no_generation:
        raise DataError("--predictions has nothing to write with --no-generation", hint="leave one of them out")
    if predictions and Path(predictions).exists():
        raise DataError(f"{predictions} exists already", hint="choose another name; nothing was changed")
    if predictions and not Path(predictions).parent.is_dir():
        raise DataError(f"there is no folder {Path(predictions).parent} for the predictions")
    from qhybrid.data.readers import check_local_source

    check_local_source(source, Path())

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from qhybrid.adapters.info import adapter_of_run
    from qhybrid.data.prepare import prepare_file
    from qhybrid.evaluation.answers import require_answers
    from qhybrid.evaluation.evaluate import evaluate
    from qhybrid.evaluation.labels import label_rows
    from qhybrid.evaluation.models import load_adapter_for_inference, load_base_for_inference
    from qhybrid.recipe.schema import ModelSection, QuantizationSection

    console = Console(stderr=True)
    if adapter:
        folder = Path(adapter)
        if not folder.exists():
            raise AdapterError(f"there is no {folder}", hint="name an adapter folder or a run folder")
        folder = adapter_of_run(folder)
        loaded, tokenizer, info = load_adapter_for_inference(folder, model, attn_implementation)
        system_prompt, date = info.system_prompt, info.date
    else:
        given = {"path": model, "dtype": dtype, "attn_implementation": attn_implementation}
        section = ModelSection.model_validate({name: value for name, value in given.items() if value})
        nf4 = QuantizationSection.model_validate({"method": quantization or "nf4"})
        loaded, tokenizer = load_base_for_inference(section, nf4)
        system_prompt = date = None
    try:
        rows, audit = prepare_file(
            source,
            tokenizer,
            chat_template=chat_template,
            base_folder=Path(),
            system_prompt=system_prompt,
            date=date,
        )
    except DataError as error:
        raise DataError(error.message, hint=_as_options(error.hint), where=error.where) from None
    if audit.dropped:
        reasons = "\n".join(audit.reason_lines())
        console.print(f"note: {audit.dropped} of {audit.rows_in} rows cannot be used\n{reasons}", highlight=False)

    if answer_after is not None:
        require_answers(tokenizer, rows, answer_after)
    labelled = label_rows(tokenizer, rows, words) if words else None
    with console.status("scoring") as status:
        scores = evaluate(
            loaded,
            tokenizer,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens if generates else None,
            answer_after=answer_after,
            labelled=labelled,
            progress=lambda name, done: status.update(f"{name}: {done} of {len(rows)} rows"),
        )
    if predictions:
        lines = [
            {
                "prompt": a.prompt,
                "expected": a.expected,
                "generated": a.generated,
                "exact": a.is_exact,
                "cut_off": a.is_cut_off,
            }
            for a in scores.given_answers
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(predictions).write_text(text, encoding="utf-8")
    figures = {
        "rows": scores.num_rows,
        "tokens": scores.num_tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "exact_match": scores.exact_match,
        "answers": len(scores.given_answers),
        "answers_cut_off": sum(answer.is_cut_off for answer in scores.given_answers),
    }
    if scores.labels is not None:
        figures |= {
            "accuracy": scores.labels.accuracy,
            "f1": scores.labels.f1,
            "macro_f1": scores.labels.macro_f1,
            "classes": [dataclasses.asdict(one) for one in scores.labels.classes],
            "confusion": scores.labels.confusion,
        }
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(f"rows          {scores.num_rows} ({scores.num_tokens:,} scored tokens)")
    click.echo(f"loss          {scores.loss:.4f}")
    click.echo(f"perplexity    {scores.perplexity:.3f}")
    if scores.labels is not None:
        _show_labels(scores.labels)
    if scores.exact_match is not None:
        right = sum(answer.is_exact for answer in scores.given_answers)
        click.echo(f"exact match   {scores.exact_match:.1%} ({right} of {len(scores.given_answers)})")
        if figures["answers_cut_off"]:
            click.echo(
                f"note: {figures['answers_cut_off']} answers were cut off at {max_new_tokens} tokens "
                "(--max-new-tokens)",
                err=True,
            )
    elif generates:
        click.echo("exact match   not measured: the rows have no prompt")


def _labels(text: str | None) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",")) if text is not None else ()
    if text is not None and (len(words) < 2 or not all(words) or len(set(words)) < len(words)):
        raise DataError(f"--labels {text!r} does not name two or more labels", hint="for example yes,no")
    return words


def _show_labels(scores: LabelScores) -> None:
    """Accuracy, F1, and a line for every label with what its rows were taken for."""
    right = sum(one.right for one in scores.classes)
    click.echo(f"accuracy      {scores.accuracy:.1%} ({right} of {len(scores.expected)})")
    click.echo(f"F1            {scores.f1:.4f} of {scores.labels[0]!r}, macro {scores.macro_f1:.4f}")
    header = ("label", "rows", "right", "accuracy", "precision", "F1", *(f"as {label}" for label in scores.labels))
    lines = [
        (
            one.label, str(one.rows), str(one.right), f"{one.recall:.1%}", f"{one.precision:.1%}", f"{one.f1:.4f}",
            *map(str, taken),
        )
        for one, taken in zip(scores.classes, scores.confusion, strict=True)
    ]  # fmt: skip
    for line in in_columns(header, lines):
        click.echo(line)


def _as_options(hint: str | None) -> str | None:
    """A hint for a recipe, `columns: {prompt: question}`, as this command takes it."""

    def options(found: re.Match[str]) -> str:
        return " ".join(f"--columns {pair.replace(': ', '=')}" for pair in found[1].split(", "))

    return hint and re.sub(r"columns: \{([^}]*)\}", options, hint)


def _source(data: str, row_format: str, columns: tuple[str, ...], limit: int | None):
    from pydantic import ValidationError

    from qhybrid.recipe.schema import SourceSection

    pairs = {}
    for column in columns:
        ours, separator, theirs = column.partition("=")
        if not separator:
            raise DataError(
                f"--columns {column!r} is not of the form OURS=THEIRS", hint="for example prompt=question"
            )
        pairs[ours] = theirs
    try:
        return SourceSection.model_validate({"path": data, "format": row_format, "columns": pairs, "limit": limit})
    except ValidationError as error:
        if not data:
            raise DataError("the name of the data file is empty") from None
        assert error.errors()[0]["loc"] == ("format",), error
        raise DataError(
            f"--format {row_format!r} is not known",
            hint="auto, text, prompt_completion, messages, alpaca or sharegpt",
        ) from None
