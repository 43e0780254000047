"""Pickles in a model, an adapter or a checkpoint are never opened, whatever they are called."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil

import pytest
import torch
from canaries import PICKLES, OpensAFile, write_pickles
from rich.console import Console

from qhybrid.errors import QhybridError
from qhybrid.training.checkpoint import seal
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
CANARIES = (8, "canaries of pickles")
STORED_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def test_the_canaries_sing(tmp_path):
    """Otherwise their silence would say nothing."""
    file = tmp_path / "canary-ran"
    pickle.loads(pickle.dumps(OpensAFile(file))).close()
    assert file.exists()
    write_pickles(tmp_path, file)
    for name in PICKLES:
        file.unlink()
        with contextlib.suppress(RuntimeError):  # torch misses its own header, after the harm is done
            torch.load(tmp_path / name, weights_only=False)
        assert file.exists(), name


def test_pickles_beside_the_weights_are_not_opened(project, ran, command):
    write_pickles(project / "model", ran)
    assert command("sft", project / "recipe.yaml") == 0
    assert command("eval", project / "eval.jsonl", "--adapter", project / "run", "--no-generation") == 0
    assert command("eval", project / "eval.jsonl", "--model", project / "model", "--no-generation") == 0
    for name in ("plan", "sft"):
        assert command(name, project / "recipe.yaml", *(["--dry-run"] if name == "sft" else [])) == 0


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("stored_nf4", [False, True])
def test_pickles_in_the_place_of_weights_are_refused(project, ran, command, capsys, with_index, stored_nf4):
    model = project / "model"
    (model / "model.safetensors").unlink()
    write_pickles(model, ran)
    if with_index:
        (model / "pytorch_model.bin").rename(model / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if stored_nf4:  # this form is loaded by transformers
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = STORED_NF4
        (model / "config.json").write_text(json.dumps(config))
    assert command("sft", project / "recipe.yaml") == 2
    assert "can run code when opened" in capsys.readouterr().err
    assert command("eval", project / "eval.jsonl", "--model", model, "--no-generation") == 2


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_config_cannot_choose_a_pickle_as_its_weights(project, ran, command, capsys, name):
    model = project / "model"
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = STORED_NF4
    config["transformers_weights"] = name
    (model / "config.json").write_text(json.dumps(config))
    write_pickles(model, ran)
    assert command("sft", project / "recipe.yaml") == 2
    assert "transformers_weights" in capsys.readouterr().err


def test_an_index_cannot_choose_a_pickle(project, ran, command):
    model = project / "model"
    write_pickles(model, ran)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert command("sft", project / "recipe.yaml") == 2


@pytest.mark.parametrize("kept", ["adapter.safetensors", None])
def test_pickles_in_an_adapter_are_not_opened(trained, tmp_path, ran, command, kept):
    loaded, result = trained
    adapter = tmp_path / "adapter"
    shutil.copytree(result.run.adapter, adapter)
    for folder in (adapter, adapter / "peft" / "lora", adapter / "peft" / "dora"):
        write_pickles(folder, ran)
        for weights in folder.glob("*.safetensors"):
            if weights.name != kept:
                weights.unlink()
    scored = command("eval", loaded.folder / "eval.jsonl", "--adapter", adapter, "--limit", "2", "--no-generation")
    assert scored == (0 if kept else 2)
    assert command("eval", loaded.folder / "eval.jsonl", "--adapter", adapter / "peft" / "lora") == 2


def test_pickles_in_checkpoints_are_not_opened_when_a_run_goes_on(crashed, ran):
    """In the newest checkpoint, sealed anew over them, and in a folder that would be newer still."""
    loaded, folder = crashed
    newest = folder / "checkpoints" / "checkpoint-4"
    write_pickles(newest, ran)
    seal(newest)
    extra = folder / "checkpoints" / "checkpoint-99"
    extra.mkdir()
    write_pickles(extra, ran)
    result = run_sft(loaded, resume=True, console=QUIET)
    assert result.run.resume_from == newest and result.figures["optimizer_steps"] == 6


def test_a_sealed_checkpoint_of_pickles_is_not_opened(crashed, ran):
    """An attacker can seal, too. Whether such a run is refused or goes on, nothing is opened."""
    loaded, folder = crashed
    extra = folder / "checkpoints" / "checkpoint-99"
    shutil.copytree(folder / "checkpoints" / "checkpoint-4", extra)
    (extra / "manifest.json").unlink()
    write_pickles(extra, ran)
    seal(extra)
    try:
        run_sft(loaded, resume=True, console=QUIET)
    except QhybridError as error:
        assert error.exit_code in (1, 2)
