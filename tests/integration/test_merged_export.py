"""The merged model: its values against peft, float64 and the 4-bit model, and what faults leave of it."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.disk import FullDisk
from helpers import TINY, build_tokenizer, randomize_adapters, tiny_folder, tiny_layout
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qhybrid.adapters.attach import attach
from qhybrid.adapters.dora import dequantized_weight
from qhybrid.adapters.folder import read_plain, save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.peft_folder import write_peft_folder
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.errors import AdapterError, ExportError, ModelError
from qhybrid.export import merged_rows
from qhybrid.export.bake import bake, merge_in_place
from qhybrid.export.resumable import partial_of
from qhybrid.export.shard_writer import ShardWriter
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def on_nf4(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "nf4"
    trained.bake(out, "nf4")
    return out


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


# ---- values ----


def test_logits_are_those_of_the_trained_4_bit_model(trained, on_nf4):
    """LoRA, rsLoRA, AdaLoRA with pruned triplets, and DoRA: exact but for fp32's rounding."""
    merged = AutoModelForCausalLM.from_pretrained(on_nf4)
    assert merged.dtype == torch.float32
    with torch.no_grad():
        assert (merged(TOKENS).logits - trained.logits()).abs().max() <= 1e-5


def test_every_weight_is_the_dequantised_one_and_the_change(trained, on_nf4):
    merged, stored = weights_of(on_nf4), weights_of(trained.base)
    modules = {module.module: module for module in trained.adapter}
    assert merged.keys() == stored.keys() and len(modules) == 42
    base = trained.model.get_base_model()
    for name, weight in merged.items():
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            assert torch.equal(weight, stored[name])
            continue
        seen = dequantized_weight(base.get_submodule(module.module).get_base_layer())
        expected = seen.double() + module.scaling * (module.b.double() @ module.a.double())
        if module.magnitude is not None:
            expected *= (module.magnitude.double() / expected.norm(dim=1))[:, None]
        assert (weight - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_layers_without_an_adapter_are_dequantised_too(trained, tmp_path):
    adapter = PlainAdapter(trained.adapter.modules[:2], trained.adapter.info, trained.folder)
    with bake(adapter, trained.section, NF4, tmp_path / "out", onto="nf4") as baked:
        assert (baked.num_adapted, baked.num_changed, baked.changed_share) == (2, 2, 1)
    merged, untouched = weights_of(tmp_path / "out"), load_base(trained.section, NF4)
    name = "model.layers.3.mlp.down_proj"
    assert torch.equal(merged[f"{name}.weight"], dequantized_weight(untouched.get_submodule(name)))
    assert not torch.equal(merged[f"{name}.weight"], weights_of(trained.base)[f"{name}.weight"])


def test_on_an_unquantised_base_it_is_what_peft_merges(tmp_path):
    trained = Trained(tmp_path, method="none")
    trained.bake(tmp_path / "merged", "16bit")
    merged = weights_of(tmp_path / "merged")
    for kind, modules in (("lora", trained.adapter.lora), ("dora", trained.adapter.dora)):
        model = AutoModelForCausalLM.from_pretrained(trained.base)
        theirs = (
            PeftModel.from_pretrained(model, str(trained.folder / "peft" / kind)).merge_and_unload().state_dict()
        )
        for module in modules:
            ours, expected = merged[f"{module.module}.weight"], theirs[f"{module.module}.weight"]
            # Both are fp32, with sums in another order.
            assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max(), module.module
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (loaded(TOKENS).logits - trained.logits()).abs().max() <= 1e-5


@pytest.mark.parametrize("onto", ["nf4", "16bit"])
def test_the_form_in_memory_is_the_form_in_files(trained, on_nf4, tmp_path, onto):
    out = on_nf4
    if onto == "16bit":
        out = tmp_path / "out"
        trained.bake(out, onto)
    model = load_base(trained.section, NONE)
    merge_in_place(model, trained.adapter, onto=onto, section=trained.section, quantization=NF4)
    written = weights_of(out)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in written.items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_model_in_shards(tmp_path, tied):
    trained = Trained(tmp_path, dtype="bfloat16", tie_word_embeddings=tied)
    whole = trained.bake(tmp_path / "whole", "nf4")
    in_shards = shards(trained.base, "60KB")
    trained.section = ModelSection(path=str(in_shards))
    baked = trained.bake(tmp_path / "shards", "nf4")
    files = sorted(file.name for file in in_shards.glob("model*"))
    assert files == sorted(file.name for file in (tmp_path / "shards").glob("model*"))
    assert (whole.num_shards, baked.num_shards) == (1, len(files) - 1)
    one, many = weights_of(tmp_path / "whole"), weights_of(tmp_path / "shards")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert ("lm_head.weight" in one) is not tied
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(info.values())
    # The trained model rounds after W·x and after B·A·x; the merged one rounded W + s·B·A.
    with torch.no_grad():
        difference = (model(TOKENS).logits - trained.logits()).abs().max()
    assert difference <= 0.03 * trained.logits().abs().max()


def test_another_dtype_than_the_trainings(trained, tmp_path):
    baked = trained.bake(tmp_path / "out", "nf4", dtype="float16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    assert {value.dtype for value in weights_of(tmp_path / "out").values()} == {torch.float16}
    assert baked.settings["training_dtype"] == "float32" and baked.settings["dtype"] == "float16"


def test_a_change_below_the_rounding_is_told(trained, tmp_path):
    """Of a faint adapter only the zeros of NF4, one level of 16, become anything else."""
    module = trained.adapter.modules[0]
    faint = PlainModule(module.module, module.a, module.b * 1e-12, 1.0)
    adapter = PlainAdapter((faint,), trained.adapter.info, trained.folder)
    with bake(adapter, trained.section, NF4, tmp_path / "out", onto="nf4") as baked:
        assert (baked.num_adapted, baked.num_changed) == (1, 1) and 0 < baked.changed_share < 0.2
    with bake(adapter, trained.section, NF4, tmp_path / "16bit", onto="16bit") as baked:
        assert (baked.num_adapted, baked.num_changed, baked.changed_share) == (1, 0, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_writes_the_same(trained, on_nf4, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(merged_rows, "CHUNK_SIZE", 64 * 64)  # several pieces of each weight
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trained.bake(tmp_path / "out", "nf4")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    theirs = weights_of(on_nf4)
    for name, value in weights_of(tmp_path / "out").items():
        # The product's sums may be in another order for other numbers of rows.
        assert (value - theirs[name]).abs().max() <= 1e-6 * value.abs().max()


# ---- the folder ----

STOCK = """
import sys, json, torch
sys.modules["qhybrid"] = sys.modules["bitsandbytes"] = sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, logits = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, logits)
chat = [{"role": "user", "content": "Hi"}]
text = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
print(json.dumps({"ends": model.generation_config.eos_token_id, "text": text}))
"""


def test_stock_transformers_loads_it(trained, on_nf4, tmp_path):
    torch.save(TOKENS, tmp_path / "tokens")
    command = [sys.executable, "-c", STOCK, str(on_nf4), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (torch.load(tmp_path / "logits") - trained.logits()).abs().max() <= 1e-5
    assert "<|im_start|>user\nHi" in told["text"]
    assert told["ends"] == 3  # "<|im_end|>", of base and tokenizer alike


def test_the_folder_holds_a_model_and_nothing_else(trained, on_nf4, tmp_path):
    assert sorted(file.name for file in on_nf4.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with safe_open(on_nf4 / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with bake(trained.adapter, trained.section, NF4, tmp_path / "out", onto="nf4") as baked:
        assert baked.folder != tmp_path / "out" and not (tmp_path / "out").exists()
        AutoModelForCausalLM.from_pretrained(baked.folder)  # whole before it has its name
        (baked.folder / "README.md").write_text("a card")
    written = content_of(tmp_path / "out")
    assert written.pop("README.md") == b"a card"
    assert baked.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    assert baked.num_bytes == len(written["model.safetensors"])
    assert written == content_of(on_nf4)  # the same again, byte by byte


def test_what_is_not_true_of_the_result_is_left_out(tmp_path, monkeypatch):
    trained = Trained(tmp_path)
    file = trained.base / "config.json"
    config = json.loads(file.read_text())
    config |= {"_name_or_path": "/somewhere/base", "auto_map": {"AutoConfig": "x.Y"}, "my_key": "kept"}
    config["transformers_weights"] = "elsewhere.safetensors"
    config["architectures"] = ["LlamaModel"]
    file.write_text(json.dumps(config))
    monkeypatch.setenv("A_SECRET", "hushhush-1234")
    (trained.base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "temperature": 0.5, "note": "hushhush-1234"})
    )
    trained.bake(tmp_path / "out", "nf4")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.keys() & {"_name_or_path", "auto_map", "transformers_weights", "quantization_config"}
    assert written["my_key"] == "kept" and written["architectures"] == ["LlamaForCausalLM"]
    assert written["hidden_size"] == 64 and written["rope_parameters"] == config["rope_parameters"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 3], "temperature": 0.5, "note": "***"}
    assert str(tmp_path).encode() not in b"".join(content_of(tmp_path / "out").values())


def test_tensors_that_transformers_ignores_and_names_without_prefix(tmp_path):
    """As in old checkpoints: rotary frequencies beside the weights, and the bare decoder's names."""
    trained = Trained(tmp_path)
    file = trained.base / "model.safetensors"
    tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file, {"format": "pt"})
    trained.bake(tmp_path / "out", "nf4")
    names = weights_of(tmp_path / "out").keys()
    assert "model.norm.weight" in names and not any("inv_freq" in name for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (loaded(TOKENS).logits - trained.logits()).abs().max() <= 1e-5


def test_an_adapter_of_the_head(tmp_path):
    """peft may put one there. It merges where the head has a weight of its own, and only there."""
    for tied in (False, True):
        trained = Trained(tmp_path / str(tied), tie_word_embeddings=tied)
        vocabulary = weights_of(trained.base)["model.embed_tokens.weight"].shape[0]
        head = PlainModule("lm_head", torch.randn(2, 64), torch.randn(vocabulary, 2), 0.1)
        trained.adapter = PlainAdapter((head,), trained.adapter.info, trained.folder)
        out = tmp_path / f"out-{tied}"
        if tied:
            with pytest.raises(AdapterError, match="lm_head shares its weight with the embedding"):
                trained.bake(out, "nf4")
            assert not out.exists()
            continue
        trained.bake(out, "nf4")
        expected = weights_of(trained.base)["lm_head.weight"] + head.delta()
        assert torch.allclose(weights_of(out)["lm_head.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("onto", ["nf4", "16bit"])
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("qwen2", ("self_attn.q_proj", "mlp.down_proj")), ("phi3", ("self_attn.qkv_proj", "mlp.gate_up_proj"))],
)
def test_other_families(tmp_path, model_type, targets, onto):
    """Biases, and weights of several projections in one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**TINY, **SHAPE, "vocab_size": 400, "model_type": model_type})
    )
    base = tmp_path / "base"
    model.save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    section = ModelSection(path=str(base), dtype="float32")
    modules = []
    for target in targets:
        name = f"model.layers.1.{target}"
        out_features, in_features = model.get_submodule(name).weight.shape
        modules.append(PlainModule(name, torch.randn(3, in_features), torch.randn(out_features, 3) * 0.1, 0.5))
    info = AdapterInfo(str(base), None, "nf4", True, "float32", "float32", "sdpa")
    adapter = PlainAdapter(tuple(modules), info, tmp_path)
    with bake(adapter, section, NF4, tmp_path / "out", onto=onto):
        pass
    reference = load_base(section, NF4 if onto == "nf4" else NONE)
    keep_exact_on_cpu(reference)
    for module in modules:
        layer = reference.get_submodule(module.module)
        delta = module.delta()
        layer.register_forward_hook(lambda _, x, y, delta=delta: y + x[0] @ delta.T)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (merged(TOKENS).logits - reference(TOKENS).logits).abs().max() <= 1e-5


# ---- what is refused ----


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


# ---- what stays after a fault ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Trained, Path]:
    """A model of several shards, and its merged form without interruption."""
    folder = tmp_path_factory.mktemp("sharded")
    trained = Trained(folder)
    trained.section = ModelSection(path=str(shards(trained.base, "200KB")), dtype="float32")
    trained.bake(folder / "whole", "nf4")
    return trained, folder / "whole"


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")} if folder.is_dir() else {}


@pytest.mark.parametrize("pieces", [1, 12, 25, 40, 57])
def test_an_interruption_at_any_piece(sharded, tmp_path, monkeypatch, pieces):
    trained, whole = sharded
    out, write, count = tmp_path / "out", ShardWriter.write, []

    def interrupted(self, values):
        count.append(1)
        if len(count) == pieces:
            raise KeyboardInterrupt
        write(self, values)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained.bake(out, "nf4")
    assert not out.exists()
    finished = inodes(partial_of(out))
    monkeypatch.setattr(ShardWriter, "write", write)
    baked = trained.bake(out, "nf4")
    assert baked.num_resumed == len(finished) and finished.items() <= inodes(out).items()
    assert content_of(out) == content_of(whole) and sorted(os.listdir(tmp_path)) == ["out"]


def test_a_damaged_shard_is_written_again(sharded, tmp_path, monkeypatch):
    trained, whole = sharded
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), bake(trained.adapter, trained.section, NF4, out, onto="nf4"):
        raise KeyboardInterrupt  # while it is tried out
    damaged = sorted(partial_of(out).glob("*.safetensors"))[1]
    with damaged.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    baked = trained.bake(out, "nf4")
    assert baked.num_resumed == baked.num_shards - 1
    assert content_of(out) == content_of(whole)


def test_other_settings_or_another_base_begin_anew(sharded, tmp_path):
    trained, whole = sharded
    out = tmp_path / "out"

    def interrupt(**options: Any) -> None:
        with pytest.raises(KeyboardInterrupt), bake(trained.adapter, trained.section, NF4, out, **options):
            raise KeyboardInterrupt

    interrupt(onto="16bit")
    interrupt(onto="nf4", dtype="bfloat16")
    assert trained.bake(out, "nf4").num_resumed == 0
    assert content_of(out) == content_of(whole)
    shutil.rmtree(out)
    interrupt(onto="nf4")
    os.utime(next(Path(trained.section.path).glob("*.safetensors")), (1, 1))  # as if it had been replaced
    assert trained.bake(out, "nf4").num_resumed == 0
    assert content_of(out) == content_of(whole)


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from qhybrid.adapters.folder import read_plain
from qhybrid.export.bake import bake
from qhybrid.recipe.schema import ModelSection, QuantizationSection

def kill(done, total):
    if done >= total * {share}:
        os.kill(os.getpid(), signal.SIGKILL)

section = ModelSection(path={base!r}, dtype="float32", adapter_dtype="float32")
with bake(read_plain(Path({adapter!r})), section, QuantizationSection(), Path({out!r}), onto="nf4", progress=kill):
    pass
"""


@pytest.mark.parametrize("share", [0.6])
def test_a_kill(sharded, tmp_path, share):
    trained, whole = sharded
    out = tmp_path / "out"
    script = KILLED.format(
        paths=[str(Path(__file__).parents[2])],
        share=share,
        base=trained.section.path,
        adapter=str(trained.folder),
        out=str(out),
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    before = inodes(partial_of(out))
    baked = trained.bake(out, "nf4")
    assert 1 <= baked.num_resumed < baked.num_shards
    assert len(before.items() & inodes(out).items()) >= baked.num_resumed
    assert content_of(out) == content_of(whole)


def test_the_disk_fills_at_any_byte(sharded, tmp_path, monkeypatch):
    """While shards or settings are written: no folder, what is finished stays, and the rest follows."""
    trained, whole = sharded
    content = content_of(whole)
    first = min(name for name in content if name.endswith("safetensors"))
    size = sum(len(data) for name, data in content.items() if name.startswith(("model", "config", "generation")))
    for room in (0, 100, len(content[first]), len(content[first]) + 1, size // 2, size - 1):
        out = tmp_path / f"out-{room}"
        monkeypatch.setattr(builtins, "open", FullDisk(room).open)
        with pytest.raises(ExportError, match=r"out-\d+ cannot be written: .*No space left"):
            trained.bake(out, "nf4")
        monkeypatch.undo()
        assert not out.exists()
        finished = inodes(partial_of(out))
        assert bool(finished) == partial_of(out).exists() == (room >= len(content[first]))
        assert trained.bake(out, "nf4").num_resumed == len(finished)
        assert content_of(out) == content
    assert len(finished) == len(inodes(out))  # all but the last byte of the settings


# ---- memory ----

MEASURE = """
import gc, sys
from pathlib import Path
import transformers.models.llama.modeling_llama
import transformers.quantizers.quantizer_bnb_4bit
from qhybrid.adapters.folder import read_plain
from qhybrid.export.bake import bake
from qhybrid.recipe.schema import ModelSection, QuantizationSection

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

base, adapter, out = sys.argv[1:]
adapter = read_plain(Path(adapter))
for onto in ("16bit", "nf4"):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    with bake(adapter, ModelSection(path=base), QuantizationSection(), Path(out) / onto, onto=onto):
        pass
    print(onto, status("VmHWM") - before)
"""
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_key_value_heads": 4}


def large_folder(folder: Path) -> Path:
    """A bf16 model of four shards of 100 MB, each of three layers."""
    tiny_folder(folder, torch.bfloat16)  # for all but the weights
    config = json.loads((folder / "config.json").read_text()) | LARGE | {"head_dim": 256}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(LlamaConfig(**config)).state_dict().items()}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        file = f"model-{layer // 3 + 1:05d}-of-00004.safetensors"
        files.setdefault(file, {})[name] = torch.full(shape, 0.01, dtype=torch.bfloat16)
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's mark of peak memory")
def test_peak_memory_is_bound_by_the_largest_shard(tmp_path):
    base = large_folder(tmp_path / "base")
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert largest > 100e6 and total > 3.9 * largest
    modules = [
        PlainModule(f"model.layers.{layer}.mlp.{target}_proj", torch.randn(8, 1024), torch.randn(4096, 8), 1.0)
        for layer in range(12)
        for target in ("up", "gate")
    ]
    write_peft_folder(modules, str(base), tmp_path / "adapter")
    places = [str(base), str(tmp_path / "adapter"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        onto, peak = line.split()
        assert int(peak) <= 1.5 * largest, f"{onto}: {int(peak) / largest:.2f} of the largest shard"
