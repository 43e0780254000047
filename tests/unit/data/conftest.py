"""Fixtures of the data tests: a small tokenizer with a chat template, recipes, and files to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import build_tokenizer
from transformers import PreTrainedTokenizerFast

from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.recipe.schema import Recipe


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def make_recipe():
    def make(data, **training) -> Recipe:
        if not isinstance(data, dict) or "sources" not in data:
            data = {"sources": data}
        return Recipe(
            model={"path": "tiny"}, adapters=[{"kind": "lora"}], data=data, training=training, output_dir="run"
        )

    return make


@pytest.fixture
def prepare(make_recipe, tokenizer, tmp_path):
    """`prepare(data, **training)`: prepare a data section with the small tokenizer."""

    def run(data, *, tokenizer=tokenizer, base_folder=tmp_path, **training) -> PreparedData:
        return prepare_data(make_recipe(data, **training), tokenizer, base_folder=base_folder)

    return run


@pytest.fixture
def write_jsonl(tmp_path):
    """`write_jsonl(rows, name)`: write rows (dicts, or bytes as they are) and return the file's path as text."""

    def write(rows, name: str = "rows.jsonl", folder: Path = tmp_path) -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return str(folder / name)

    return write


@pytest.fixture
def trained_text(tokenizer):
    """`trained_text(row)`: the text of the tokens of a data set's row that are trained."""

    def decode(row) -> str:
        return tokenizer.decode([label for label in row["labels"] if label != -100])

    return decode
