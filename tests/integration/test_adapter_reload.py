"""A trained adapter read back: in qhybrid, and in plain peft without qhybrid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file

from qhybrid.adapters.attach import adapted_modules, attach
from qhybrid.adapters.folder import load_weights, save_adapter
from qhybrid.adapters.info import read_adapter
from qhybrid.base.load import load_base
from qhybrid.errors import AdapterError
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.training.sft import run_sft

TOKENS = torch.arange(4, 36)[None]

PLAIN_PEFT = """
import sys, torch
from safetensors.torch import save_file
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, out, quantized = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32,
                                             quantization_config=nf4 if quantized == "nf4" else None)
for module in model.modules():  # or bitsandbytes computes in bf16 on CPUs with AVX512-BF16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter + "/peft/lora", adapter_name="lora")
model.load_adapter(adapter + "/peft/dora", adapter_name="dora")
model.base_model.set_adapter(["lora", "dora"])
with torch.no_grad():
    save_file({"logits": model(torch.arange(4, 36)[None]).logits}, out)
assert not any(name.split(".")[0] == "qhybrid" for name in sys.modules)
"""


@pytest.fixture(scope="module", params=["nf4", "none"])
def trained(request, tmp_path_factory, tiny_model_folder):
    """A run of four kinds, so that AdaLoRA has dropped ranks; and the logits of the model that was trained."""
    bands = [
        {"band": "a", "layers": "0", "kind": "lora", "rank": 4, "dropout": 0.1},
        {"band": "b", "layers": "1-2", "kind": "rslora", "rank": 3},
        {"band": "c", "layers": "3-4", "kind": "adalora", "rank": 1, "adalora": {"init_rank": 4}},
        {"band": "d", "layers": "5", "kind": "dora", "rank": 4},
    ]
    folder = tmp_path_factory.mktemp(request.param)
    loaded = run_recipe(
        folder,
        tiny_model_folder,
        adapters=bands,
        quantization={"method": request.param},
        training={"max_steps": 20, "learning_rate": 2e-2},
    )
    kept = {}
    from qhybrid.training import session

    class Keep(session.BandedTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            kept["trainer"] = self

    original, session.BandedTrainer = session.BandedTrainer, Keep
    try:
        result = run_sft(loaded, console=Console(quiet=True))
    finally:
        session.BandedTrainer = original
    model = kept["trainer"].model.eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
        base = load_base(loaded.recipe.model, loaded.recipe.quantization)
        from qhybrid.base.load import keep_exact_on_cpu

        keep_exact_on_cpu(base)
        untouched = base(TOKENS).logits
    assert (logits - untouched).abs().max() > 0.5  # the adapter does something
    return loaded, result, logits, request.param


def test_qhybrid_reads_it_back_exactly(trained):
    _, result, logits, _ = trained
    model, _, _ = load_adapter_for_inference(result.run.adapter)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits)


def test_plain_peft_reads_it_without_qhybrid(trained, tmp_path, tiny_model_folder):
    _, result, logits, quantization = trained
    out = tmp_path / "logits.safetensors"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PLAIN_PEFT,
            str(tiny_model_folder),
            str(result.run.adapter),
            str(out),
            quantization,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (load_file(out)["logits"] - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("trained", ["nf4"], indirect=True)
def test_the_snippet_of_the_docs_gives_the_same(trained, tmp_path, tiny_model_folder):
    """docs/methods.md, as a user pastes it; in fp32, so that it can be compared."""
    _, result, logits, _ = trained
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    snippet = text.partition("```python\n")[2].partition("```")[0]
    assert "set_adapter" in snippet
    for old, new in (
        ("BASE", repr(str(tiny_model_folder))), ("bfloat16", "float32"), ("runs/demo", str(result.run.folder)),
    ):  # fmt: skip
        snippet = snippet.replace(old, new)
    snippet += f"""
import torch
from safetensors.torch import save_file
with torch.no_grad():
    save_file({{"logits": model(torch.tensor({TOKENS.tolist()})).logits}}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (load_file(tmp_path / "out")["logits"] - logits).abs().max() <= 1e-5


def test_dropped_ranks_are_gone_from_the_peft_folder(trained):
    layout, _ = read_adapter(trained[1].run.adapter)
    lora = load_file(trained[1].run.adapter / "peft" / "lora" / "adapter_model.safetensors")
    rows = layout.of_kind("adalora")
    ranks = [
        lora[key].shape[0] if (key := f"base_model.model.{row.module}.lora_A.weight") in lora else 0
        for row in rows
    ]
    assert sum(ranks) == sum(row.target_rank for row in rows)
    assert max(ranks) > 1  # ranks moved to where they matter
    config = json.loads((trained[1].run.adapter / "peft" / "lora" / "adapter_config.json").read_text())
    for row, rank in zip(rows, ranks, strict=True):
        assert (row.module in config["target_modules"]) == (rank > 0)
        if rank:
            assert config["rank_pattern"][row.module] == config["alpha_pattern"][row.module] == rank


@pytest.mark.parametrize("trained", ["none"], indirect=True)
def test_merging_into_the_weights_keeps_the_function(trained):
    """peft's merge_and_unload: every kind must merge, or its delta would silently be lost.

    Only unquantised: merging into 4-bit weights rounds them anew, which is a larger change than these adapters.
    """
    _, result, logits, _ = trained
    model, _, _ = load_adapter_for_inference(result.run.adapter)
    with torch.no_grad():
        for way in (model.merge_adapter, model.unmerge_adapter):
            way()
            assert torch.allclose(model(TOKENS).logits, logits, atol=1e-4)
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert torch.allclose(merged(TOKENS).logits, logits, atol=1e-4)


def test_damaged_and_foreign_adapters_are_refused(trained, tmp_path):
    loaded, result, _, _ = trained
    layout, info = read_adapter(result.run.adapter)
    model = attach(load_base(loaded.recipe.model, loaded.recipe.quantization), layout, dtype=torch.float32)
    save_adapter(model, layout, info, tmp_path / "copy")
    weights = tmp_path / "copy" / "adapter.safetensors"
    before = {
        row.module: module.lora_A["default"].weight.clone() for row, module in adapted_modules(model, layout)
    }

    tensors = load_file(weights)
    name = next(iter(tensors))
    for change in ({name: None}, {name: torch.zeros(2, 2)}, {"extra": torch.zeros(1)}):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(changed, weights)
        with pytest.raises(AdapterError) as caught:
            load_weights(model, layout, tmp_path / "copy")
        assert "adapter.safetensors" in str(caught.value)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError):
        load_weights(model, layout, tmp_path / "copy")
    for row, module in adapted_modules(model, layout):  # all or nothing
        assert torch.equal(module.lora_A["default"].weight, before[row.module])
    with pytest.raises(AdapterError, match="not an adapter folder"):
        read_adapter(tmp_path)
    (tmp_path / "copy" / "adapter.json").write_text('{"format_version": 7}')
    with pytest.raises(AdapterError, match="format version"):
        read_adapter(tmp_path / "copy")
