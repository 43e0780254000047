"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from helpers import run_recipe
from rich.console import Console

from qhybrid.base.load import load_base
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

pytestmark = pytest.mark.gpu
TOKENS = torch.arange(4, 36)[None]


def test_load_is_bit_equal_to_transformers(tiny_model_folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
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
        training={"max_steps": 20, "gradient_checkpointing": checkpointing},
    )
    result = run_sft(loaded, console=Console(quiet=True))
    steps = read_events(result.run.events_file, "step")
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert sum(steps[-1]["live_ranks"].values()) == 42
    assert steps[-1]["memory"]["cuda_max_allocated_bytes"] > 0
    model, _, _ = load_adapter_for_inference(result.run.adapter)
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS.cuda()).logits).all()
