"""What qhybrid leans on in other libraries without it being public API. A failure here names what moved.

Tested with transformers 5.23.0, peft 0.21.2, trl 1.16.0, bitsandbytes 0.50.2.
"""

from __future__ import annotations

import dataclasses
import inspect

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
import trl
from helpers import tiny_layout, tiny_model

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.recipe.training_fields import OUR_FIELDS, OWNED_ELSEWHERE, TrainingSection


def test_the_recipe_has_every_field_of_sftconfig():
    theirs = {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}
    ours = set(TrainingSection.model_fields) - set(OUR_FIELDS)
    assert ours == theirs, "run scripts/generate_training_fields.py"
    assert OWNED_ELSEWHERE.keys() <= theirs


def test_defaults_are_trls_own_but_for_two():
    changed = set()
    for field in dataclasses.fields(trl.SFTConfig):
        if field.init:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            default = getattr(default, "value", default)
            if TrainingSection.model_fields[field.name].default != default:
                changed.add(field.name)
    assert changed == {"learning_rate", "logging_nan_inf_filter"}


def test_peft_lora_variant_interface():
    """peft calls variants with these arguments, and finds them in a plain dict on the layer."""
    from peft.tuners.lora.layer import LoraLayer, LoraVariant

    assert list(inspect.signature(LoraVariant.forward).parameters)[:4] == [
        "module", "active_adapter", "x", "result",
    ]  # fmt: skip
    for method in ("merge_safe", "merge_unsafe", "unmerge"):
        assert list(inspect.signature(getattr(LoraVariant, method)).parameters) == [
            "module", "active_adapter", "orig_weight",
        ]  # fmt: skip
    assert hasattr(LoraLayer, "_cache_store") and hasattr(LoraLayer, "_cache_pop")
    model = attach(tiny_model(), tiny_layout(), dtype=torch.float32)
    kinds = {
        type(module.lora_variant.get(ADAPTER)).__name__ for _, module in adapted_modules(model, tiny_layout())
    }
    assert kinds == {"NoneType", "AdaLoraVariant", "DoraVariant"}


def test_peft_scaling_is_alpha_over_rank():
    """Folders are written with alpha = s·r, so this rule must hold for plain LoRA and DoRA."""
    layout = tiny_layout([{"kind": "rslora", "rank": 9, "alpha": 6}])
    model = peft.get_peft_model(
        tiny_model(), __import__("qhybrid.adapters.attach", fromlist=["x"]).peft_config(layout)
    )
    for row, module in adapted_modules(model, layout):
        assert module.scaling[ADAPTER] == pytest.approx(row.scaling, rel=1e-12) == 2.0


def test_trl_takes_its_loss_from_log_probabilities():
    """So a regulariser in the model's forward would be lost; ours joins the gradients in training_step."""
    source = inspect.getsource(trl.SFTTrainer.compute_loss)
    assert "outputs.log_probs" in source and "num_items_in_batch" in source


def test_trl_casts_adapters_of_4_bit_models():
    """keep_adapter_values undoes it; when trl stops, that can go."""
    assert "param.data.to(torch.bfloat16)" in inspect.getsource(trl.SFTTrainer.__init__)


def test_trainer_hooks_come_in_the_order_that_the_allocator_needs():
    """Gradients complete → clip → grad norm → optimizer → on_optimizer_step → zero_grad → step count."""
    source = inspect.getsource(transformers.Trainer._run_epoch)
    order = [
        "on_step_begin(", "self.training_step(", "self._clip_grad_norm(", "self._get_grad_norm(",
        "self.optimizer.step()", "on_optimizer_step(", "self.lr_scheduler.step()", "model.zero_grad()",
        "self.state.global_step += 1", "on_step_end(", "self._maybe_log_save_evaluate(",
    ]  # fmt: skip
    places = [source.index(call) for call in order]
    assert places == sorted(places)
    assert hasattr(trl.SFTTrainer, "_prepare_for_training") and hasattr(trl.SFTTrainer, "_load_best_model")


def test_bitsandbytes_packs_weights_on_some_cpus():
    """The switch that keep_exact_on_cpu throws exists."""
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    assert "support_avx512bf16_for_cpu" in inspect.getsource(bnb.nn.Linear4bit.forward)


def test_transformers_trainer_calls_what_is_overridden():
    """Each of these is called by the training loop with these names; transformers promises none of it."""
    wanted = {
        "_save_checkpoint": ["model", "trial"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_rng_state": ["checkpoint"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_best_model": [],
        "_get_dataloader": [
            "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
        ],
        "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
        "_get_grad_norm": ["model", "grad_norm"],
        "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    }  # fmt: skip
    for name, parameters in wanted.items():
        found = list(inspect.signature(getattr(transformers.Trainer, name)).parameters)
        assert found == ["self", *parameters], name
    loop = inspect.signature(transformers.Trainer._maybe_log_save_evaluate).parameters
    assert list(loop)[:6] == ["self", "tr_loss", "grad_norm", "model", "trial", "epoch"]
    epoch = inspect.signature(transformers.Trainer._run_epoch).parameters
    assert {"model", "epoch", "train_dataloader", "start_time"} <= epoch.keys()


def test_deepspeed_has_what_zero_leans_on():
    """Tested with deepspeed 0.19.8 and accelerate 1.15."""
    pytest.importorskip("deepspeed")
    from accelerate import accelerator
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.utils import (  # noqa: F401
        lazy_init_hp_params_optimizer_state,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    flat = inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer)
    assert "self.single_partition_of_fp32_groups" in flat and "self.bit16_groups" in flat
    third = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    assert "self.fp32_partitioned_groups_flat" in third and "self.fp16_groups" in third
    # accelerate goes on to the step within its backward, through the engine's attribute.
    assert "self.engine.step()" in inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert "deepspeed_engine_wrapped" in inspect.getsource(accelerator)
