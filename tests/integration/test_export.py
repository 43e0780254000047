"""`qhybrid export` as a user runs it, on a trained adapter of three kinds; loaded again without qhybrid."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize_adapters, record_figure, run_cli, run_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file

from qhybrid.adapters.folder import read_plain
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.training.sft import run_sft

TOKENS = torch.arange(4, 36)[None]

LOADED_BY_PEFT = """
import json, sys, torch
from safetensors.torch import save_file
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, out, *folders = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4)
for module in model.modules():  # or bitsandbytes computes in bf16 on CPUs with AVX512-BF16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
for number, folder in enumerate(folders[1:], 1):
    model.load_adapter(folder, adapter_name=str(number))
model.base_model.set_adapter([str(number) for number in range(len(folders))])
model.eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(4, 36)[None]).logits}, out)
assert not any(name.split(".")[0] == "qhybrid" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_model_folder):
    """A run of lora, rslora and adalora bands on NF4, so that every module can become LoRA exactly."""
    bands = [
        {"band": "a", "layers": "0-1", "kind": "lora", "rank": 4},
        {"band": "b", "layers": "2-3", "kind": "rslora", "rank": 3},
        {"band": "c", "layers": "4-5", "kind": "adalora", "rank": 2, "adalora": {"init_rank": 5}},
    ]
    loaded = run_recipe(
        tmp_path_factory.mktemp("lora_run"),
        tiny_model_folder,
        adapters=bands,
        training={"max_steps": 20, "learning_rate": 2e-2},
    )
    return run_sft(loaded, console=Console(quiet=True)).run


def logits_of(adapter: Path) -> torch.Tensor:
    model, _, _ = load_adapter_for_inference(adapter)
    with torch.no_grad():
        return model(TOKENS).logits


def by_peft(base: Path, folders: list[Path], out: Path) -> torch.Tensor:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_BY_PEFT, str(base), str(out), *map(str, folders)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)["logits"]


def test_peft_and_vllm_folders_compute_what_was_trained(lora_run, tmp_path, tiny_model_folder):
    trained = logits_of(lora_run.adapter)
    for target in ("peft", "vllm"):
        done = run_cli("export", lora_run.folder, tmp_path / target, "--to", target)
        assert done.returncode == 0, done.stderr
        assert "logits differ from the source's by" in done.stdout
        logits = by_peft(tiny_model_folder, [tmp_path / target], tmp_path / "logits")
        difference = (logits - trained).abs().max()
        assert difference <= 1e-5
        kinds = "lora, rslora and adalora as one LoRA"
        record_figure(
            15, f"{kinds}, --to {target}, loaded by peft", f"logits within {difference:.1e} (1e-5 is allowed)"
        )
    record = json.loads((tmp_path / "vllm" / "export.json").read_text())
    assert record["logits_difference"] <= 1e-5 and record["is_base_known"] and record["max_lora_rank"] == 8


def test_kinds_that_peft_cannot_mix_go_into_two_folders(finished, tmp_path, tiny_model_folder):
    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "peft")
    assert done.returncode == 0 and "activate both: lora and dora" in done.stdout
    logits = by_peft(
        tiny_model_folder, [tmp_path / "out" / "lora", tmp_path / "out" / "dora"], tmp_path / "logits"
    )
    assert (logits - logits_of(result.run.adapter)).abs().max() <= 1e-5


def test_dora_is_refused_where_it_cannot_be_and_approximated_on_demand(finished, tmp_path):
    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "vllm")
    assert done.returncode == 2 and "vLLM reads no DoRA" in done.stderr
    assert "--to merged" in done.stderr and "--dora-to-lora" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "vllm", "--dora-to-lora", 6)
    assert done.returncode == 0, done.stderr
    assert "DoRA modules became LoRA of rank 6: ||ΔW − B·A|| is" in done.stdout
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["dora_to_lora"] and all(0 < one["error"] < 1 for one in record["dora_to_lora"].values())
    assert "| error of ΔW |" in (tmp_path / "out" / "README.md").read_text()


