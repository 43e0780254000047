"""The engine: adapters of all kinds in one batch compute what each computes alone; what it refuses to load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import THREE_BANDS, tiny_folder
from serving_helpers import info_of, make_engine, save_banded
from transformers import DynamicCache

from qhybrid.adapters.folder import read_plain, save_plain
from qhybrid.base.fingerprint import config_hash, fingerprint
from qhybrid.base.locate import weight_files
from qhybrid.errors import AdapterError, ModelError, ServingError
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.serving.engine import BASE


def logits_of(engine, adapters: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Of two forward passes, the second with a cache: (rows, 2, vocabulary)."""
    cache, mask = DynamicCache(), torch.ones_like(ids)
    with engine.inference():
        first = engine.forward(adapters, ids[:, :-1], mask[:, :-1], cache)
        return torch.stack([first, engine.forward(adapters, ids[:, -1:], mask, cache)], 1)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_of_a_mixed_batch_compute_what_each_adapter_computes_alone(folders, quantization):
    """Against `load_adapter_for_inference`, which is held to the trained model bit for bit elsewhere.

    1e-5 is a few hundred units in the last place of logits around 1: sums over a batch are ordered otherwise.
    """
    engine = make_engine(list(folders.values()), quantization=quantization, dtype="float32")
    names = [folder.name for folder in folders.values()]
    ids = torch.randint(4, 100, (2 * len(names) + 2, 12), generator=torch.Generator().manual_seed(0))
    adapters = [engine.models[name].adapter for name in names]
    order = [BASE, *adapters, BASE, *reversed(adapters)]
    mixed = logits_of(engine, order, ids)
    for row, adapter in enumerate(order):
        alone = logits_of(engine, [adapter], ids[row : row + 1])
        assert (mixed[row] - alone[0]).abs().max() <= 1e-5
    assert (mixed[1:6] - mixed[0]).abs().amax((1, 2)).min() > 0.1  # every adapter does something
    if quantization == "nf4":
        return  # the reference loads what adapter.json says
    for row, folder in enumerate(folders.values(), 1):
        # A folder of peft does not say that its base is in float32; the one that it was made from does.
        own = folder if folder.name != "lora" else folder.parent.parent
        model, _, _ = load_adapter_for_inference(own)
        with torch.no_grad():
            reference = model(ids[row : row + 1]).logits[0, -2:]
        assert (mixed[row] - reference).abs().max() <= 1e-5, folder


def test_an_adapter_trained_on_nf4_is_served_as_it_was_trained(tmp_path, tiny_model_folder):
    """The base, the dtypes and DoRA's norms are those of `load_adapter_for_inference`.

    AdaLoRA is folded into LoRA for serving, which is exact but for rounding; bf16 is bit-equal without it.
    """
    for dtype, bands, limit in (
        ("float32", THREE_BANDS, 1e-5),
        ("bfloat16", [THREE_BANDS[0], THREE_BANDS[2]], 0.0),
    ):
        folder = save_banded(
            tiny_model_folder, tmp_path / dtype, 1, bands, quantization="nf4", dtype=dtype, adapter_dtype=dtype
        )
        ids = torch.arange(4, 24)[None]
        model, _, _ = load_adapter_for_inference(folder)
        with torch.no_grad():
            reference = model(ids).logits[0, -1].float()
        engine = make_engine([folder])
        with engine.inference():
            logits = engine.forward(["a0"], ids, torch.ones_like(ids), DynamicCache())[0]
        assert (logits - reference).abs().max() <= limit
        assert not engine.notes


def test_adapters_of_other_bases_are_refused(tmp_path, folders, tiny_model_folder):
    modules = read_plain(folders["lora"]).modules

    def saved(name: str, **changes) -> Path:
        save_plain(modules, info_of(tiny_model_folder, **changes), tmp_path / name, "all")
        return tmp_path / name

    right = config_hash(tiny_model_folder)
    (facts,) = fingerprint(weight_files(tiny_model_folder)).values()
    one = saved("one", base_config_sha256=right, base_sha256={"model.safetensors": facts["sha256"]})
    renamed = saved("renamed", base_config_sha256=right, base_sha256={"other.safetensors": facts["sha256"]})
    known = {"base_config_sha256": right, "base_sha256": {"model.safetensors": facts["sha256"]}}
    moved = saved("moved", **known, base_model="/elsewhere")
    weights = saved("weights", base_config_sha256=right, base_sha256={"model-2.safetensors": "cd"})
    named, unknown = saved("named", base_model="org/other"), saved("unknown", base_model="")
    stale = saved("stale", base_config_sha256="0" * 64)
    assert make_engine([one, moved, renamed]).models.keys() >= {"one", "moved", "renamed"}
    for other, words in ((weights, "the weights differ"), (named, "org/other"), (unknown, "does not say")):
        with pytest.raises(AdapterError, match=words):
            make_engine([one, other])
    make_engine([one, named], path=str(tiny_model_folder))  # the user says so
    for other, words in ((stale, "config.json says something else"), (weights, "its weights differ")):
        with pytest.raises(AdapterError, match=words) as caught:
            make_engine([other])
        assert "--other-base takes it" in caught.value.hint
        assert make_engine([other], other_base=True).models.keys() >= {other.name}
    assert len(make_engine([one, weights], other_base=True).models) == 3
    larger = tiny_folder(tmp_path / "larger", hidden_size=96)
    with pytest.raises(ModelError, match="another base model"):
        make_engine([folders["lora"]], path=str(larger))


def test_what_cannot_be_loaded_is_refused(tmp_path, folders, tiny_model_folder):
    with pytest.raises(ModelError, match="nothing to load"):
        make_engine([])
    with pytest.raises(ServingError, match="context of 256"):
        make_engine([folders["lora"]], max_context=257)
    clash = tmp_path / "tiny"
    save_plain(read_plain(folders["lora"]).modules, info_of(tiny_model_folder), clash, "all")
    with pytest.raises(ServingError, match="tiny is the name of the base model"):
        make_engine([clash])
    config = folders["few"].parent / "pissa" / "adapter_config.json"
    config.parent.mkdir()
    told = json.loads((folders["few"] / "adapter_config.json").read_text())
    config.write_text(json.dumps({**told, "init_lora_weights": "pissa"}))
    os.link(folders["few"] / "adapter_model.safetensors", config.parent / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="PiSSA"):
        make_engine([config.parent])
