"""The proof of merged models: its figures against a computation of its own, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import chat_rows, record_figure, run_cli, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qhybrid.adapters.folder import read_plain, save_plain
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.export.as_model import ProofWanted, to_merged
from qhybrid.export.job import Source, prepare
from qhybrid.export.probe import probe_rows

TOKENS = torch.arange(4, 36)[None]


def quiet(text: str) -> None:
    pass


def test_onto_nf4_is_the_trained_model_and_the_table_says_so(finished, tmp_path):
    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "merged", "--onto", "nf4")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    names = [
        "4-bit + adapter", "4-bit base", "16-bit + adapter", "16-bit base", "merged on 16-bit",
        "merged on dequantised NF4",
    ]  # fmt: skip
    figures = {one["name"]: one for one in record["proof"]["figures"]}
    assert list(figures) == names and record["proof"]["artefact"] == names[-1]
    assert figures[names[-1]]["kl"] < 1e-7 and figures[names[-1]]["agreement"] == 1
    assert abs(figures[names[-1]]["loss"] - figures[names[0]]["loss"]) < 1e-5
    assert figures["merged on 16-bit"]["kl"] > 1e-5 < figures["4-bit base"]["kl"]
    for text in (done.stdout, (tmp_path / "out" / "README.md").read_text()):
        assert all(name in text for name in names) and f"{figures[names[1]]['perplexity']:.3f}" in text
    with torch.no_grad():
        trained = load_adapter_for_inference(result.run.adapter)[0](TOKENS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    difference = (merged - trained).abs().max()
    assert difference <= 1e-5
    figure = f"logits within {difference:.1e} of the 4-bit model with the adapter (1e-5 is allowed)"
    record_figure(15, "merged onto nf4: lora, adalora and dora", figure)


def test_the_figures_are_those_of_the_definition(finished, tmp_path):
    """Loss, KL and agreement of the 4-bit base, row by row in fp64."""
    _, result = finished
    job = prepare(Source(result.run.folder), quiet)
    merged = to_merged(job, tmp_path / "out", "nf4", ProofWanted(), quiet)
    model, _, _ = load_adapter_for_inference(result.run.adapter)
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for row in probe_rows(job.tokenizer, job.trained.info):
        ids, labels = torch.from_numpy(row.input_ids).long()[None], torch.from_numpy(row.labels).long()
        with torch.no_grad():
            p = model(ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                q = model(ids).logits[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(labels[1:].tolist()):
            if label != -100:
                loss -= float(q[position, label])
                kl += float((p[position].exp() * (p[position] - q[position])).sum())
                same += int(p[position].argmax() == q[position].argmax())
                count += 1
    base = merged.figures["proof"]["figures"][1]
    assert base["name"] == "4-bit base" and merged.figures["proof"]["tokens"] == count
    assert math.isclose(base["loss"], loss / count, rel_tol=1e-5)
    assert math.isclose(base["kl"], kl / count, rel_tol=1e-3) and base["agreement"] == same / count


def test_rows_of_the_user_are_taken(finished, tmp_path):
    _, result = finished
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(5, seed=3))
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "merged", "--prove", rows, "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert proof["rows"] == 5 and proof["data"] == "rows.jsonl" and proof["artefact"] == "merged on 16-bit"


def test_too_little_agreement_is_not_kept(finished, tmp_path):
    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "merged", "--min-agreement", "1")
    assert done.returncode == 1
    assert (
        "below the mark of 100.0%" in done.stderr and "4-bit base" in done.stderr and "--onto nf4" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def light(adapter, factor):
    modules = tuple(dataclasses.replace(m, b=m.b * factor, magnitude=None) for m in adapter if m.magnitude is None)
    return dataclasses.replace(adapter, modules=modules)


@pytest.fixture
def make(finished, tmp_path):
    """An adapter folder of the run's LoRA modules, their changes times a factor, on a bf16 or fp32 base."""
    _, result = finished

    def make(factor, dtype="bfloat16"):
        adapter = light(read_plain(result.run.adapter), factor)
        info = dataclasses.replace(adapter.info, dtype=dtype)
        save_plain(adapter.modules, info, tmp_path / "light", "all")
        return tmp_path / "light"

    return make


