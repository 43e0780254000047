"""What load_base refuses: weights that do not fit, unknown families, code of the model's own."""

import json

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file

from qhybrid.base.load import load_base
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection, QuantizationSection


def write_checkpoint(folder, shard_size="40KB"):
    tiny_model(num_hidden_layers=2).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def ours(folder):
    return load_base(ModelSection(path=str(folder)), QuantizationSection(), device="cpu")


def damage_missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def damage_unexpected(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64)


def damage_shape(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 96)


def damage_dtype(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("damage", "layer", "fault"),
    [
        (damage_missing, 1, "lacks"),
        (damage_unexpected, 2, "which the model does not have"),
        (damage_shape, 0, r"shape \[64, 96\] instead of \[96, 64\]"),
        (damage_dtype, 0, "int8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, damage, layer, fault):
    folder = write_checkpoint(tmp_path, shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=fault) as caught:
        ours(folder)
    assert f"model.layers.{layer}.mlp.up_proj.weight" in str(caught.value) and str(folder) in str(caught.value)


def test_one_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    doubled = load_file(first)
    name = next(iter(doubled))
    save_file({**load_file(second), name: doubled[name]}, second)
    with pytest.raises(ModelError, match="already given") as caught:
        ours(folder)
    assert name in str(caught.value) and str(second) in str(caught.value)


def test_a_truncated_shard_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated") as caught:
        ours(folder)
    assert str(shard) in str(caught.value)


def write_config(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_other_families_are_refused_with_the_list_of_supported_ones(tmp_path):
    with pytest.raises(ModelError, match="'mixtral', which is not supported") as caught:
        ours(write_config(tmp_path, model_type="mixtral"))
    assert "llama, mistral" in caught.value.hint
    # transformers reads a mistral configuration with layer types as one of another family.
    with pytest.raises(ModelError, match="ministral"):
        ours(write_config(tmp_path, num_hidden_layers=2, model_type="mistral", layer_types=["full_attention"] * 2))


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_in_the_model_folder_never_runs(tmp_path, model_type):
    folder = write_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}')
    (folder / "tokenizer.json").write_text("{}")
    if model_type == "llama":
        ours(folder)
    else:
        with pytest.raises(ModelError, match="auto_map"):
            ours(folder)
    with pytest.raises(ModelError):
        load_tokenizer(ModelSection(path=str(folder)))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_broken_config_is_a_model_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ours(tmp_path)


def test_other_quantised_forms_are_refused(tmp_path):
    folder = write_config(tmp_path, model_type="llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="stored quantised as 'gptq'"):
        ours(folder)
