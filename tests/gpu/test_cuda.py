"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import nf4_config, run_recipe
from rich.console import Console

from qhybrid.adapters.attach import attach
from qhybrid.architecture.bands import layout_of_bands
from qhybrid.architecture.spec import read_spec
from qhybrid.base.load import load_base
from qhybrid.data.prepare import prepare_file
from qhybrid.evaluation.evaluate import evaluate
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

pytestmark = pytest.mark.gpu
TOKENS = torch.arange(4, 36)[None]


def test_load_is_bit_equal_to_transformers(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    nf4 = nf4_config(torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": 0}
    )
    ours = load_base(ModelSection(path=str(tiny_model_folder)), QuantizationSection())
    with torch.no_grad():
        assert torch.equal(ours(TOKENS.cuda()).logits, theirs(TOKENS.cuda()).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_bands_train_and_reload(tmp_path, tiny_model_folder, dtype, checkpointing):
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        model={"path": str(tiny_model_folder), "dtype": dtype},
        training={
            "max_steps": 20,
            "gradient_checkpointing": checkpointing,
            "eval_strategy": "steps",
            "eval_steps": 20,
        },
    )
    result = run_sft(loaded, console=Console(quiet=True))
    steps = read_events(result.run.events_file, "step")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert sum(steps[-1]["live_ranks"].values()) == 42
    assert steps[-1]["memory"]["cuda_max_allocated_bytes"] > 0
    # The adapter that comes back from disk is the one that was trained: it gives the same evaluation loss.
    model, tokenizer, info = load_adapter_for_inference(result.run.adapter)
    source = loaded.recipe.data.eval_sources[0]
    rows, _ = prepare_file(source, tokenizer, chat_template=info.chat_template, base_folder=tmp_path)
    with torch.autocast("cuda", dtype=getattr(torch, dtype)):
        scores = evaluate(model, tokenizer, rows, batch_size=4, max_new_tokens=None)
    (evaluated,) = read_events(result.run.events_file, "evaluation")
    assert scores.loss == pytest.approx(evaluated["eval_loss"], rel=1e-3)


def test_a_resumed_run_goes_on_where_it_was(tmp_path, tiny_model_folder):
    """CUDA kernels may add in another order, so this is close, where the CPU's is exact."""
    training = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "save_total_limit": None}
    whole = run_sft(
        run_recipe(tmp_path / "whole", tiny_model_folder, training=training), console=Console(quiet=True)
    )
    loaded = run_recipe(tmp_path / "resumed", tiny_model_folder, training=training)
    result = run_sft(loaded, console=Console(quiet=True))
    shutil.rmtree(result.run.checkpoints / "checkpoint-12")
    shutil.rmtree(result.run.adapter)
    status = json.loads((result.run.folder / "run.json").read_text())
    (result.run.folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    again = run_sft(loaded, resume=True, console=Console(quiet=True))
    assert again.figures["live_ranks"] == whole.figures["live_ranks"]
    expected = read_events(whole.run.events_file, "step")[-1]
    found = read_events(again.run.events_file, "step")[-1]
    assert found["step"] == expected["step"] == 12
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@pytest.mark.parametrize("kind", ["dora", "adalora"])
def test_layers_on_cuda_compute_what_they_compute_on_the_cpu(tiny_model_folder, kind):
    """The CPU's own forward pass is held against float64 references in tests/unit/adapters."""
    bands = (BandSection(band="all", kind=kind, rank=4),)
    layout = layout_of_bands(bands, read_spec(tiny_model_folder))
    section = ModelSection(path=str(tiny_model_folder), dtype="float32")
    logits, gradients = [], []
    for device in ("cpu", "cuda"):
        model = load_base(section, QuantizationSection(method="none"), device=device)
        model = attach(model, layout, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                noise = (torch.randn(parameter.shape, generator=generator) * 0.05).to(device)
                is_magnitude = kind == "dora" and parameter.dim() == 1
                parameter.copy_(parameter + noise if is_magnitude else noise)
        out = model(TOKENS.to(device)).logits
        out.square().mean().backward()
        logits.append(out.detach().cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)
