"""Small models, recipes and data that the tests build for themselves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.data.templates import CHATML
from qhybrid.errors import RecipeError
from qhybrid.recipe.load import LoadedRecipe, parse_recipe
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


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

THREE_BANDS = [
    {"band": "low", "layers": "bottom", "kind": "lora", "rank": 4, "loraplus_lr_ratio": 4},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 6}},
    {"band": "high", "layers": "top", "kind": "dora", "rank": 4},
]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any):
    """A randomly initialised LLaMA with hidden size 64 and 6 layers, unless `changes` say otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {key: value for key, value in {**TINY, **changes}.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**config)).to(dtype).eval()


def make_recipe(**sections: Any) -> Recipe:
    """A valid recipe; sections given here replace the defaults."""
    values = {
        "model": {"path": "tiny", "dtype": "float32"},
        "adapters": THREE_BANDS,
        "data": {"sources": "rows.jsonl"},
        "output_dir": "out",
        **sections,
    }
    return parse_recipe(json.dumps(values), "test")[0]


def tiny_layout(bands: list[dict[str, Any]] | None = None, **changes: Any) -> Layout:
    """The layout of `bands` (three bands by default) on the tiny model."""
    return build_layout(make_recipe(adapters=bands or THREE_BANDS), spec_from_config({**TINY, **changes}))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as users of transformers ask for it."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def randomize_adapters(model, seed: int = 1, scale: float = 0.05) -> None:
    """Give every trained parameter a random change, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))


def tiny_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model folder as a user has it: a tiny LLaMA in safetensors form with a small chat tokenizer."""
    tokenizer = build_tokenizer()
    model = tiny_model(
        dtype=dtype, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=3, pad_token_id=0, **changes
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in alpaca form of different lengths."""
    import random

    generator = random.Random(seed)
    rows = []
    for _ in range(number):
        count = generator.randint(1, 9)
        thing = generator.choice(["apples", "rows", "cats", "numbers", "words", "rivers and planets"])
        rows.append(
            {
                "instruction": f"How many {thing} are left?" + " Name them!" * generator.randint(0, 2),
                "output": f"{count} {thing} are left" + ", and so on" * generator.randint(0, 2) + ".",
            }
        )
    return rows


def run_recipe(
    folder: Path, model_folder: Path, *, rows: int = 32, eval_rows: int = 8, **sections: Any
) -> LoadedRecipe:
    """A recipe for a quick fp32 run of the three bands on `model_folder`, its data and output below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", chat_rows(rows))
    write_rows(folder / "eval.jsonl", chat_rows(eval_rows, seed=99))
    training = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "max_length": 64,
        "seed": 0,
        **sections.pop("training", {}),
    }
    recipe = make_recipe(
        **{
            "model": {"path": str(model_folder), "dtype": "float32"},
            "data": {"sources": str(folder / "train.jsonl"), "eval_sources": str(folder / "eval.jsonl")},
            "training": training,
            "output_dir": str(folder / "run"),
            **sections,
        }
    )
    return LoadedRecipe(recipe, folder / "recipe.yaml")


GOOD_RECIPE = """\
model:
  path: org/model
adapters:
  - layers: bottom
    kind: lora+
    rank: 8
  - band: mid
    layers: 30%-70%
    kind: adalora
    rank: 8
data:
  sources: rows.jsonl
training:
  learning_rate: 2e-4
output_dir: out
"""


def recipe_error(text: str, overrides: Sequence[str] = ()) -> str:
    """The message with which `text` is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value)


def cut_back(source: Path, target: Path, step: int) -> Path:
    """Copy a finished run's folder to `target` as a crash right after checkpoint `step` would have left it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    shutil.rmtree(target / "adapter")
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    status = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    recipe = (target / "recipe.yaml").read_text()
    (target / "recipe.yaml").write_text(recipe.replace(f"output_dir: {source}", f"output_dir: {target}"))
    lines = (target / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step and '"end"' not in line]
    (target / "events.jsonl").write_text("\n".join(kept) + "\n")
    return target


def record_figure(item: int, name: str, figure: str) -> None:
    """Add a measured figure of the reliability table to the file that QHYBRID_FIGURES names, if it does."""
    file = os.environ.get("QHYBRID_FIGURES")
    if file:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"item": item, "name": name, "figure": figure}, ensure_ascii=False) + "\n")


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`qhybrid` with these arguments, in this process: the imports are most of a short command's time."""
    from qhybrid.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch.dict(os.environ, {"NO_COLOR": "1", "COLUMNS": "120", **environment}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    done = subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    return done
