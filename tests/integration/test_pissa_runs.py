"""A PiSSA run from end to end: resumed, read back, exported in every form, served, merged and compressed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import cut_back, run_cli, run_recipe, tiny_folder
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving_helpers import make_engine
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qhybrid.adapters.folder import read_plain, read_principal_parts
from qhybrid.adapters.info import read_adapter
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.errors import AdapterError, RunFolderError
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.recipe.schema import ModelSection, QuantizationSection
from qhybrid.serving.engine import BASE
from qhybrid.training import sft
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

TOKENS = torch.arange(4, 36)[None]
QUIET = Console(quiet=True)
BANDS = [
    {"band": "a", "layers": "0-1", "rank": 4, "init": "pissa"},
    {"band": "b", "layers": "2-3", "kind": "rslora", "rank": 3, "init": "pissa"},
    {"band": "c", "layers": "4", "kind": "adalora", "rank": 2, "adalora": {"init_rank": 4}},
    {"band": "d", "layers": "5", "kind": "dora", "rank": 4, "init": "pissa"},
]
LORA_BANDS = [*BANDS[:3], {"band": "d", "layers": "5", "rank": 4}]
SHAPE = {"intermediate_size": 128}  # whole NF4 blocks in each row


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **SHAPE)


def train(folder, model, method="nf4", bands=BANDS, **training):
    """A short run, and the logits of the model that was trained, from its own memory."""
    loaded = run_recipe(
        folder,
        model,
        adapters=bands,
        quantization={"method": method},
        training={"learning_rate": 2e-3, "save_strategy": "steps", "save_steps": 2, **training},
    )
    kept = []

    class Keep(sft.BandedTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "BandedTrainer", Keep)
        result = run_sft(loaded, console=QUIET)
    with torch.no_grad():
        return loaded, result.run, kept[0].model.eval()(TOKENS).logits


@pytest.fixture(scope="module", params=["nf4", "none"])
def trained(request, tmp_path_factory, model_folder):
    """All kinds: the recipe, the run, the logits and the quantisation."""
    return (*train(tmp_path_factory.mktemp(request.param), model_folder, request.param), request.param)


@pytest.fixture(scope="module", params=["nf4", "none"])
def lora_run(request, tmp_path_factory, model_folder):
    """Without DoRA, for programs that do not know it."""
    folder = tmp_path_factory.mktemp(f"lora-{request.param}")
    _, run, logits = train(folder, model_folder, request.param, LORA_BANDS)
    return run, logits, request.param


def logits_of(model) -> torch.Tensor:
    keep_exact_on_cpu(model)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def whole_base(folder: Path, method: str):
    return load_base(ModelSection(path=str(folder), dtype="float32"), QuantizationSection(method=method))


# ---- training ----


def test_it_is_read_back_exactly(trained):
    _, run, logits, _ = trained
    model, _, _ = load_adapter_for_inference(run.adapter)
    assert torch.equal(logits_of(model), logits)
    tensors = load_file(run.adapter / "adapter.safetensors")
    assert len([name for name in tensors if name.endswith((".lora_A0", ".lora_B0"))]) == 2 * 5 * 7
    first = run.checkpoints / "checkpoint-2"
    if first.is_dir():
        parts = [read_principal_parts(folder, read_adapter(run.adapter)[0]) for folder in (first, run.adapter)]
        assert all(part.equals(parts[1][name]) for name, part in parts[0].items())


def test_resuming_is_exact_and_decomposes_nothing(trained, tmp_path, monkeypatch):
    loaded, run, _, _ = trained
    cut = cut_back(run.folder, tmp_path / "run", 4)
    loaded = type(loaded)(loaded.recipe.model_copy(update={"output_dir": str(cut)}), loaded.path)
    monkeypatch.setattr("qhybrid.training.pissa.principal_parts", None)
    result = run_sft(loaded, resume=True, console=QUIET)
    for one, other in zip(
        read_events(run.events_file, "step"), read_events(result.run.events_file, "step"), strict=True
    ):
        assert (one["step"], one["loss"], one["grad_norm"]) == (other["step"], other["loss"], other["grad_norm"])
    for file in run.adapter.rglob("*.safetensors"):
        assert file.read_bytes() == (cut / "adapter" / file.relative_to(run.adapter)).read_bytes()


def test_a_run_on_another_base_is_not_resumed(trained, tmp_path, model_folder):
    """As for every kind, by the hash; the residual would be another too."""
    loaded, run, _, _ = trained
    cut = cut_back(run.folder, tmp_path / "run", 4)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    model = loaded.recipe.model.model_copy(update={"path": str(other)})
    recipe = loaded.recipe.model_copy(update={"output_dir": str(cut), "model": model})
    (cut / "recipe.yaml").write_text((cut / "recipe.yaml").read_text().replace(str(model_folder), str(other)))
    with pytest.raises(RunFolderError, match="its content has changed"):
        run_sft(type(loaded)(recipe, loaded.path), resume=True, console=QUIET)


def test_two_runs_give_equal_bytes(trained, tmp_path, model_folder):
    _, run, logits, method = trained
    torch.manual_seed(99)
    _, again, other = train(tmp_path, model_folder, method)
    assert torch.equal(logits, other)
    one, two = (folder.adapter / "adapter.safetensors" for folder in (run, again))
    assert one.read_bytes() == two.read_bytes()


# ---- exports ----


def by_peft(base: Path, folders: list[Path], method: str) -> torch.Tensor:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    config = nf4 if method == "nf4" else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(folders))])
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_peft_computes_what_was_trained_up_to_the_rounding_of_the_base(trained, tmp_path, model_folder):
    """Exactly on an unquantised base; on NF4 as far from it as the export says."""
    _, run, logits, method = trained
    done = run_cli("export", run.folder, tmp_path / "out", "--to", "peft")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["logits_difference"] <= 1e-5
    assert "PiSSA became LoRA of twice the rank" in done.stdout
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) >= {8, 6} and config["init_lora_weights"] is True
    for root in (tmp_path / "out", run.adapter / "peft"):
        difference = relative(by_peft(model_folder, [root / "lora", root / "dora"], method), logits)
        if method == "none":
            assert difference <= 1e-5 and record["logits_difference_as_trained"] <= 1e-5
        else:
            assert 1e-3 < difference < 1 and 1e-3 < record["logits_difference_as_trained"] < 1


def test_vllm_and_gguf_adapters_are_checked_the_same_way(lora_run, tmp_path, model_folder):
    run, logits, method = lora_run
    for target in ("vllm", "gguf"):
        done = run_cli("export", run.folder, tmp_path / target, "--to", target, "--json")
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert figures["logits_difference"] <= 1e-5
        assert (figures["logits_difference_as_trained"] <= 1e-5) == (method == "none")
    if method == "none":
        assert relative(by_peft(model_folder, [tmp_path / "vllm"], method), logits) <= 1e-5


def test_llama_cpp_computes_what_was_trained(lora_run, tmp_path, model_folder):
    from llama_cpp import LlamaCpp

    from qhybrid.export.gguf.model import write_gguf_model

    run, _, method = lora_run
    if method != "none":
        pytest.skip("llama.cpp has no NF4")
    write_gguf_model(model_folder, tmp_path / "base.gguf", dtype="f32")
    done = run_cli("export", run.folder, tmp_path / "gguf", "--to", "gguf")
    assert done.returncode == 0, done.stderr
    server = LlamaCpp(tmp_path / "base.gguf", next((tmp_path / "gguf").glob("*.gguf")))
    model, _, _ = load_adapter_for_inference(run.adapter)
    prompt = TOKENS[0, :8].tolist()
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 8:].tolist()
    assert server.greedy(prompt, len(expected)) == expected


@pytest.mark.parametrize("onto", ["nf4", "16bit"])
def test_merged_is_the_trained_residual_and_the_trained_factors(trained, tmp_path, onto, model_folder):
    _, run, logits, method = trained
    if onto == "nf4" and method == "none":
        pytest.skip("it was not trained on NF4")
    done = run_cli("export", run.folder, tmp_path / "out", "--to", "merged", "--onto", onto, "--min-agreement", 0)
    assert done.returncode == 0, done.stderr
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    if onto == "nf4" or method == "none":
        assert relative(merged, logits) <= 1e-5
    else:  # the same function without NF4's error
        plain = logits_of(whole_base(model_folder, "none"))
        assert relative(merged, plain) > 1e-3
        adapter = read_plain(run.adapter)
        from qhybrid.adapters.attach import attach_plain

        beside = attach_plain(whole_base(model_folder, "none"), adapter.modules, dtype=torch.float32)
        assert relative(merged, logits_of(beside)) <= 1e-5
    # The base without the adapter is the whole one, not what is left of it.
    record = json.loads((tmp_path / "out" / "export.json").read_text())["proof"]
    by_name = {figure["name"]: figure for figure in record["figures"]}
    base = by_name["4-bit base" if method == "nf4" else "16-bit base"]
    assert base["kl"] < 0.1  # without the principal parts it would be another model


def test_int8_stays_on_the_residual(trained, tmp_path):
    _, run, logits, _ = trained
    done = run_cli("export", run.folder, tmp_path / "int8", "--to", "int8", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    model, _, _ = load_adapter_for_inference(tmp_path / "int8")
    moved = relative(logits_of(model), logits)
    assert 0 < moved < 0.02 and abs(moved - figures["logits_difference"]) < 0.02
    kept = load_file(tmp_path / "int8" / "adapter_int8.safetensors")
    own = load_file(run.adapter / "adapter.safetensors")
    exact = [name for name in own if name.endswith((".lora_A0", ".lora_B0"))]
    assert exact and all(torch.equal(kept[name], own[name]) for name in exact)


def test_dora_is_refused_or_approximated_for_the_whole_base(trained, tmp_path):
    _, run, _, _ = trained
    done = run_cli("export", run.folder, tmp_path / "out", "--to", "vllm")
    assert done.returncode == 2 and "vLLM reads no DoRA" in done.stderr
    done = run_cli("export", run.folder, tmp_path / "out", "--to", "peft", "--dora-to-lora", 12, "--json")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)["dora_to_lora"]
    assert len(errors) == 7 and all(0 < one["error"] < 1 for one in errors.values())


# ---- several adapters, and what is made of them ----


def engine_logits(engine, name: str) -> torch.Tensor:
    model = engine._model
    served = engine.models[name].adapter
    with torch.no_grad(), engine.inference():
        if served != BASE:
            model.set_adapter(served, inference_mode=True)
            return model(TOKENS).logits
        with model.disable_adapter():
            return model(TOKENS).logits


def test_one_adapter_is_served_as_it_was_trained(trained, model_folder):
    _, run, logits, method = trained
    engine = make_engine([run.folder])
    assert relative(engine_logits(engine, run.folder.name), logits) <= 1e-6
    base = logits_of(whole_base(model_folder, method))
    found = relative(engine_logits(engine, engine.base), base)
    assert found <= 1e-5 if method == "none" else 0 < found < 0.3
    assert any("is what PiSSA left of the base" in note for note in engine.notes)


def test_adapters_that_began_alike_share_what_is_left(trained, tmp_path, model_folder):
    """Equal weights and ranks have equal principal parts; the data and the steps may differ."""
    _, run, logits, method = trained
    _, other, other_logits = train(tmp_path / "longer", model_folder, method, max_steps=14)
    shutil.copytree(other.adapter, tmp_path / "two")
    engine = make_engine([run.folder, tmp_path / "two"])
    assert relative(engine_logits(engine, run.folder.name), logits) <= 1e-6
    assert relative(engine_logits(engine, "two"), other_logits) <= 1e-6
    assert not torch.equal(logits, other_logits)


def test_beside_another_adapter_it_runs_on_the_whole_base_and_says_so(trained, tmp_path, model_folder):
    _, run, logits, method = trained
    _, plain, plain_logits = train(tmp_path / "plain", model_folder, method, [{"rank": 4}])
    shutil.copytree(plain.adapter, tmp_path / "lora")
    engine = make_engine([run.folder, tmp_path / "lora"])
    base = logits_of(whole_base(model_folder, method))
    assert torch.equal(engine_logits(engine, "lora"), plain_logits)
    assert torch.equal(engine_logits(engine, engine.base), base)
    found = relative(engine_logits(engine, run.folder.name), logits)
    note = next(note for note in engine.notes if "shares the base with others" in note)
    if method == "none":
        assert found <= 1e-5 and "differ from the trained ones by 0.00%" in note
    else:
        assert 1e-3 < found < 1 and "NF4" in note


def test_merge_takes_the_change_of_the_whole_base(lora_run, tmp_path):
    run, logits, method = lora_run
    done = run_cli("merge", tmp_path / "both", run.folder, f"{run.adapter}=0.5", "--method", "cat")
    assert done.returncode == 0, done.stderr
    assert "is PiSSA; what is merged is its change of the whole base" in done.stdout + done.stderr
    merged, own = ({m.module: m for m in read_plain(folder)} for folder in (tmp_path / "both", run.adapter))
    for name, module in own.items():
        torch.testing.assert_close(merged[name].delta(), 1.5 * module.delta(), atol=1e-5, rtol=1e-4)
        assert merged[name].num_principal == 0
    done = run_cli("merge", tmp_path / "one", run.folder, "--method", "svd", "--energy", "1")
    assert done.returncode == 0, done.stderr
    model, _, _ = load_adapter_for_inference(tmp_path / "one")
    found = relative(logits_of(model), logits)
    assert found <= 1e-4 if method == "none" else found < 1


@pytest.mark.parametrize("how", [("--rank", 4), ("--prune-terms", 0.4), ("--energy", 0.99)])
def test_compress_cuts_the_change_not_the_principal_part(lora_run, tmp_path, how):
    run, _, method = lora_run
    if method == "nf4":
        pytest.skip("the same arithmetic")
    done = run_cli("compress", run.folder, tmp_path / "small", *how, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["error"] < 0.8
    own = {module.module: module for module in read_plain(run.adapter)}
    for module in read_plain(tmp_path / "small"):
        before, after = own[module.module].delta().double(), module.delta().double()
        told = next(one for one in record["modules"] if one["module"] == module.module)
        assert float((before - after).norm() / before.norm()) == pytest.approx(told["error"], abs=1e-3)
    assert record["losses"]["after"] == pytest.approx(record["losses"]["before"], abs=0.05)


def test_inspect_shows_the_change(trained):
    _, run, _, _ = trained
    done = run_cli("inspect", run.folder, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pissa"] == 5 * 7
    own = {module.module: module for module in read_plain(run.adapter)}
    for module in report["modules"]:
        if module["kind"] != "adalora":
            assert module["norm"] == pytest.approx(float(own[module["module"]].delta().norm()), rel=1e-3)
            assert module["live_rank"] == module["rank"]
    assert "35 modules are PiSSA" in run_cli("inspect", run.folder).stdout


def test_other_versions_refuse_it(trained, tmp_path):
    """A reader that does not know A0 and B0 finds tensors that the layout does not tell of."""
    _, run, _, _ = trained
    shutil.copytree(run.adapter, tmp_path / "old")
    layout = (tmp_path / "old" / "layout.json").read_text().replace('"pissa"', '"kaiming"')
    (tmp_path / "old" / "layout.json").write_text(layout)
    with pytest.raises(AdapterError, match=r"not those of the layout; for example .*lora_A0"):
        read_plain(tmp_path / "old")
