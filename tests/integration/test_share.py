"""One base model for several adapters: why modules cannot be shared, and that nothing but tensors is."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomize_adapters, tiny_layout
from peft import LoraConfig, get_peft_model
from task_helpers import storages

from qhybrid.adapters.attach import attach
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.share import share_weights
from qhybrid.recipe.schema import ModelSection, QuantizationSection

IDS = torch.tensor([[5, 9, 2, 7, 30, 11]])


def base_of(folder, method: str = "nf4"):
    section = ModelSection(path=str(folder), dtype="float32")
    model = load_base(section, QuantizationSection(method=method), device="cpu")
    keep_exact_on_cpu(model)
    return model


@torch.no_grad()
def test_three_wrappers_on_one_base_are_one_model(tiny_model_folder):
    """The article wraps one base three times and sums the logits of "three models"."""
    base = base_of(tiny_model_folder)
    untouched = base(IDS).logits
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    wrappers = []
    for seed, name in enumerate(("low", "middle", "high")):
        wrappers.append(get_peft_model(base, copy.deepcopy(config), adapter_name=name))
        torch.manual_seed(seed)
        for key, parameter in base.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.normal_(std=0.3)
    first, second, third = (wrapper(IDS).logits for wrapper in wrappers)
    assert torch.equal(first, second) and torch.equal(second, third)
    assert not torch.equal(first, untouched)
    assert wrappers[0].get_base_model() is wrappers[2].get_base_model()


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_trees_share_every_tensor_and_no_module(tiny_model_folder, method):
    base = base_of(tiny_model_folder, method)
    others = [share_weights(base) for _ in range(2)]
    for other in others:
        named = dict(base.named_modules())
        for name, module in other.named_modules():
            assert type(module) is type(named[name]) and module is not named[name], name
            assert getattr(module, "quant_state", None) is getattr(named[name], "quant_state", None)
        assert other.config is not base.config and other.generation_config is not base.generation_config
        for kind in ("named_parameters", "named_buffers"):
            mine, its = dict(getattr(base, kind)()), dict(getattr(other, kind)())
            assert mine.keys() == its.keys()
            assert all(its[name].data_ptr() == mine[name].data_ptr() for name in mine)
    assert storages(base, *others) == storages(base)


@torch.no_grad()
def test_no_forward_pass_goes_through_another_tree(tiny_model_folder):
    base = base_of(tiny_model_folder)
    other = share_weights(base)
    called: list[str] = []
    for module in base.modules():
        module.register_forward_hook(lambda module, *others: called.append(type(module).__name__))
    logits = other(IDS).logits
    assert not called
    assert torch.equal(base(IDS).logits, logits) and called


def test_three_tasks_take_the_memory_of_one_base(tiny_model_folder):
    base = base_of(tiny_model_folder)
    alone = sum(storages(base).values())
    trees, layout = [], tiny_layout(vocab_size=base.config.vocab_size)
    for seed in range(3):
        torch.manual_seed(seed)
        trees.append(attach(share_weights(base), layout, dtype=torch.float32))
        randomize_adapters(trees[-1], seed=seed, scale=0.3)
    del base
    with torch.no_grad():
        outputs = [tree(IDS).logits for tree in trees]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    norms = sum(row.out_features for row in layout.of_kind("dora"))  # rowsum(W²)
    adapters = 4 * (layout.num_parameters + norms)
    assert sum(storages(*trees).values()) == alone + 3 * adapters
    with torch.no_grad():  # what one adapter is set to does not reach the others
        trees[0].disable_adapter_layers()
        assert torch.equal(trees[1](IDS).logits, outputs[1])