@pytest.mark.parametrize("factor", [0, 1e-6])
@pytest.mark.parametrize("onto", ["16bit", "nf4"])
def test_an_adapter_without_an_effect_is_told(make, tmp_path, onto, factor):
    """In bf16 a change of a millionth is rounded away, in the weights and beside them."""
    done = run_cli("export", make(factor), tmp_path / "out", "--to", "merged", "--onto", onto)
    assert done.returncode == 1, done.stderr
    lost = ("the adapter changes nothing", "the merged model equals the base", "the adapter was lost")
    assert any(text in done.stderr for text in lost)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_merge_that_kept_the_base_is_found_by_its_logits(finished, tmp_path, monkeypatch):
    """The base's weights under the name of the merged model, which no count of changed weights would show."""
    from qhybrid.errors import ProofError
    from qhybrid.export import as_model

    _, result = finished
    job = prepare(Source(result.run.folder), quiet)
    base = load_file(job.base / "model.safetensors")

    def swapped(*arguments, **options):
        written = arguments[8] if len(arguments) > 8 else options["written"]
        save_file(base, written / "model.safetensors", {"format": "pt"})
        return prove(*arguments, **options)

    prove = as_model.prove
    monkeypatch.setattr(as_model, "prove", swapped)
    with pytest.raises(ProofError, match="the adapter was lost: the merged model is no closer"):
        to_merged(job, tmp_path / "out", "16bit", ProofWanted(min_agreement=0), quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("onto", ["16bit", "nf4"])
@pytest.mark.parametrize("factor", [0.5, -1.0, 3.0, float("nan")])
def test_a_merge_with_another_scaling_is_found(finished, tmp_path, monkeypatch, factor, onto):
    """What is written is held against the same weights with the adapter beside them."""
    from qhybrid.errors import QhybridError
    from qhybrid.export import as_model

    _, result = finished
    job = prepare(Source(result.run.folder), quiet)

    def wrong(adapter, *arguments, **options):
        modules = tuple(dataclasses.replace(module, scaling=module.scaling * factor) for module in adapter)
        return bake(dataclasses.replace(adapter, modules=modules), *arguments, **options)

    bake = as_model.bake
    monkeypatch.setattr(as_model, "bake", wrong)
    with pytest.raises(QhybridError) as caught:
        to_merged(job, tmp_path / "out", onto, ProofWanted(min_agreement=0), quiet)
    texts = ("was lost", "with the adapter beside them at", "not finite")
    assert any(text in str(caught.value) for text in texts)
    assert list(tmp_path.iterdir()) == []


def test_figures_that_are_not_finite_are_refused():
    from qhybrid.errors import ProofError
    from qhybrid.export.proof import Figures, Proof, _judge

    good, bad = Figures("a", 1.0, 0.0, 1.0), Figures("b", float("nan"), float("nan"), 1.0)
    base = Figures("base", 2.0, 0.5, 0.5)
    proof = Proof(1, 9, "rows", (good, base, bad), "b", faithful=1.0, mark=0.0)
    with pytest.raises(ProofError, match="not finite"):
        _judge(proof, base)


def test_the_record_has_the_hash_of_every_file(finished, tmp_path):
    import hashlib

    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "merged", "--no-proof")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    files = {file.name: file for file in (tmp_path / "out").iterdir() if file.name != "export.json"}
    assert {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()} == record[
        "sha256"
    ]


def test_options_that_have_no_effect_are_refused(finished, tmp_path):
    _, result = finished
    for options in (
        ("--to", "peft", "--prove", "x"),
        ("--to", "merged", "--prove", "x", "--no-proof"),
        ("--to", "peft", "--gguf-type", "f16"),
        ("--to", "merged", "--prove", "missing.jsonl"),
        ("--to", "merged", "--no-proof", "--min-agreement", "0.9"),
    ):
        done = run_cli("export", result.run.folder, tmp_path / "out", *options)
        assert done.returncode == 2, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_merged_folder_needs_no_qhybrid(finished, tmp_path):
    _, result = finished
    done = run_cli("export", result.run.folder, tmp_path / "out", "--to", "merged", "--no-proof")
    assert done.returncode == 0 and "not proven" in done.stdout
    code = f"""
import sys, os
os.chdir({str(tmp_path / "out")!r})
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{{"role": "user", "content": "a"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(model.generate(**ids, max_new_tokens=3).shape)
assert not any(name.split(".")[0] == "qhybrid" for name in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
