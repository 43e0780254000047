"""A tiny base with an adapter of four kinds on it, to be merged, and what merged folders hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import build_tokenizer, randomize_adapters, tiny_folder, tiny_layout
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import read_plain, save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.base.load import load_base
from qhybrid.export.merged.bake import bake
from qhybrid.recipe.schema import ModelSection, QuantizationSection

BANDS = [
    {"band": "lora", "layers": "0", "kind": "lora", "rank": 4, "alpha": 10},
    {"band": "rslora", "layers": "1", "kind": "rslora", "rank": 6},
    {"band": "adalora", "layers": "2-3", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 6}},
    {"band": "dora", "layers": "4-5", "kind": "dora", "rank": 4},
]
SHAPE = {"intermediate_size": 128}  # whole NF4 blocks in each row, as in real models
NF4, NONE = QuantizationSection(), QuantizationSection(method="none")
TOKENS = torch.arange(3, 3 + 48).view(2, 24)


class Trained:
    """A tiny base, an adapter of four kinds on it with random values, and the model that has both."""

    def __init__(self, folder: Path, *, dtype: str = "float32", method: str = "nf4", **changes: Any) -> None:
        self.base = tiny_folder(folder / "base", getattr(torch, dtype), **{**SHAPE, **changes})
        self.section = ModelSection(path=str(self.base), dtype=dtype, adapter_dtype="float32")
        self.quantization = QuantizationSection(method=method)
        layout = tiny_layout(BANDS, **{**SHAPE, **changes})
        torch.manual_seed(0)
        self.model = attach(load_base(self.section, self.quantization), layout, dtype=torch.float32)
        randomize_adapters(self.model)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_lambda" in name:
                    parameter[::2] = 0  # pruned
        info = AdapterInfo(str(self.base), None, method, True, dtype, "float32", "sdpa", "chatml")
        self.folder = folder / "adapter"
        save_adapter(self.model, layout, info, self.folder)
        build_tokenizer().save_pretrained(self.folder)
        self.adapter = read_plain(self.folder)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model.eval()(TOKENS).logits

    def bake(self, out: Path, onto: str, **options: Any):
        """The facts, after the folder is in its place."""
        with bake(self.adapter, self.section, self.quantization, out, onto=onto, **options) as baked:
            return baked


def shards(folder: Path, size: str, **changes: Any) -> Path:
    """`folder` again as a model of several files."""
    other = folder.with_name(f"{folder.name}-shards")
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(other, max_shard_size=size)
    assert len(list(other.glob("*.safetensors"))) > 3
    return other


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
