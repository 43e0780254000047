"""A uniform-LoRA recipe gives the losses of stock trl + peft with the same seed."""

from __future__ import annotations

import pytest
import torch
from helpers import nf4_config, run_recipe
from rich.console import Console

from qhybrid.base.load import keep_exact_on_cpu
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

STEPS = 12


def stock_losses(model_folder, train_file, training, quantized):
    """What a user of trl and peft writes, without qhybrid. Losses and gradient norms of every step."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class Losses(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.values.append((logs["loss"], float(logs["grad_norm"])))

    def conversation(row):
        return {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    nf4 = nf4_config(torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, quantization_config=nf4 if quantized else None
    )
    keep_exact_on_cpu(model)  # bitsandbytes' own switch, see its docstring
    set_seed(training["seed"])
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    kept = {p: p.data for p in model.parameters() if p.requires_grad}
    rows = load_dataset("json", data_files=str(train_file), split="train", cache_dir=str(train_file.parent / "c"))
    losses = Losses()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(train_file.parent / "stock"),
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            **{**training, "logging_steps": 1},
        ),
        train_dataset=rows.map(conversation, remove_columns=rows.column_names),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[losses],
    )
    for parameter, value in kept.items():  # trl rounds the adapters of a 4-bit model to bf16; this test is in fp32
        parameter.data = value
    trainer.train()
    return losses.values


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "fp32"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_losses_equal_stock_trl_and_peft(tmp_path, tiny_model_folder, quantized, packing):
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "max_length": 64,
        "packing": packing,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "seed": 3,
    }
    loaded = run_recipe(
        tmp_path,
        tiny_model_folder,
        adapters=[{"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}],
        quantization={"method": "nf4" if quantized else "none"},
        training=training,
    )
    ours = read_events(run_sft(loaded, console=Console(quiet=True)).run.events_file, "step")
    stock = stock_losses(tiny_model_folder, tmp_path / "train.jsonl", training, quantized)
    assert len(ours) == len(stock) == STEPS
    for record, (loss, grad_norm) in zip(ours, stock, strict=True):
        assert record["loss"] == pytest.approx(loss, abs=1e-6)
        assert record["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
