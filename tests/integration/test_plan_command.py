"""`qhybrid plan` as a user runs it: offline, without torch, with an exit code."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.catalog import find_model
from qhybrid.architecture.spec import spec_from_config
from qhybrid.cli.main import main
from qhybrid.recipe.load import load_recipe, parse_recipe


def qhybrid(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As on the command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def plan_json(*arguments: str) -> dict[str, Any]:
    done = qhybrid("plan", *arguments, "--json")
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_no_heavy_library_is_loaded():
    code = (
        "import sys; from qhybrid.cli.main import main\n"
        "try: main(['plan', '--model', 'llama-2-70b', '--vram', '80GiB', '--json'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'bitsandbytes', 'datasets', 'accelerate', 'numpy'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_plan_without_a_recipe():
    plan = plan_json("--model", "llama-2-70b", "--vram", "80GiB")
    assert plan["fits"] is True
    assert plan["budget_bytes"] == 80 * 2**30
    # 68,452,089,856 weights of the decoder's linears at 4.127 bits are 35.3 GB.
    assert plan["components"]["base weights"] == pytest.approx(
        68_452_089_856 * (0.5 + 1 / 64 + 4 / 16384), rel=1e-3
    )
    assert sum(plan["components"].values()) == plan["needed_bytes"]
    assert plan["allocated_bytes"] < plan["reserved_bytes"] < plan["needed_bytes"]
    assert plan["num_trained_parameters"] == 207_093_760


def test_the_exit_code_is_the_verdict():
    fits = qhybrid("plan", "llama2_7b_instruct", "--gpu", "RTX 4090")
    assert fits.returncode == 0
    assert "fits: " in fits.stdout and "RTX 4090" in fits.stdout and "what is left could buy" in fits.stdout
    too_much = qhybrid("plan", "llama2_7b_instruct", "--vram", "5GiB")
    assert too_much.returncode == 1
    assert "does not fit" in too_much.stdout and "to make it fit:" in too_much.stdout
    hopeless = qhybrid("plan", "--model", "llama-2-70b", "--gpu", "4090")
    assert hopeless.returncode == 1 and "do not suffice" in hopeless.stdout
    assert qhybrid("plan", "--model", "llama-2-70b").returncode == 0  # nobody named a limit


def test_the_advice_can_be_pasted():
    done = qhybrid("plan", "llama2_7b_instruct", "--vram", "6GiB")
    lines = done.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("to make it fit"))
    words = [line.split() for line in lines[start + 1 :] if "=" in line]
    again = qhybrid("plan", "llama2_7b_instruct", *[word for line in words for word in line], "--vram", "6GiB")
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize("quantity", ["rank", "micro_batch", "max_length", "checkpointing"])
def test_solving(quantity: str):
    plan = plan_json("llama2_7b_instruct", "--gpu", "RTX 4090", "--solve", quantity)
    assert plan["fits"] is True
    assert plan["solved"] is not None
    if quantity == "rank":
        assert {cap["band"]: cap["got"] for cap in plan["rank_caps"]} == plan["solved"]


def test_a_recipe_beside_it(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {path: meta-llama/Llama-3.1-8B}\nadapters: [{rank: 16}]\ndata: {sources: r.jsonl}\n"
        "training: {max_length: 2048, per_device_train_batch_size: 1}\noutput_dir: out\n"
    )
    before = plan_json(str(recipe))
    assert before["fits"] is None
    after = plan_json(str(recipe), "training.max_length=8192")
    assert after["needed_bytes"] > before["needed_bytes"]


def test_a_config_file_stands_for_the_model(tmp_path: Path, tiny_model_folder: Path):
    assert plan_json("--model", str(tiny_model_folder))["needed_bytes"] > 0
    config = tmp_path / "config.json"
    config.write_text((tiny_model_folder / "config.json").read_text())
    assert plan_json("--model", "nobody/knows-it", "--config", str(config))["needed_bytes"] > 0


def test_a_simulation_beside_the_closed_form(tiny_model_folder: Path):
    plan = plan_json("--model", str(tiny_model_folder), "--simulate", "training.max_length=256")
    simulated, closed = (
        plan["simulated"]["allocated_bytes"],
        sum(plan["moments"][plan["peak_moment"]] for _ in "1"),
    )
    assert closed == pytest.approx(simulated, rel=0.03)


@pytest.mark.parametrize(
    "section", ["schedule: {name: increasing, budget: 20M}", "ranks: {method: gora, budget: 20M}"]
)
def test_a_recommendation_takes_nothing_of_the_recipes_own_ranks(tmp_path, section):
    """What it says of the memory is what the recipe that it prints takes; and the control has its ranks."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"model: {{path: llama-2-7b}}\nadapters: {{{section}, kind: lora}}\ndata: {{sources: rows.jsonl}}\n"
        "training: {max_length: 1024}\noutput_dir: out\n"
    )
    asked = ["--vram", "5GiB", "--task", "reasoning", "--rows", "20000", "--recommend"]
    content = json.loads(qhybrid("plan", str(mine), *asked, "--json").stdout)
    recipe, _ = parse_recipe(content["recipe"], "recommended")
    spec = spec_from_config(find_model("llama-2-7b").config)
    counted = build_layout(recipe, spec).num_parameters
    assert content["plan"]["num_trained_parameters"] == counted
    ranks = {band.rank for band in recipe.adapters}
    assert len(ranks) == 1 and max(ranks) < 32
    told = " ".join(content["notes"])
    assert set(map(int, re.findall(r"rank: (\d+)", told))) == ranks
    assert f"alpha: {recipe.adapters[1].alpha:g}" in told