def test_int8_is_small_and_loads_again(lora_run, tmp_path):
    done = run_cli("export", lora_run.folder, tmp_path / "int8", "--to", "int8", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0 < figures["largest_error"] < 0.02 and figures["bytes"] < 0.7 * figures["bytes_before"]
    before, after = logits_of(lora_run.adapter), logits_of(tmp_path / "int8")
    moved = (after - before).abs().max() / before.abs().max()
    assert 0 < moved < 0.02
    assert abs(float(moved) - figures["logits_difference"]) < 0.02
    assert {module.a.dtype for module in read_plain(tmp_path / "int8")} == {torch.float32}


def test_pissa_of_peft_becomes_lora(tmp_path, tiny_model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    model = get_peft_model(base, config)
    randomize_adapters(model)
    with torch.no_grad():
        trained = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path / "pissa")
    done = run_cli("export", tmp_path / "pissa", tmp_path / "out", "--to", "peft", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "does not know the hashes of its base" in done.stdout
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {8} and config["init_lora_weights"] is True
    from peft import PeftModel

    again = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(again, str(tmp_path / "out")).eval()(TOKENS).logits
    difference = (logits - trained).abs().max()
    assert difference <= 1e-5
    record_figure(15, "PiSSA as LoRA on the untouched base", f"logits within {difference:.1e} (1e-5 is allowed)")


def test_a_conversion_that_computes_something_else_is_not_kept(lora_run, tmp_path, monkeypatch):
    """The check is on what peft loads from the disk: a wrong scaling there is found."""
    from qhybrid.errors import ProofError
    from qhybrid.export import as_adapter
    from qhybrid.export.job import Source, prepare

    def wrong(adapter, folder):
        import dataclasses

        first, *rest = adapter.modules
        return write(
            dataclasses.replace(adapter, modules=(dataclasses.replace(first, scaling=0.9), *rest)), folder
        )

    write = as_adapter.write_peft
    monkeypatch.setattr(as_adapter, "write_peft", wrong)
    job = prepare(Source(lora_run.folder), lambda text: None)
    with pytest.raises(ProofError, match="what peft loads does not compute what the adapter does"):
        as_adapter.to_peft(job, tmp_path / "out", lambda text: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["peft", "vllm", "int8", "merged"])
def test_the_chat_template_gives_the_same_ids_in_every_export(lora_run, tmp_path, target):
    from transformers import AutoTokenizer

    options = ("--no-proof",) if target == "merged" else ()
    done = run_cli("export", lora_run.folder, tmp_path / "out", "--to", target, *options)
    assert done.returncode == 0, done.stderr
    messages = [
        {"role": "user", "content": "How many apples are left?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And cats?"},
    ]
    ids = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)[
            "input_ids"
        ]
        for folder in (lora_run.adapter, tmp_path / "out")
    ]
    assert ids[0] == ids[1] and len(ids[0]) > 10
    record_figure(15, f"the chat template, --to {target}", "the same token ids")


def changed_copy(adapter: Path, place: Path, file: str, change) -> Path:
    shutil.copytree(adapter, place)
    change(place / file)
    return place


def nan_inside(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)


def other_module(file: Path) -> None:
    file.write_text(file.read_text().replace("model.layers.5.", "model.layers.77."))
    weights = file.parent / "adapter.safetensors"
    save_file({name.replace(".layers.5.", ".layers.77."): t for name, t in load_file(weights).items()}, weights)


