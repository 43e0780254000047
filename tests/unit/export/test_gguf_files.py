"""What is in our GGUF files, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from helpers import TINY, build_tokenizer, tiny_folder
from safetensors.torch import load_file, save_file

from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError, ExportError, ModelError
from qhybrid.export.gguf.adapter import write_gguf_adapter
from qhybrid.export.gguf.model import require_known_to_llama_cpp, write_gguf_model
from qhybrid.export.gguf.names import GgufNames

INFO = AdapterInfo("base", None, "none", True, "float32", "float32", "sdpa")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def adapter_of(*modules: PlainModule, base_minus: str | None = None) -> PlainAdapter:
    return PlainAdapter(modules, INFO, Path("somewhere"), base_minus)


def module(name: str = Q, rank: int = 2, out: int = 64, **changes) -> PlainModule:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 64, generator=generator), torch.randn(out, rank, generator=generator)
    return PlainModule(name, a, b, **{"scaling": 1.5, **changes})


def fields_of(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(("dtype", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32)])
def test_matrices_have_the_dtype_and_norms_are_fp32(folder, tmp_path, dtype, file_type):
    file = tmp_path / "out.gguf"
    assert write_gguf_model(folder, file, dtype=dtype) == []
    reader = gguf.GGUFReader(file)
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2} == {dtype.upper()}
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 1} == {"F32"}
    assert fields_of(file)["general.file_type"] == file_type
    weights = load_file(folder / "model.safetensors")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    value = weights["model.layers.1.mlp.up_proj.weight"]
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    # The reader gives bfloat16 as bytes.
    got = torch.from_numpy(stored["blk.1.ffn_up.weight"].copy()).view(kinds[dtype])
    torch.testing.assert_close(got, value.to(kinds[dtype]), rtol=0, atol=0)
    assert len(reader.tensors) == len(weights)


def test_no_path_of_this_machine_gets_into_the_file(folder, tmp_path):
    change_config(folder, _name_or_path=str(tmp_path / "secret"))
    file = tmp_path / "out.gguf"
    write_gguf_model(folder, file, dtype="f16")
    assert str(tmp_path).encode() not in file.read_bytes()
    assert fields_of(file)["general.name"] == "out"
    write_gguf_model(folder, file, dtype="f16", name="Mine")
    assert fields_of(file)["general.name"] == "Mine"
    write_gguf_model(folder, file, dtype="f16", name="my-phi3-like")  # a word that llama.cpp acts upon
    assert "general.name" not in fields_of(file)


def test_the_rows_of_queries_and_keys_are_paired_as_llama_cpp_rotates_them():
    names = GgufNames({**TINY})
    rows = torch.arange(64).reshape(64, 1)
    one_head = [half * 8 + pair for pair in range(8) for half in range(2)]
    expected = torch.tensor([head * 16 + row for head in range(4) for row in one_head]).reshape(64, 1)
    assert torch.equal(names.reordered(f"{Q}.weight", rows), expected)
    assert torch.equal(names.reordered(f"{Q}.bias", rows[:, 0]), expected[:, 0])
    assert torch.equal(names.reordered("model.layers.0.self_attn.v_proj.weight", rows), rows)
    qwen = GgufNames({**TINY, "model_type": "qwen2"})
    assert torch.equal(qwen.reordered(f"{Q}.weight", rows), rows)


def test_an_adapters_products_times_alpha_by_rank_are_its_changes(tmp_path):
    small, large = module(rank=2), module("model.layers.3.mlp.down_proj", rank=5, scaling=0.3)
    large = PlainModule(large.module, torch.randn(5, 96), large.b, large.scaling)
    file = tmp_path / "adapter.gguf"
    write_gguf_adapter(adapter_of(small, large), TINY, file)
    fields = fields_of(file)
    assert (fields["general.type"], fields["general.architecture"]) == ("adapter", "llama")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 5.0)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
    names = GgufNames({**TINY})
    for plain, target in ((small, "blk.0.attn_q"), (large, "blk.3.ffn_down")):
        a, b = stored[f"{target}.weight.lora_a"], stored[f"{target}.weight.lora_b"]
        change = 5.0 / a.shape[0] * (b @ a)
        torch.testing.assert_close(change, names.reordered(plain.module, plain.delta()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (adapter_of(module(magnitude=torch.ones(64))), ["DoRA", "--onto 16bit", "--dora-to-lora"]),
        (adapter_of(module(), base_minus="pissa"), ["PiSSA"]),
        (adapter_of(), ["no module"]),
        (adapter_of(module("model.layers.0.self_attn.other_proj")), ["other_proj", "another base"]),
        (adapter_of(module("model.layers.9.self_attn.q_proj")), ["model.layers.9"]),
        (adapter_of(module("lm_head")), ["lm_head", "merge"]),
    ],
)
def test_adapters_that_llama_cpp_cannot_apply_are_refused(adapter, words, tmp_path):
    with pytest.raises(AdapterError) as caught:
        write_gguf_adapter(adapter, TINY, tmp_path / "adapter.gguf")
    assert all(word in str(caught.value) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_16_bits_are_refused_and_leave_no_file(folder, tmp_path):
    large = PlainModule(Q, torch.ones(1, 64), torch.full((64, 1), 1e5), 1.0)
    with pytest.raises(ExportError, match="16-bit"):
        write_gguf_adapter(adapter_of(large), TINY, tmp_path / "adapter.gguf", dtype="f16")
    write_gguf_adapter(adapter_of(large), TINY, tmp_path / "adapter.gguf")
    change_weights(folder, **{f"{Q}.weight": torch.full((64, 64), 1e5)})
    with pytest.raises(ExportError, match="bf16 or f32"):
        write_gguf_model(folder, tmp_path / "model.gguf", dtype="f16")
    change_weights(folder, **{f"{Q}.weight": torch.full((64, 64), float("nan"))})
    with pytest.raises(ExportError, match="not finite"):
        write_gguf_model(folder, tmp_path / "model.gguf", dtype="f32")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter.gguf", "model"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "phi3"}, "phi3"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 64, "beta_fast": 8,
                }
            },
            "beta_fast",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "window",
        ),
        (
            {
                "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16,
                "tie_word_embeddings": True,
            },
            "scale",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1] * 6}, "fourth"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused_with_the_way_out(folder, tmp_path, changes, word):
    change_config(folder, **changes)
    with pytest.raises(ExportError, match=word) as caught:
        write_gguf_model(folder, tmp_path / "out.gguf")
    assert "convert_hf_to_gguf.py" in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(ExportError, match=word):  # before the weights are there, too
        require_known_to_llama_cpp(json.loads((folder / "config.json").read_text()), build_tokenizer(), folder)


def test_mistrals_window_is_told_of(folder, tmp_path):
    change_config(folder, model_type="mistral", sliding_window=32)
    [note] = write_gguf_model(folder, tmp_path / "out.gguf")
    assert "32 tokens" in note


@pytest.mark.parametrize(
    "changes",
    [
        {"model.layers.4.mlp.up_proj.weight": None},
        {"lm_head.weight": None},
        {"model.norm.weight": None},
        {"model.layers.0.extra.weight": torch.ones(2)},
        {"model.embed_tokens.weight": torch.ones(7, 64)},
    ],
    ids=str,
)
def test_weights_that_are_not_the_models_are_refused(folder, tmp_path, changes):
    change_weights(folder, **changes)
    with pytest.raises(ModelError):
        write_gguf_model(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tied_output_is_written_once(tmp_path):
    folder = tiny_folder(tmp_path / "model", tie_word_embeddings=True)
    write_gguf_model(folder, tmp_path / "out.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names
    weights = load_file(folder / "model.safetensors")
    change_weights(folder, **{"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    write_gguf_model(folder, tmp_path / "out.gguf")
    assert {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == names


def test_shards_are_read_one_after_the_other(folder, tmp_path):
    write_gguf_model(folder, tmp_path / "one.gguf", name="x")
    tensors = load_file(folder / "model.safetensors")
    parts = {"a.safetensors": dict(list(tensors.items())[::2]), "b.safetensors": dict(list(tensors.items())[1::2])}
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = []
    write_gguf_model(
        folder, tmp_path / "two.gguf", name="x", progress=lambda done, total: seen.append((done, total))
    )
    one, two = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("one.gguf", "two.gguf")
    )
    assert one == two
    assert seen == [(count, len(tensors)) for count in range(1, len(tensors) + 1)]


def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["more", "and more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ExportError, match="embeddings"):
        write_gguf_model(folder, tmp_path / "out.gguf")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ExportError, match="embeddings"):
        require_known_to_llama_cpp(config, tokenizer, folder)
    require_known_to_llama_cpp(config, build_tokenizer(), folder)