def test_a_recommendation_is_a_recipe_that_fits():
    done = qhybrid(
        "plan", "--model", "llama-2-7b", "--vram", "24GiB", "--recommend", "--task", "generation",
        "--rows", "52000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe, _ = parse_recipe(done.stdout, "recommended")
    assert [band.band for band in recipe.adapters] == ["bottom", "middle", "top"]
    assert done.stdout.count("[1]") >= 2  # each reason has its source
    tight = qhybrid(
        "plan", "--model", "llama-2-7b", "--vram", "7GiB", "--json",
        "--recommend", "--task", "reasoning", "--rows", "500000",
    )  # fmt: skip
    content = json.loads(tight.stdout)
    assert any(cap["got"] < cap["asked"] for cap in content["plan"]["rank_caps"])
    ranks = {band.band: band.rank for band in parse_recipe(content["recipe"], "capped")[0].adapters}
    assert ranks == {cap["band"]: cap["got"] for cap in content["plan"]["rank_caps"]}
    assert "lowered from" in content["recipe"]


GOOD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_attention_heads": 10**12}, "num_attention_heads is 1000000000000"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"model_type": "mixtral"}, "not a supported architecture"),
        ({"model_type": None}, "not a supported architecture"),
        ({"num_attention_heads": 128}, "head_dim"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
        ({"model_type": "mistral", "sliding_window": -5}, "sliding_window is -5"),
    ],
)
def test_an_absurd_config_is_one_message(change: dict[str, Any], said: str, tmp_path: Path):
    config = tmp_path / "config.json"
    values = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    config.write_text(json.dumps(values))
    done = qhybrid("plan", "--model", "x/y", "--config", str(config))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and said in done.stderr and str(config) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama-2-7b", "--vram", "24"], "no unit"),
        (["--model", "llama-2-7b", "--vram", "0GiB"], "more than zero"),
        (["--model", "llama-2-7b", "--vram", "lots"], "not an amount"),
        (["--model", "llama-2-7b", "--gpu", "RTX 9999"], "RTX 9999"),
        (["--model", "llama-2-7b", "--context", "1"], "no unit"),
        (["--model", "llama-2-7b", "--solve", "rank"], "needs a limit"),
        (["--model", "lama-2-7b"], "llama-2-7b"),
        (["--model", "org/unknown-model-1b"], "--config"),
        ([], "Name a recipe"),
        (["--model", "llama-2-7b", "--recommend"], "--task and --rows"),
        (["--model", "llama-2-7b", "--rows", "5"], "--recommend"),
        (["--model", "llama-2-7b", "--recommend", "--task", "genration", "--rows", "5"], "generation"),
        (["--model", "llama-2-7b", "--device", "cpu", "--gpu", "4090"], "--gpu has no effect"),
        (["--model", "llama-2-7b", "adapters.0.layers=40-50"], "out of range"),
        (["--model", "llama-2-7b", "adapters.0.rank_weight=1000"], "rank_weight"),
        (["--model", "llama-2-7b", "adapters.0.rank_weight=0.001"], "rank_weight"),
        (["--model", "llama-2-7b", "--simulate", "distributed.processes=2"], "--simulate"),
        (["--model", "llama-2-7b", "memory.checkpoint_layers=40"], "memory.checkpoint_layers"),
        (["--model", "llama-2-7b", "distributed.processes=64", "distributed.zero_stage=3"], "64"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], said: str):
    done = qhybrid("plan", *arguments)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr and said in done.stderr


