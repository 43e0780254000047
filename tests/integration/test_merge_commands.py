"""`qhybrid merge`, `compress` and `inspect` on adapters of a tiny LLaMA, as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from helpers import chat_rows, make_recipe, randomize_adapters, tiny_folder, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qhybrid.adapters.attach import attach
from qhybrid.adapters.folder import read_plain, save_adapter
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.peft_folder import write_peft_folder
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.base.fingerprint import config_hash, fingerprint
from qhybrid.base.load import load_base
from qhybrid.base.locate import weight_files
from qhybrid.base.tokenizer import load_tokenizer, save_tokenizer
from qhybrid.cli.main import main
from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.recipe.schema import ModelSection, QuantizationSection

TOKENS = torch.arange(4, 36)[None]
LORA = [{"band": "low", "layers": "0-2", "kind": "lora", "rank": 4, "alpha": 8}]
MIXED = [
    {"band": "low", "layers": "1-2", "kind": "rslora", "rank": 3, "target_modules": ["q_proj", "down_proj"]},
    {"band": "mid", "layers": "3-4", "kind": "adalora", "rank": 2, "adalora": {"init_rank": 4}},
]
DORA = [*LORA, {"band": "high", "layers": "4-5", "kind": "dora", "rank": 4}]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model_folder):
    """Adapters of one tiny model: lora, mixed (rsLoRA and AdaLoRA with dropped ranks) and dora; rows to score."""
    folder = tmp_path_factory.mktemp("adapters")
    write_rows(folder / "rows.jsonl", chat_rows(8, seed=4))
    for seed, (name, bands) in enumerate({"lora": LORA, "mixed": MIXED, "dora": DORA}.items()):
        save(folder / name, tiny_model_folder, bands, seed)
    return folder


def save(folder, base, bands, seed):
    section = ModelSection.model_validate({"path": str(base), "dtype": "float32"})
    layout = build_layout(
        make_recipe(adapters=bands), spec_from_config(json.loads((base / "config.json").read_text()))
    )
    model = attach(load_base(section, QuantizationSection(method="none")), layout, dtype=torch.float32)
    randomize_adapters(model, seed=seed, scale=0.2)
    for name, value in model.named_parameters():
        if "lora_lambda" in name:
            value.data[1] = 0  # a rank that the allocator dropped
    info = AdapterInfo(
        base_model=str(base), base_revision=None, quantization="none", double_quant=True, dtype="float32",
        adapter_dtype="float32", attn_implementation="sdpa", base_config_sha256=config_hash(base),
        base_sha256={name: facts["sha256"] for name, facts in fingerprint(weight_files(base)).items()},
    )  # fmt: skip
    save_adapter(model, layout, info, folder)
    save_tokenizer(load_tokenizer(section), folder)


def run(capsys, *arguments):
    """Exit code, standard output and standard error."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err, err
    return code, out, err


def logits(folder):
    model, _, _ = load_adapter_for_inference(folder)
    with torch.no_grad():
        return model(TOKENS).logits


def deltas(folder):
    return {plain.module: plain.delta() for plain in read_plain(folder)}


