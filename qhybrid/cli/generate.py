"""`qhybrid generate`: answers of a model or of adapters, on the terminal or as JSON lines."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qhybrid.cli.serve import base_options
from qhybrid.errors import DataError, QhybridError, ServingError

if TYPE_CHECKING:
    from qhybrid.serving.decode import Completion
    from qhybrid.serving.engine import Engine, ServedModel
    from qhybrid.serving.sampling import Sampling


@click.command("generate")
@click.argument("prompt", required=False)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]ADAPTER",
    help="A run folder or an adapter folder. Several answer the same prompt, or each its lines of --file.",
)  # fmt: skip
@base_options
@click.option(
    "--file", type=click.Path(),
    help='JSON lines of {"prompt": …} or {"messages": …}, with "adapter": NAME where it is not the first; the '
    "answers are printed as JSON lines.",
)  # fmt: skip
@click.option("--chat", is_flag=True, help="A conversation, with a line of standard input for each turn.")
@click.option("--raw", is_flag=True, help="Take prompts as plain text, without the chat template.")
@click.option("--system", help="The system message, in the place of the one from training.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0: the likeliest tokens."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Equal seeds draw equal answers.")
@click.option("--stop", multiple=True, help="A text at which an answer ends.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Of --file.")
def command(
    prompt: str | None,
    adapters: tuple[str, ...],
    base: str | None,
    quantization: str | None,
    dtype: str | None,
    attn_implementation: str | None,
    max_context: int | None,
    other_base: bool,
    file: str | None,
    chat: bool,
    raw: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    batch_size: int,
) -> None:
    """Answer PROMPT, or standard input where PROMPT is "-", with a base model or an adapter.

    PROMPT is what a user says; the chat template that training used is put around it.
    """
    if sum((prompt is not None, file is not None, chat)) != 1:
        raise DataError("give a PROMPT, --file or --chat, and only one of them", hint='qhybrid generate "Hello"')
    if raw and (chat or system is not None):
        raise DataError("--raw has no conversation", hint=f"leave {'--chat' if chat else '--system'} out")
    if not temperature and (seed is not None or top_k or top_p < 1):
        raise DataError(
            "--seed, --top-p and --top-k have no effect without --temperature", hint="set one, such as 0.7"
        )
    if chat and len(adapters) > 1:
        raise ServingError("a conversation is with one adapter", hint="give one --adapter")
    from qhybrid.serving.names import named_adapters

    named = named_adapters(adapters)
    if not named and not base:
        raise ServingError("nothing to answer with", hint="give --adapter, or --base for a model by itself")
    lines = _read_lines(Path(file)) if file is not None else []
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not text: {error}") from None

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from qhybrid.serving.load import BaseChoice, load_engine
    from qhybrid.serving.sampling import Sampling

    console = Console(stderr=True)
    with console.status("loading"):
        choice = BaseChoice(base, quantization, dtype, attn_implementation, max_context, other_base)
        engine = load_engine(named, choice)
    for note in engine.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    answers = _Answers(engine, Sampling(temperature, top_p, top_k, seed), stop, max_new_tokens, raw, system)
    if file is not None:
        _answer_file(answers, lines, batch_size)
    elif chat:
        _converse(answers)
    else:
        assert prompt is not None
        _answer_prompt(answers, prompt, [name for name, _ in named] or [engine.base])


class _Answers:
    """The engine, with what all answers of this command share."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        stop: tuple[str, ...],
        max_new_tokens: int,
        raw: bool,
        system: str | None,
    ) -> None:
        self.engine = engine
        self._sampling, self._stop, self._max_new_tokens = sampling, stop, max_new_tokens
        self._raw, self._system = raw, system

    @property
    def first(self) -> ServedModel:
        """What answers where nothing else is asked for."""
        return next(iter(self.engine.models.values()))

    def completion(self, served: ServedModel, asked: str | list[Any]) -> Completion:
        """An answer to text or messages, not begun yet.

        Raises:
            DataError: as `ServedModel.completion` and `Prompter`.
        """
        if isinstance(asked, str) and self._raw:
            ids = served.prompter.text(asked)
        else:
            ids = served.prompter.chat(self._messages(asked))
        room = max(1, served.max_context - len(ids))
        return served.completion(
            ids, max_tokens=min(self._max_new_tokens, room), sampling=self._sampling, stop=self._stop
        )

    def _messages(self, asked: str | list[Any]) -> list[Any]:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        return messages