def test_the_smaller_of_two_limits_counts():
    plan = plan_json("llama2_7b_instruct", "memory.vram=12GiB", "--gpu", "RTX 4090")
    assert plan["budget_bytes"] == 12 * 2**30 and plan["budget_source"] == "memory.vram"
    refused = qhybrid("plan", "llama2_7b_instruct", "--vram", "80GiB", "--gpu", "RTX 4090")
    assert refused.returncode == 2 and "more than the RTX 4090 has" in refused.stderr


def test_nothing_is_solved_where_nothing_fits():
    done = qhybrid("plan", "llama2_7b_instruct", "--vram", "1GiB", "--solve", "rank", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["solved"] is None


def test_a_plan_that_does_not_fit_says_what_a_run_would_do():
    done = qhybrid("plan", "llama2_7b_instruct", "adapters.top.rank=1024", "--vram", "10GiB")
    assert done.returncode == 1 and "qhybrid sft lowers the ranks" in done.stdout


@pytest.mark.parametrize("names", [("v1.0", "x"), ("1", "0")])
def test_advice_for_bands_with_odd_names_hits_the_right_band(tmp_path: Path, names: tuple[str, str]):
    recipe = tmp_path / "odd.yaml"
    layers = ("0-15", "16-31")
    bands = [{"band": name, "layers": own, "rank": 64} for name, own in zip(names, layers, strict=True)]
    values = {
        "model": {"path": "meta-llama/Llama-2-7b-hf"},
        "adapters": bands,
        "data": {"sources": "r.jsonl"},
        "training": {"per_device_train_batch_size": 1, "max_length": 512},
        "output_dir": "out",
    }
    recipe.write_text(yaml.safe_dump(values))
    done = qhybrid("plan", str(recipe), "--vram", "24GiB", "--solve", "rank")
    words = next(line for line in done.stdout.splitlines() if line.startswith("solved")).split()[1:]
    pasted = plan_json(str(recipe), *words, "--vram", "24GiB")
    assert pasted["fits"] is True
    assert pasted["needed_bytes"] == plan_json(str(recipe), "--vram", "24GiB", "--solve", "rank")["needed_bytes"]


def test_every_other_layer_is_not_all_layers():
    kwargs = "training.gradient_checkpointing_kwargs={every_n_layers: 2}"
    all_layers = plan_json("llama2_7b_instruct")["needed_bytes"]
    assert plan_json("llama2_7b_instruct", kwargs)["needed_bytes"] > all_layers
    limit = f"{all_layers + 2**20}B"
    solved = plan_json("llama2_7b_instruct", kwargs, "--vram", limit, "--solve", "checkpointing")
    assert solved["fits"] is True
    both = qhybrid("plan", "llama2_7b_instruct", kwargs, "memory.checkpoint_layers=0")
    assert both.returncode == 2 and "every_n_layers" in both.stderr


def test_one_layer_may_be_written_as_a_number():
    assert plan_json("llama2_7b_instruct", "memory.checkpoint_layers=0")["needed_bytes"] > 0


def test_every_shipped_recipe_fits_24_gib():
    from qhybrid.recipe.shipped import shipped_names

    for name in shipped_names():
        plan = plan_json(name, "--vram", "24GiB")
        assert plan["fits"] is True, name
        assert load_recipe(name).recipe.adapters
