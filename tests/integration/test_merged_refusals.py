"""What cannot be merged is refused with one message, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from merged_helpers import Trained, shards
from safetensors.torch import load_file, save_file

from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError, ExportError, ModelError
from qhybrid.export.merged.shard_writer import ShardWriter
from qhybrid.recipe.schema import ModelSection


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def refused(trained: Trained, tmp_path: Path, error: type[Exception], match: str, out: str = "out") -> None:
    """It is, and the folder is as before."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        trained.bake(tmp_path / out, "nf4")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def own(trained, tmp_path) -> Trained:
    """A copy, to be damaged."""
    shutil.copytree(trained.base, tmp_path / "base")
    copy = object.__new__(Trained)
    vars(copy).update(vars(trained))
    copy.base, copy.section = tmp_path / "base", ModelSection(path=str(tmp_path / "base"), dtype="float32")
    return copy


def test_modules_that_the_base_lacks(own, tmp_path):
    names = ("layers.0.mlp.up_proj", "layers.6.mlp.up_proj", "layers.7.mlp.up_proj", "norm")
    modules = [PlainModule(f"model.{name}", torch.ones(1, 64), torch.ones(128, 1), 1.0) for name in names]
    own.adapter = PlainAdapter(tuple(modules), own.adapter.info, own.folder)
    told = r"no linear module model\.layers\.6\.mlp\.up_proj, .*, model\.norm \(3 of the adapter's 4 are missing\)"
    refused(own, tmp_path, AdapterError, told)


def test_modules_of_another_shape(own, tmp_path):
    other = PlainModule("model.layers.0.mlp.up_proj", torch.ones(2, 64), torch.ones(96, 2), 1.0)
    own.adapter = PlainAdapter((other,), own.adapter.info, own.folder)
    refused(own, tmp_path, AdapterError, "up_proj is 128×64 in the base model and 96×64 in the adapter")


def test_a_shard_that_is_missing_or_cut(own, tmp_path):
    own.base = shards(own.base, "100KB")
    own.section = ModelSection(path=str(own.base), dtype="float32")
    shard = sorted(own.base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    refused(own, tmp_path, ModelError, f"{shard.name} is not a valid .safetensors file: it is truncated")
    shard.write_bytes(b"garbage!" + content)
    refused(own, tmp_path, ModelError, f"{shard.name} is not a valid .safetensors file")
    shard.unlink()
    refused(own, tmp_path, ModelError, f"lacks 1 of its .* weight files, such as {shard.name}")


def test_a_shard_that_becomes_shorter_on_the_way(own, tmp_path, monkeypatch):
    file = own.base / "model.safetensors"
    size = file.stat().st_size
    write = ShardWriter.write

    def cutting(self, values):
        if file.stat().st_size == size:
            os.truncate(file, size // 2)
        write(self, values)

    monkeypatch.setattr(ShardWriter, "write", cutting)
    refused(own, tmp_path, ModelError, "ends inside the tensor")


def test_a_tensor_that_is_missing(own, tmp_path):
    tensors = load_file(own.base / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, own.base / "model.safetensors", {"format": "pt"})
    refused(own, tmp_path, ModelError, r"lacks model\.layers\.2\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_values_that_are_not_finite(own, tmp_path, name):
    tensors = load_file(own.base / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, own.base / "model.safetensors", {"format": "pt"})
    refused(own, tmp_path, ModelError, f"{name} of the base model holds values that are not finite")


def test_places_and_names(own, tmp_path):
    (tmp_path / "taken").mkdir()
    refused(own, tmp_path, ExportError, "taken exists already", out="taken")
    for name in (".hidden", "-rf", "new\nline"):
        refused(own, tmp_path, ExportError, "is not a usable name", out=name)


def test_a_base_that_is_stored_quantised(own, tmp_path):
    file = own.base / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    refused(own, tmp_path, ModelError, "is stored quantised.*\nhint: --base names the 16-bit model")


def test_settings_that_cannot_be_read(own, tmp_path):
    (own.base / "generation_config.json").write_text("{")
    refused(own, tmp_path, ModelError, "generation_config.json: cannot be read as JSON")
