"""The merged model: its values against peft, float64 and the 4-bit model, its folder, and the memory it takes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, build_tokenizer, tiny_folder
from merged_helpers import NF4, NONE, SHAPE, TOKENS, Trained, content_of, shards, weights_of
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qhybrid.adapters.dora import dequantized_weight
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.peft_folder import write_peft_folder
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.errors import AdapterError
from qhybrid.export.merged import rows as merged_rows
from qhybrid.export.merged.bake import bake, merge_in_place
from qhybrid.recipe.schema import ModelSection


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def on_nf4(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "nf4"
    trained.bake(out, "nf4")
    return out


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


def test_an_attention_that_is_not_installed_is_not_needed(trained, on_nf4, tmp_path):
    section = trained.section.model_copy(update={"attn_implementation": "flash_attention_2"})
    with bake(trained.adapter, section, NF4, tmp_path / "out", onto="nf4"):
        pass
    assert content_of(tmp_path / "out") == content_of(on_nf4)


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


# ---- memory ----

MEASURE = """
import gc, sys
from pathlib import Path
import transformers.models.llama.modeling_llama
import transformers.quantizers.quantizer_bnb_4bit
from qhybrid.adapters.folder import read_plain
from qhybrid.export.merged.bake import bake
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