def _answer_prompt(answers: _Answers, prompt: str, names: list[str]) -> None:
    """One answer as it comes; several one after the other, each under its name."""
    from qhybrid.serving.generate import answer_all

    completions = [answers.completion(answers.engine.models[name], prompt) for name in names]
    if len(completions) == 1:
        answer_all(answers.engine, completions, 1, lambda _, text: click.echo(text, nl=False))
        click.echo()
    else:
        texts = dict.fromkeys(completions, "")

        def tell(row: Completion, text: str) -> None:
            texts[row] += text

        answer_all(answers.engine, completions, len(completions), tell)
        for name, row in zip(names, completions, strict=True):
            click.echo(f"[{name}]\n{texts[row]}")
    _note_cut_off(completions)


def _converse(answers: _Answers) -> None:
    """Turns until the end of standard input; an empty line is no turn, and one without an answer is forgotten."""
    from qhybrid.serving.generate import answer_all

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    messages: list[dict[str, str]] = []
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        pieces: list[str] = []

        def tell(_: Completion, text: str, pieces: list[str] = pieces) -> None:
            pieces.append(text)
            click.echo(text, nl=False)

        try:
            completion = answers.completion(answers.first, messages)
            answer_all(answers.engine, [completion], 1, tell)
        except QhybridError as error:
            click.echo("\n" if pieces else "", nl=False)
            click.echo(f"error: {error}", err=True)
            messages.pop()
            continue
        click.echo()
        _note_cut_off([completion])
        messages.append({"role": "assistant", "content": "".join(pieces) or "…"})  # templates want some words


def _answer_file(answers: _Answers, lines: dict[str, dict[str, Any]], batch_size: int) -> None:
    """A line of JSON for each line of the file, in its order, as soon as it and those before it are finished."""
    from qhybrid.serving.generate import answer_all

    completions = []
    for where, line in lines.items():
        served = answers.engine.models.get(line.get("adapter", answers.first.name))
        if served is None:
            known = ", ".join(answers.engine.models)
            raise DataError(f"there is no adapter {line['adapter'][:80]!r}; there are {known}", where=where)
        try:
            completions.append(
                answers.completion(
                    served, line["prompt"] if isinstance(line.get("prompt"), str) else line["messages"]
                )
            )
        except DataError as error:
            raise DataError(error.message, hint=error.hint, where=where) from None
    texts = dict.fromkeys(completions, "")
    left = list(zip(completions, lines.values(), strict=True))
    finished: set[Completion] = set()

    def tell(row: Completion, text: str) -> None:
        texts[row] += text
        if row.finish_reason is not None:
            finished.add(row)
        while left and left[0][0] in finished:
            done, line = left.pop(0)
            asked = {key: line[key] for key in ("prompt", "messages", "adapter") if key in line}
            result = {"generated": texts[done], "finish_reason": done.finish_reason, "tokens": done.num_tokens}
            click.echo(json.dumps({**asked, **result}, ensure_ascii=False))

    answer_all(answers.engine, completions, batch_size, tell)
    _note_cut_off(completions)


def _note_cut_off(completions: list[Completion]) -> None:
    num_cut = sum(row.finish_reason == "length" for row in completions)
    if num_cut:
        which = "the answer was" if len(completions) == 1 else f"{num_cut} of {len(completions)} answers were"
        click.echo(f"note: {which} cut off (--max-new-tokens)", err=True)


def _read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of prompts by their places ("prompts.jsonl:3"), without the blank ones.

    Raises:
        DataError: it cannot be read, or a line is not of the form that it must have.
    """
    try:
        written = file.read_text(encoding="utf-8").split("\n")  # other ends of lines may stand in JSON's texts
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(file)) from None
    lines = {f"{file}:{number}": text for number, text in enumerate(written, 1) if text.strip()}
    if not lines:
        raise DataError("it holds no prompts", where=str(file))
    return {where: _read_line(text, where) for where, text in lines.items()}


def _read_line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            "it has half of a surrogate pair (\\ud800 to \\udfff), which is no text", where=where
        ) from None
    except (ValueError, RecursionError):
        raise DataError("invalid JSON", where=where) from None
    if not isinstance(line, dict) or isinstance(line.get("prompt"), str) == isinstance(line.get("messages"), list):
        raise DataError('it must have a "prompt" (text) or "messages" (a list)', where=where)
    if line.get("messages") == []:
        raise DataError("there are no messages", where=where)
    if not isinstance(line.get("adapter", ""), str):
        raise DataError('"adapter" must be the name of one', where=where)
    return line