def edit_info(folder, **changes):
    file = folder / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_cat_is_the_sum_in_qhybrid_and_in_peft(places, tmp_path, capsys):
    code, out, err = run(
        capsys, "merge", tmp_path / "out", places / "lora", f"{places / 'mixed'}=-0.5", "--method", "cat"
    )
    assert (code, err) == (0, ""), err
    assert "none: cat is the weighted sum" in out and f"adapter  {tmp_path / 'out'}" in out
    one, other, merged = (deltas(place) for place in (places / "lora", places / "mixed", tmp_path / "out"))
    assert merged.keys() == one.keys() | other.keys()
    for name, value in merged.items():
        expected = one.get(name, 0) - 0.5 * other.get(name, 0)
        assert torch.allclose(value, torch.as_tensor(expected), rtol=1e-6, atol=1e-6)
    # The function too: a model with the sum of both changes in its weights.
    info = read_plain(places / "lora").info
    model = load_base(
        ModelSection.model_validate({"path": info.base_model, "dtype": "float32"}),
        QuantizationSection(method="none"),
    )
    with torch.no_grad():
        untouched = model(TOKENS).logits
        for name, value in merged.items():
            model.get_submodule(name).weight += value
        expected = model(TOKENS).logits
        for name, value in merged.items():
            model.get_submodule(name).weight -= value
        in_peft = PeftModel.from_pretrained(model, str(tmp_path / "out/peft/lora"))
        # Sums in another order, six layers deep.
        assert (logits(tmp_path / "out") - expected).abs().max() <= 1e-4
        assert (in_peft(TOKENS).logits - expected).abs().max() <= 1e-4
    assert (expected - untouched).abs().max() > 0.1
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["sources"] == [{"name": "lora", "weight": 1.0}, {"name": "mixed", "weight": -0.5}]
    assert str(tmp_path) not in (tmp_path / "out/merge.json").read_text()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (places / "lora" / file).read_bytes()


