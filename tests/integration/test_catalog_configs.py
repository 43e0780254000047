"""The catalog's configs are what transformers takes, and its models have the published parameter counts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qhybrid.architecture.catalog import catalog_names, find_model
from qhybrid.architecture.spec import spec_from_config


@pytest.mark.parametrize("name", catalog_names())
def test_transformers_builds_a_model_of_the_published_size(name):
    entry = find_model(name)
    assert entry is not None
    config = AutoConfig.for_model(**entry.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(weight.numel() for weight in model.parameters()) == entry.num_parameters  # a tied weight comes once

    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith("_proj")}
    spec = spec_from_config(entry.config, name)
    assert shapes == {
        spec.module_name(layer, linear): (linear.out_features, linear.in_features)
        for layer in range(spec.num_layers)
        for linear in spec.linears
    }


@pytest.mark.parametrize("name", catalog_names())
def test_transformers_understands_the_rotary_settings(name):
    entry = find_model(name)
    assert entry is not None
    rope = AutoConfig.for_model(**entry.config).rope_parameters
    assert rope["rope_theta"] == entry.config["rope_theta"]
    assert rope["rope_type"] == (entry.config.get("rope_scaling") or {"rope_type": "default"})["rope_type"]
