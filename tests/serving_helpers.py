"""Adapters, engines and servers for the tests of `qhybrid generate` and `qhybrid serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import openai
import torch
from helpers import THREE_BANDS, randomize_adapters, tiny_layout
from transformers import AutoTokenizer

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.base.load import load_base
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.serving.batcher import Batcher
from qhybrid.serving.engine import Engine
from qhybrid.serving.load import BaseChoice, load_engine
from qhybrid.serving.openai_api import ApiLimits, create_app
from qhybrid.serving.server import Server, bind, url_of

_SCRIPT = Path(__file__).parent.parent / "scripts" / "load_test.py"
_spec = importlib.util.spec_from_file_location("load_test_script", _SCRIPT)
load_test = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # where dataclasses look for it
_spec.loader.exec_module(load_test)


def make_engine(folders: Sequence[Path], **choice) -> Engine:
    """The adapters in `folders`, under the folders' names."""
    return load_engine([(folder.name, folder) for folder in folders], BaseChoice(**choice))


@contextlib.contextmanager
def running_server(
    engine: Engine,
    *,
    max_batch: int = 8,
    wait_seconds: float = 0.02,
    max_queue: int = 64,
    max_tokens: int = 64,
    timeout_seconds: float = 60.0,
    body_bytes: int = 2**16,
    api_key: str | None = None,
) -> Iterator[tuple[str, Batcher]]:
    """A server in a thread of this process: its address, and its batcher."""
    batcher = Batcher(engine, max_batch=max_batch, wait_seconds=wait_seconds, max_queue=max_queue)
    limits = ApiLimits(max_tokens=max_tokens, timeout_seconds=timeout_seconds, body_bytes=body_bytes)
    ready = threading.Event()
    server = Server(create_app(engine, batcher, limits, api_key=api_key), timeout_seconds, ready.set)
    with bind("127.0.0.1", 0) as bound:
        url = url_of(bound)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield url, batcher
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def client_of(url: str, api_key: str = "none") -> openai.OpenAI:
    """A client that does not try again by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=60)


def wait_until(condition, seconds: float = 20.0) -> None:
    """Return as soon as `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def info_of(base: Path, **changes) -> AdapterInfo:
    info = AdapterInfo(str(base), None, "none", True, "float32", "float32", "sdpa", date="2026-01-01")
    return replace(info, **changes)


def save_banded(base: Path, folder: Path, seed: int, bands=THREE_BANDS, **changes) -> Path:
    """A trained adapter of several bands, with its tokenizer."""
    info = info_of(base, **changes)
    section = ModelSection.model_validate({"path": str(base), "dtype": info.dtype})
    nf4 = QuantizationSection.model_validate({"method": info.quantization})
    tokenizer = AutoTokenizer.from_pretrained(base)
    layout = tiny_layout(bands, vocab_size=len(tokenizer))
    model = attach(load_base(section, nf4), layout, dtype=getattr(torch, info.adapter_dtype))
    randomize_adapters(model, seed, scale=0.3)
    save_adapter(model, layout, info, folder)
    tokenizer.save_pretrained(folder)
    return folder
