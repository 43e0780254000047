"""`qhybrid serve`: one base model and many adapters behind OpenAI's protocol."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qhybrid.errors import ServingError

if TYPE_CHECKING:
    from qhybrid.serving.engine import Engine

_KEY = "QHYBRID_API_KEY"

F = TypeVar("F", bound=Callable[..., Any])


def base_options(function: F) -> F:
    """The options that say what the base model is and how it is loaded."""
    for option in reversed(
        (
            click.option(
                "--base",
                "--model",
                "base",
                help="The base model: a folder, a hub id, a GGUF file or package:NAME/FILE. An adapter names its "
                "own; this says where it lies now, or what to use without adapters.",
            ),
            click.option(
                "--quantization",
                type=click.Choice(["nf4", "none"]),
                help="Of the base model; as the first adapter says, or nf4.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float16", "float32"]),
                help="Of the base model; as the first adapter says, or bfloat16.",
            ),
            click.option(
                "--attn-implementation",
                type=click.Choice(["sdpa", "eager", "flash_attention_2", "flash_attention_3"]),
                help="Of the base model; as the first adapter says, or sdpa.",
            ),
            click.option(
                "--max-context",
                type=click.IntRange(2),
                help="The most tokens of a prompt and its answer; the model's own limit, but at most 4096.",
            ),
            click.option(
                "--other-base",
                is_flag=True,
                help="Take the base as it is, though its hashes are not the adapters'.",
            ),
        )
    ):
        function = option(function)
    return function


@click.command("serve")
@click.argument("adapters", nargs=-1, metavar="[NAME=]ADAPTER...")
@base_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to serve on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Requests that are decoded together."
)
@click.option(
    "--batch-wait-ms", type=click.FloatRange(0, 60_000), default=10, show_default=True,
    help="The longest that a request waits for others to begin with, while there is room.",
)  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(1), default=64, show_default=True,
    help="Requests that may wait; further ones get HTTP 429.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="The most tokens of one answer."
)
@click.option(
    "--timeout", type=click.FloatRange(0, 86_400, min_open=True), default=120, show_default=True,
    help="Seconds from a request's arrival to its last token.",
)  # fmt: skip
def command(
    adapters: tuple[str, ...],
    base: str | None,
    quantization: str | None,
    dtype: str | None,
    attn_implementation: str | None,
    host: str,
    port: int,
    max_batch: int,
    batch_wait_ms: float,
    max_queue: int,
    max_tokens: int,
    max_context: int | None,
    other_base: bool,
    timeout: float,
) -> None:
    """Serve ADAPTERs of one base model, each under its name, and the base model under its own.

    An ADAPTER is a run folder, an adapter folder of qhybrid, or a LoRA or DoRA folder of peft. The name is the
    folder's unless given. With QHYBRID_API_KEY in the environment, clients must send that key.
    """
    from qhybrid.serving.names import named_adapters

    named = named_adapters(adapters)
    if not named and not base:
        raise ServingError("nothing to serve", hint="name an adapter (qhybrid serve runs/demo), or --base MODEL")
    key = os.environ.get(_KEY)
    if key is not None:
        key = key.strip()  # of a file it has the line's end, which no header can hold
        if not key or not key.isascii() or not key.isprintable():
            raise ServingError(
                f"{_KEY} is {'not one line of ASCII' if key else 'empty'}", hint="set a key, or unset it"
            )
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServingError(f"serving needs {error.name}", hint="pip install 'qhybrid[serve]'") from None
    from qhybrid.serving.server import bind, serve, url_of

    with bind(host, port) as bound:  # before the model, which takes longer
        from qhybrid.cli.main import quiet_libraries

        quiet_libraries()
        from rich.console import Console

        from qhybrid.serving.batcher import Batcher
        from qhybrid.serving.load import BaseChoice, load_engine
        from qhybrid.serving.openai_api import ApiLimits, create_app
        from qhybrid.units import format_bytes

        console = Console(stderr=True)
        with console.status("loading"):
            choice = BaseChoice(base, quantization, dtype, attn_implementation, max_context, other_base)
            engine = load_engine(named, choice)
        for note in engine.notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        is_local = _is_loopback(bound.getsockname()[0])
        if not is_local and key is None:
            console.print(
                f"warning: {host} can be reached from other machines, and {_KEY} is not set: whoever can connect "
                "can use the models, unencrypted",
                style="yellow", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        batcher = Batcher(engine, max_batch=max_batch, wait_seconds=batch_wait_ms / 1000, max_queue=max_queue)
        limits = ApiLimits(max_tokens=max_tokens, timeout_seconds=timeout)
        app = create_app(engine, batcher, limits, api_key=key, local_hosts_only=is_local)
        cache = format_bytes(engine.cache_bytes_per_token * engine.max_context * max_batch)
        url = url_of(bound)

        def ready() -> None:
            click.echo(f"serving on  {url}/v1  (OpenAI's protocol)")
            click.echo(f"models      {', '.join(engine.models)}")
            click.echo(
                f"at most     {max_batch} answers at a time, {engine.max_context} tokens each: {cache} of cache"
            )
            click.echo(f"try         {_example(url, engine, key is not None)}")

        serve(app, bound, timeout, ready)
    click.echo("stopped")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _example(url: str, engine: Engine, needs_key: bool) -> str:
    served = next(iter(engine.models.values()))
    place, asked = "completions", {"prompt": "Hello"}
    if served.prompter.has_chat_template:
        place, asked = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    body = json.dumps({"model": served.name, **asked})
    key = f' -H "Authorization: Bearer ${_KEY}"' if needs_key else ""
    return f"curl {url}/v1/{place} -H 'Content-Type: application/json'{key} -d '{body}'"