def test_bad_input_is_one_message_and_leaves_nothing(lora_run, tmp_path, tiny_model_folder):
    adapter, place = lora_run.adapter, tmp_path / "place"
    place.mkdir()

    def refused(source, *options, name="out"):
        done = run_cli("export", source, place / name, *(options or ("--to", "peft")))
        assert done.returncode == 2, (done.returncode, done.stderr)
        return done.stderr

    copies = tmp_path / "copies"
    copies.mkdir()
    cut = changed_copy(
        adapter, copies / "cut", "adapter.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-9])
    )
    assert "adapter.safetensors is not a whole .safetensors file" in refused(cut)
    assert "not finite" in refused(changed_copy(adapter, copies / "nan", "adapter.safetensors", nan_inside))
    lacking = changed_copy(adapter, copies / "other", "layout.json", other_module)
    assert "no linear module model.layers.77" in refused(lacking)
    no_weights = changed_copy(adapter, copies / "none", "adapter.safetensors", Path.unlink)
    assert "adapter.safetensors cannot be read" in refused(no_weights)
    assert "there is no folder" in refused(tmp_path / "nowhere")

    other = copies / "base"
    shutil.copytree(tiny_model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert "is not the adapter's base: its weights differ" in refused(adapter, "--to", "peft", "--base", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    message = refused(adapter, "--to", "peft", "--base", other)
    assert "its config.json says something else" in message and "--other-base" in message
    assert "there is no" in refused(adapter, "--to", "peft", "--base", "./missing")

    for name in ("-rf", ".hidden", "a\nb", "back\\slash"):
        assert "is not a usable name" in refused(adapter, name=name)
    (place / "taken").mkdir()
    assert "exists already" in refused(adapter, name="taken")
    (place / "file").write_text("")
    assert "is a file" in refused(adapter, name="file/out")
    assert "--onto has no effect" in refused(adapter, "--to", "peft", "--onto", "nf4")
    assert "has no DoRA modules" in refused(adapter, "--to", "peft", "--dora-to-lora", "4")
    assert "not of the form ORG/NAME" in refused(adapter, "--to", "peft", "--push", "name")
    assert "knows its quantization" in refused(adapter, "--to", "peft", "--quantization", "none")
    assert sorted(item.name for item in place.iterdir()) == ["file", "taken"]


def test_another_copy_of_the_base_is_taken_when_the_user_says_so(lora_run, tmp_path, tiny_model_folder):
    """Say, the same weights in other shards."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).save_pretrained(
        tmp_path / "base", max_shard_size="300KB"
    )
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    command = ("export", lora_run.adapter, tmp_path / "out", "--to", "peft", "--base", tmp_path / "base")
    assert run_cli(*command).returncode == 2
    done = run_cli(*command, "--other-base")
    assert done.returncode == 0, done.stderr


def test_the_card_tells_the_run_and_no_paths(lora_run, tmp_path):
    done = run_cli("export", lora_run.folder, tmp_path / "out", "--to", "peft", HF_TOKEN="hf_" + "x" * 30)
    assert done.returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "# out",
        "PeftModel.from_pretrained",
        "kind: rslora",
        "train.jsonl | training | 32 | 32",
        "optimizer steps",
    ):
        assert words in card, card
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            if file.name not in ("adapter_config.json",):  # peft needs to find the base
                assert str(lora_run.folder) not in text and str(lora_run.folder.parent) not in text, file


def test_pushing_uploads_the_folder(lora_run, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from qhybrid.cli.export import command
    from qhybrid.export import hub

    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, **options):
            calls.append(
                ("upload", options["repo_id"], sorted(f.name for f in Path(options["folder_path"]).iterdir()))
            )
            return "https://hub/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    arguments = [str(lora_run.folder), str(tmp_path / "out"), "--to", "peft", "--push", "me/mine", "--private"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "uploaded https://hub/commit/1" in done.output
    assert calls[0] == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert calls[1][:2] == ("upload", "me/mine") and {"README.md", "adapter_model.safetensors"} <= set(calls[1][2])


def test_a_push_that_fails_keeps_the_folder(lora_run, tmp_path):
    done = run_cli(
        "export", lora_run.folder, tmp_path / "out", "--to", "peft", "--push", "me/mine", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 2 and "me/mine was not uploaded: HF_HUB_OFFLINE is set" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