@pytest.mark.parametrize(
    "options", [["svd"], ["linear", "--rank", "3"], ["ties", "--density", "0.5"], ["dare_ties", "--seed", "3"],
                ["dare_linear", "--rank", "8"], ["magnitude_prune", "--energy", "0.8"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_the_other_methods_say_their_error_for_every_module(options, places, tmp_path, capsys):
    out_folder = tmp_path / "out"
    code, out, err = run(
        capsys, "merge", out_folder, places / "lora", places / "mixed", "--json", "--method", *options
    )
    assert (code, err) == (0, ""), err
    figures = json.loads(out)
    assert (
        figures["method"] == options[0] and figures["bytes"] == (out_folder / "adapter.safetensors").stat().st_size
    )
    merged = {plain.module: plain for plain in read_plain(out_folder)}
    assert merged.keys() == {module["module"] for module in figures["modules"]}
    for module in figures["modules"]:
        assert module["rank"] == merged[module["module"]].rank
        assert 0 <= module["error"] < 1 and module["norm"] > 0
    squares = sum(m["norm"] ** 2 for m in figures["modules"])
    lost = sum((m["norm"] * m["error"]) ** 2 for m in figures["modules"])
    assert figures["error"] == pytest.approx((lost / squares) ** 0.5)
    if options[0] in ("svd", "linear"):
        one, other = deltas(places / "lora"), deltas(places / "mixed")
        for module in figures["modules"]:
            name = module["module"]
            exact = torch.as_tensor(one.get(name, 0) + other.get(name, 0))
            error = float((merged[name].delta() - exact).norm() / exact.norm())
            assert error == pytest.approx(module["error"], abs=1e-5)
    assert torch.isfinite(logits(out_folder)).all()


def test_runs_peft_folders_and_names_with_an_equals_sign_are_sources(places, tmp_path, capsys):
    shutil.copytree(places / "lora", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text("{}")
    lora = read_plain(places / "lora")
    folder = tmp_path / "lr=0.5"
    write_peft_folder(lora.modules, lora.info.base_model, folder)
    sources = (f"{tmp_path / 'run'}=2", folder, f"{folder}=-1")
    code, _, err = run(capsys, "merge", tmp_path / "out", *sources, "--method", "svd", "--energy", "1")
    assert code == 0, err
    expected = deltas(places / "lora")
    for name, value in deltas(tmp_path / "out").items():
        assert torch.allclose(value, 2 * expected[name], rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["run", "lr=0.5", "lr=0.5"]


def test_refusals_are_one_message_and_leave_nothing(places, tmp_path, capsys, tiny_model_folder):
    other_base = tiny_folder(tmp_path / "other", rope_theta=5000.0)
    save(tmp_path / "stranger", other_base, LORA, 5)
    # The same configuration with other weights.
    reseeded = shutil.copytree(places / "lora", tmp_path / "reseeded")
    edit_info(reseeded, base_sha256={"model.safetensors": "0" * 64})
    nan = shutil.copytree(places / "lora", tmp_path / "nan")
    tensors = load_file(nan / "adapter.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, nan / "adapter.safetensors")
    lora = read_plain(places / "lora")
    write_peft_folder(lora.modules, "org/another", tmp_path / "named")
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.iterdir())
    good = places / "lora"
    for arguments, message in (
        ((tmp_path / "out", good, tmp_path / "stranger"), "their configurations differ"),
        ((tmp_path / "out", good, reseeded), "the weights differ"),
        ((tmp_path / "out", good, tmp_path / "named"), "name different base models"),
        ((tmp_path / "out", good, nan), "holds values that are not finite"),
        ((tmp_path / "out", good, places / "dora"), "has DoRA modules"),
        ((tmp_path / "out", good, tmp_path / "nothing"), "there is no folder"),
        ((tmp_path / "out", good, other_base), "is not an adapter folder"),
        ((tmp_path / "out", f"{good}=0"), "the weight of"),
        ((tmp_path / "out", f"{good}=nan"), "the weight of"),
        ((tmp_path / "out", f"{good}=1e-3x"), "which is no number"),
        ((tmp_path / "taken", good), "exists already"),
        ((tmp_path / ".hidden", good), "not a usable name"),
        ((tmp_path / "a\nb", good), "not a usable name"),
        ((tmp_path / "out", good, f"{good}=-1"), "nothing is left"),
    ):
        code, out, err = run(capsys, "merge", *arguments, "--method", "svd")
        assert (code, out) == (2, "") and message in err and err.startswith("error: "), (arguments, err)
        assert sorted(tmp_path.iterdir()) == before
    code, _, err = run(
        capsys, "merge", tmp_path / "out", good, tmp_path / "named", "--method", "cat", "--same-base"
    )
    assert code == 0 and "note:" in err and "name different base models" in err


def test_differences_in_template_and_quantization_are_said(places, tmp_path, capsys):
    other = shutil.copytree(places / "mixed", tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    edit_info(other, quantization="nf4", system_prompt="Be brief.")
    code, _, err = run(capsys, "merge", tmp_path / "out", places / "lora", other, "--method", "cat")
    assert code == 0 and err.count("note:") == 3
    for words in ("quantised differently", "system prompts", "chat templates"):
        assert words in err
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == (
        places / "lora/chat_template.jinja"
    ).read_bytes()


@pytest.mark.parametrize(("name", "options"), [("lora", ["--energy", "0.7"]), ("mixed", ["--rank", "1"]),
                                               ("dora", ["--prune-terms", "0.4"])])  # fmt: skip
def test_compress_shrinks_the_files_and_says_what_it_costs(name, options, places, tmp_path, capsys):
    source, out_folder = places / name, tmp_path / "out"
    code, out, err = run(
        capsys, "compress", source, out_folder, *options, "--data", places / "rows.jsonl", "--json"
    )
    phases = ["reading the adapter", "cutting", "loading the base model", "loss before", "loss after"]
    assert (code, err.split(" ...\n")[:-1]) == (0, phases), err
    figures = json.loads(out)
    for key, folder in (("before", source), ("after", out_folder)):
        file = folder / "adapter.safetensors"
        assert figures[f"bytes_{key}"] == file.stat().st_size
        assert figures[f"parameters_{key}"] == sum(value.numel() for value in load_file(file).values())
        scored = run(capsys, "eval", places / "rows.jsonl", "--adapter", folder, "--no-generation", "--json")
        # Both sum the same losses; fp32, and AdaLoRA's factors are multiplied in another order.
        assert figures["losses"][key] == pytest.approx(json.loads(scored[1])["loss"], abs=1e-5)
    assert figures["bytes_after"] < figures["bytes_before"]
    assert figures["losses"]["rows"] == 8 and figures["losses"]["data"] == "rows.jsonl"
    assert 0 < figures["error"] < 1
    small = deltas(out_folder)
    for plain in read_plain(source):
        (said,) = (module for module in figures["modules"] if module["module"] == plain.module)
        error = float((small.get(plain.module, 0) - plain.delta()).norm() / plain.delta().norm())
        assert said["error"] == pytest.approx(error, abs=1e-5)
        assert said["rank_after"] <= said["rank_before"]
    if name == "dora":
        before, after = ({m.module: m.magnitude for m in read_plain(f).dora} for f in (source, out_folder))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_compress_without_rows_takes_the_probe_and_without_a_base_no_loss(places, tmp_path, capsys):
    code, out, _ = run(capsys, "compress", places / "lora", tmp_path / "probe", "--energy", "0.9")
    assert code == 0 and "the loss is of built-in probe" in out and "over all modules: " in out
    moved = shutil.copytree(places / "dora", tmp_path / "moved")
    edit_info(moved, base_model="./gone")
    code, _, err = run(capsys, "compress", moved, tmp_path / "out", "--rank", "2")
    assert code == 2 and "--no-loss" in err and not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "compress", moved, tmp_path / "out", "--rank", "2", "--no-loss")
    assert code == 0 and "no loss was measured" in out and "(for DoRA inside the norm)" in out
    base = read_plain(places / "dora").info.base_model
    code, out, _ = run(capsys, "compress", moved, tmp_path / "out2", "--rank", "2", "--base", base)
    assert code == 0 and "loss " in out


def test_compress_never_makes_the_file_larger(places, tmp_path, capsys):
    lora = read_plain(places / "lora")
    falling = 100.0 ** -torch.arange(4)  # so that the last terms can go
    halves = [dataclasses.replace(m, a=m.a.bfloat16(), b=(m.b * falling).bfloat16()) for m in lora]
    write_peft_folder(halves, lora.info.base_model, tmp_path / "halves")
    code, out, err = run(
        capsys, "compress", tmp_path / "halves", tmp_path / "out", "--energy", "0.9999999", "--no-loss", "--json"
    )
    assert code == 0, err
    figures = json.loads(out)
    assert figures["bytes_after"] < figures["bytes_before"]
    assert 0 < figures["error"] < 2**-8  # rounding A and B to bf16; the cut is below a tenth of that
    assert {m.a.dtype for m in read_plain(tmp_path / "out")} == {torch.bfloat16}


@pytest.mark.parametrize("file", ["layout.json", "adapter.json"])
@pytest.mark.parametrize(
    "content", [b'{"a": "\xff"}', b"[" * 100_000, b"\xff\xfe{", b"[]", b'{"format_version": 1}']
)
def test_damaged_descriptions_are_one_message_with_the_file(file, content, places, tmp_path, capsys):
    folder = shutil.copytree(places / "lora", tmp_path / "a")
    (folder / file).write_bytes(content)
    code, out, err = run(capsys, "inspect", folder)
    assert (code, out) == (2, "") and err.startswith("error: ") and str(folder / file) in err


def test_compress_refusals(places, tmp_path, capsys):
    good = places / "lora"
    (tmp_path / "taken").write_text("")
    for arguments, message in (
        ((good, tmp_path / "out"), "give one of"),
        ((good, tmp_path / "out", "--rank", "2", "--energy", "0.9"), "give one of"),
        ((good, tmp_path / "out", "--rank", "64", "--no-loss"), "would not become smaller"),
        ((good, tmp_path / "taken", "--rank", "2"), "exists already"),
        ((good, tmp_path / "out", "--rank", "2", "--data", tmp_path / "no.jsonl"), "no.jsonl"),
        ((good, tmp_path / "out", "--rank", "2", "--limit", "3"), "--limit has no effect"),
        ((good, tmp_path / "out", "--rank", "2", "--no-loss", "--base", "x"), "--base has no effect"),
        ((tmp_path / "nothing", tmp_path / "out", "--rank", "2"), "there is no folder"),
    ):
        code, out, err = run(capsys, "compress", *arguments)
        assert (code, out) == (2, "") and message in err, (arguments, err)
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]


def test_inspect_tells_bands_and_spectra(places, capsys):
    code, out, err = run(capsys, "inspect", places / "mixed", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    low, mid = report["bands"]
    assert (low["band"], low["kind"], low["layers"], low["modules"]) == ("low", "rslora", [1, 2], 4)
    assert (mid["kind"], mid["modules"], mid["rank_sum"], mid["live_rank"]) == ("adalora", 14, 56, 42)
    exact = deltas(places / "mixed")
    tensors = load_file(places / "mixed" / "adapter.safetensors")
    assert sum(module["parameters"] for module in report["modules"]) == sum(t.numel() for t in tensors.values())
    for module in report["modules"]:
        sigma = torch.linalg.svdvals(exact[module["module"]].double())[: module["live_rank"]]
        assert module["norm"] == pytest.approx(float(sigma.norm()), rel=1e-5)
        assert module["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-4)
        assert 1 <= module["energy_rank_90"] <= module["energy_rank_99"] <= module["live_rank"] <= module["rank"]
        assert (
            1 <= module["stable_rank"] <= module["effective_rank"] * (1 + 1e-9) <= module["live_rank"] * (1 + 1e-9)
        )
    code, out, _ = run(capsys, "inspect", places / "mixed")
    lines = out.splitlines()
    assert any(line.split()[:2] == ["mid", "adalora"] and "42 of 56" in line for line in lines)
    assert sum("3 of 4" in line for line in lines) == 14


def test_inspect_shows_modules_without_a_rank_left(places, tmp_path, capsys):
    folder = shutil.copytree(places / "mixed", tmp_path / "a")
    tensors = load_file(folder / "adapter.safetensors")
    tensors["model.layers.3.mlp.up_proj.lora_lambda"].zero_()
    save_file(tensors, folder / "adapter.safetensors")
    code, out, err = run(capsys, "inspect", folder, "--module", "up_proj", "--json", "--plot", tmp_path / "p.svg")
    assert code == 0, err
    first, second = json.loads(out)["modules"]
    assert (first["layer"], first["live_rank"], first["norm"], first["singular_values"]) == (3, 0, 0, [])
    assert second["live_rank"] == 3
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_a_picture_without_matplotlib_says_what_to_install(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    code, _, err = run(capsys, "inspect", places / "lora", "--plot", tmp_path / "p.png")
    assert code == 2 and "qhybrid[plots]" in err and not list(tmp_path.iterdir())


def test_inspect_reads_peft_folders_and_filters(places, capsys, tmp_path):
    for folder, kind in (("lora", "lora"), ("dora", "dora")):
        code, out, _ = run(capsys, "inspect", places / "dora" / "peft" / folder, "--json")
        report = json.loads(out)
        assert code == 0 and {module["kind"] for module in report["modules"]} == {kind}
        assert "quantization" not in report["adapter"]  # which peft's folders do not say
    code, out, _ = run(capsys, "inspect", places / "dora", "--module", "layers.4", "--plot", tmp_path / "p.png")
    assert code == 0 and len([line for line in out.splitlines() if "_proj" in line]) == 7
    assert "for DoRA is inside the norm" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (("--module", "w_proj"), "no module matches 'w_proj'"),
        (("--plot", tmp_path / "p.png"), "exists already"),
        (("--plot", tmp_path / "p.jpeg"), "name it .png or .svg"),
        (("--plot", tmp_path / "no" / "p.png"), "there is no folder"),
    ):
        code, _, err = run(capsys, "inspect", places / "dora", *arguments)
        assert code == 2 and message in err
    assert sorted(tmp_path.iterdir()) == before
