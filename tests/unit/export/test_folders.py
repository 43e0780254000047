"""The vLLM folder, read by vLLM's own rules; and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from peft import PeftModel
from safetensors.torch import load_file

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.errors import AdapterError
from qhybrid.export.folders import fold_scaling, write_peft, write_vllm

TOKENS = torch.arange(4, 36)[None]
INFO = AdapterInfo("org/model", None, "nf4", True, "bfloat16", "bfloat16", "sdpa")


def modules(dtype=torch.float32) -> tuple[PlainModule, ...]:
    """Different ranks and scalings; one scaling is a power of two."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for layer, rank, scaling in ((0, 2, 2.0), (1, 7, 0.3), (4, 3, 16 / 3**0.5)):
        for target, out, inner in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            a = torch.randn(rank, inner, generator=generator).to(dtype) * 0.1
            b = torch.randn(out, rank, generator=generator).to(dtype) * 0.1
            made.append(PlainModule(f"model.layers.{layer}.{target}", a, b, scaling))
    return tuple(made)


def as_vllm_reads(folder: Path, max_lora_rank: int) -> dict[str, torch.Tensor]:
    """ΔW by module from what vLLM uses of a folder, and nothing else.

    vllm/lora/peft_helper.py takes r, lora_alpha, use_rslora, use_dora, bias and modules_to_save; one scaling,
    lora_alpha / r (or / sqrt r), for all. lora_model.py takes every tensor of adapter_model.safetensors. The names
    must be base_model.model.MODULE.lora_A|lora_B.weight with a module that is a linear layer of the model.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        not config.get("modules_to_save") and not config.get("use_dora") and config.get("bias", "none") == "none"
    )
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int) and config["target_modules"]
    assert config["r"] <= max_lora_rank
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match is not None, name
        assert match[1].rsplit(".", 1)[-1] in {"q_proj", "down_proj"}
        parts.setdefault(match[1], {})[match[2]] = tensor
    for one in parts.values():  # a module's own rank may be smaller: its slots are filled from the left
        assert one["A"].shape[0] == one["B"].shape[1] <= config["r"]
    return {name: scaling * one["B"].double() @ one["A"].double() for name, one in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_reads_the_same_changes(tmp_path, dtype):
    adapter = PlainAdapter(modules(dtype), INFO, tmp_path)
    limit = write_vllm(adapter, tmp_path / "out", "mine", has_template=False)
    assert limit == 8  # the least that vLLM takes and that is not below 7
    read = as_vllm_reads(tmp_path / "out", limit)
    assert read.keys() == {module.module for module in adapter}
    for module in adapter:
        exact = module.scaling * (module.b.double() @ module.a.double())
        assert (read[module.module] - exact).norm() <= 1e-6 * exact.norm()


def test_peft_reads_the_same_folder_alike(tmp_path):
    write_vllm(PlainAdapter(modules(), INFO, tmp_path), tmp_path / "out", "mine", has_template=False)
    with torch.no_grad():
        ours = attach_plain(tiny_model(), modules(), dtype=torch.float32)(TOKENS).logits
        theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "out")).eval()(TOKENS).logits
    assert (ours - theirs).abs().max() <= 1e-5


def test_the_script_serves_what_was_written(tmp_path):
    """Run with a `vllm` that prints its arguments."""
    out = tmp_path / "some adapter"
    write_vllm(PlainAdapter(modules(), INFO, tmp_path), out, out.name, has_template=True)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    done = subprocess.run([out / "serve.sh"], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "serve", "org/model", "--enable-lora", "--max-lora-rank", "8", "--chat-template",
        f"{out}/chat_template.jinja", "--lora-modules", f"some adapter={out}",
    ]  # fmt: skip
    done = subprocess.run(
        [out / "serve.sh", "other/base", "--port", "1"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1] == "other/base" and done.stdout.splitlines()[-2:] == ["--port", "1"]


def test_a_local_base_must_be_named(tmp_path):
    import dataclasses

    info = dataclasses.replace(INFO, base_model="/somewhere/private/model")
    write_vllm(PlainAdapter(modules(), info, tmp_path), tmp_path / "out", "mine", has_template=False)
    assert "private" not in (tmp_path / "out" / "serve.sh").read_text()
    done = subprocess.run([tmp_path / "out" / "serve.sh"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: serve.sh BASE" in done.stderr


def test_dora_is_refused_with_two_ways_out(tmp_path):
    dora = PlainModule("model.layers.0.mlp.up_proj", torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.ones(4))
    with pytest.raises(AdapterError, match="reads no DoRA, and 1 of 7") as caught:
        write_vllm(PlainAdapter((*modules(), dora), INFO, tmp_path), tmp_path / "out", "mine", has_template=False)
    assert "--to merged" in caught.value.hint and "--dora-to-lora" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_rank_above_all_that_vllm_takes_is_refused(tmp_path):
    large = PlainModule("model.layers.0.mlp.up_proj", torch.ones(513, 600), torch.ones(600, 513), 1.0)
    with pytest.raises(AdapterError, match="513, and vLLM takes at most 512"):
        write_vllm(PlainAdapter((large,), INFO, tmp_path), tmp_path / "out", "mine", has_template=False)


def test_folding_keeps_bf16_only_where_it_loses_nothing():
    b = torch.randn(5, 3).to(torch.bfloat16)
    module = PlainModule("m", torch.ones(3, 4), b, 2.0)
    assert fold_scaling(module).b.dtype == torch.bfloat16
    odd = fold_scaling(PlainModule("m", torch.ones(3, 4), b, 0.3))
    assert odd.b.dtype == torch.float32 and torch.equal(odd.b, b.float() * 0.3)


def test_lora_and_dora_modules_go_into_folders_of_their_own(tmp_path):
    dora = PlainModule("model.layers.5.mlp.up_proj", torch.ones(2, 64), torch.ones(96, 2), 1.0, torch.ones(96))
    written = write_peft(PlainAdapter((*modules(), dora), INFO, tmp_path), tmp_path / "both")
    assert [folder.name for folder in written] == ["lora", "dora"]
    assert write_peft(PlainAdapter((dora,), INFO, tmp_path), tmp_path / "one") == (tmp_path / "one",)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["use_dora"]
