"""Fixtures of the data tests: a small tokenizer with a chat template, recipes, and files to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qhybrid.data import PreparedData, prepare_data
from qhybrid.data.templates import CHATML
from qhybrid.recipe.schema import Recipe

SENTENCES = [
    "A cat sat on the mat, and the dog looked at it.",
    "How many apples are left? Three apples are left in the basket.",
    "Name the largest planet. Jupiter is the largest planet of them all!",
    "user assistant system question answer turn row number reply word",
    "The river runs to the sea; 0 1 2 3 4 5 6 7 8 9 10 and so on.",
]


def build_tokenizer(*, chat_template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = chat_template
    return wrapped


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
