"""Stages in real runs on NF4: the loss does not jump, frozen bands stand still, and a resume is exact anywhere."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import cut_back, run_cli, run_recipe
from rich.console import Console
from safetensors.torch import load_file

from qhybrid.adapters.folder import read_plain
from qhybrid.architecture.layout import Layout
from qhybrid.errors import LayoutError, RecipeError
from qhybrid.recipe.load import LoadedRecipe, dump_recipe
from qhybrid.training import sft
from qhybrid.training.events import read_events
from qhybrid.training.sft import run_sft

QUIET = Console(quiet=True)
EXACT = ("loss", "grad_norm", "learning_rates", "tokens", "regularizer", "live_ranks")
BANDS = [
    {"band": "low", "layers": "bottom", "rank": 4, "loraplus_lr_ratio": 4, "dropout": 0.1},
    {"band": "mid", "layers": "middle", "kind": "adalora", "rank": 3,
     "adalora": {"init_rank": 6, "final": 0.5, "warmup": 0.1}},
    {"band": "rs", "layers": "4", "kind": "rslora", "rank": 4},
    {"band": "high", "layers": "5", "kind": "dora", "rank": 4},
]  # fmt: skip
STAGES = [
    {"name": "grow", "at": 4, "expand": {"top": 0.5, "times": 2}},
    {"name": "wide", "when": "spectrum", "expand": {"by": 1, "to": 10, "budget": 1500},
     "spectrum": {"every": 2, "interval": 4, "threshold": 0.5, "release": 0.3}},
    {"name": "settle", "at": 10, "freeze": ["low", "mid"]},
    {"name": "flat", "when": "plateau", "plateau": {"patience": 1, "threshold": 0.5}, "unfreeze": "low"},
]  # fmt: skip
TRAINING = {
    "max_steps": 18,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_folder):
    """18 steps of four kinds in epochs of 10, with every kind of stage."""
    folder = tmp_path_factory.mktemp("staged")
    loaded = run_recipe(folder, tiny_model_folder, rows=40, adapters=BANDS, stages=STAGES, training=TRAINING)
    return loaded, run_sft(loaded, console=QUIET)


def stages_of(run) -> list[dict]:
    return [
        {k: v for k, v in event.items() if k != "time"} for event in read_events(run / "events.jsonl", "stage")
    ]


def layout_in(folder) -> Layout:
    return Layout.from_json((folder / "layout.json").read_bytes())


def ranks_in(folder) -> dict[str, int]:
    return {row.module: row.rank for row in layout_in(folder)}


def test_every_change_is_told_and_written_down(whole):
    _, result = whole
    folder = result.run.folder
    events = stages_of(folder)
    assert [(e["stage"], e["step"]) for e in events if e["stage"] != "wide"] == [
        ("grow", 4), ("settle", 10), ("flat", 15),
    ]  # fmt: skip
    grow, settle, flat = (next(e for e in events if e["stage"] == name) for name in ("grow", "settle", "flat"))
    assert len(grow["expanded"]) == 14 and all(g["after"] == 8 for g in grow["expanded"].values())
    assert settle["froze"] == ["low", "mid"] and settle["lowest_trained_layer"] == 4
    assert flat["unfroze"] == ["low"] and flat["frozen"] == ["mid"] and flat["lowest_trained_layer"] == 0
    changes = [e for e in events if e["expanded"]]
    assert len(changes) >= 2
    ranks = ranks_in(folder / "checkpoints" / "checkpoint-1")
    for event in changes:
        for module, growth in event["expanded"].items():
            assert ranks[module] == growth["before"]
            ranks[module] = growth["after"]
    assert ranks == ranks_in(folder) == ranks_in(folder / "adapter")
    spent = sum(e["num_parameters"] - e["num_parameters_before"] for e in changes if e["stage"] == "wide")
    assert 0 < spent <= 1500
    assert result.figures["stages_begun"] == ["grow", "wide", "settle", "flat"]
    assert result.figures["num_trained_parameters"] == events[-1]["num_parameters"]
    plain = {m.module: m.rank for m in read_plain(folder).modules if "layers.0." in m.module}
    assert plain.items() <= ranks.items() and 8 in plain.values()  # what eval and export read
    peft = json.loads((folder / "adapter" / "peft" / "lora" / "adapter_config.json").read_text())
    for row in layout_in(folder).of_kind("lora"):
        assert peft["rank_pattern"].get(row.module, peft["r"]) == row.rank
        alpha = peft["alpha_pattern"].get(row.module, peft["lora_alpha"])
        assert alpha == pytest.approx(row.scaling * row.rank) == row.alpha
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["num_trained_parameters_at_most"] >= result.figures["num_trained_parameters"]
    assert plan["num_trained_parameters"] == changes[0]["num_parameters_before"]


def test_frozen_bands_stand_still_to_the_bit(whole):
    folder = whole[1].run.folder / "checkpoints"
    bands = {row.module: row.band for row in layout_in(folder / "checkpoint-18")}

    def content(step: int):
        files = [
            load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors") for name in ("adapter", "optimizer")
        ]
        return {(bands[key.rpartition(".")[0]], key): value for part in files for key, value in part.items()}

    def moved(one: int, other: int) -> dict[str, set[bool]]:
        before, after = content(one), content(other)
        found: dict[str, set[bool]] = {}
        for (band, key), value in before.items():
            found.setdefault(band, set()).add(not value.equal(after[band, key]))
        return found

    assert moved(11, 15) == {"low": {False}, "mid": {False}, "rs": {True}, "high": {True}}
    assert moved(16, 18) == {"low": {True}, "mid": {False}, "rs": {True}, "high": {True}}


AROUND = [3, 4, 5, 10, 13, 15]


@pytest.mark.parametrize(
    "step", [*AROUND, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 19) if n not in AROUND)]
)
def test_resuming_is_exact_around_every_change(whole, tmp_path, step):
    """The checkpoint of step N is of the state before the stage that begins after N, which then begins again."""
    loaded, result = whole
    run = cut_back(result.run.folder, tmp_path / "run", step)
    recipe = loaded.recipe.model_copy(update={"output_dir": str(run)})
    again = run_sft(LoadedRecipe(recipe, loaded.path), resume=True, console=QUIET)
    assert again.run.resume_from.name == f"checkpoint-{step}"
    one, other = (
        {e["step"]: e for e in read_events(f / "events.jsonl", "step")} for f in (result.run.folder, run)
    )
    assert list(one) == list(other)
    for number, record in one.items():
        for key in EXACT:
            assert other[number].get(key) == record.get(key), (number, key)
    # What began after the checkpoint was cut back is logged once more.
    told = stages_of(run)
    assert [e for n, e in enumerate(told) if e not in told[:n]] == stages_of(result.run.folder)
    for name in ("adapter/adapter.safetensors", "layout.json", "checkpoints/checkpoint-18/optimizer.safetensors"):
        assert (run / name).read_bytes() == (result.run.folder / name).read_bytes()
    states = [
        json.loads((f / "checkpoints/checkpoint-18/state.json").read_text()) for f in (run, result.run.folder)
    ]
    assert states[0]["stages"] == states[1]["stages"]


def test_the_loss_does_not_jump(tmp_path, tiny_model_folder, monkeypatch):
    """Right before and right after every expansion, on the evaluation rows."""
    losses = []
    begin = sft.BandedTrainer.begin_stages

    def watched(self):
        step, before = self.state.global_step, self.evaluate()["eval_loss"] if self.state.global_step == 3 else 0
        changes = begin(self)
        if step == 3:
            losses.append((before, self.evaluate()["eval_loss"], len(changes[0].expanded)))
        return changes

    monkeypatch.setattr(sft.BandedTrainer, "begin_stages", watched)
    bands = [BANDS[0], {**BANDS[2], "layers": "2-3"}, {**BANDS[3], "layers": "4-5"}]
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-3)):
        loaded = run_recipe(
            tmp_path / dtype, tiny_model_folder, adapters=bands,
            model={"path": str(tiny_model_folder), "dtype": dtype, "adapter_dtype": dtype},
            stages=[{"at": 3, "expand": {"times": 3}}], training={"max_steps": 4, "learning_rate": 2e-2},
        )  # fmt: skip
        run_sft(loaded, console=QUIET)
        before, after, number = losses.pop()
        assert number == 42 and after == pytest.approx(before, rel=tolerance)


def watch_layers(model) -> dict[int, bool]:
    """Whether the output of each layer needed a gradient in the last forward pass of training."""
    seen: dict[int, bool] = {}

    def watch(number: int, layer) -> None:
        def look(module, inputs, output) -> None:
            if module.training:
                seen[number] = (output[0] if isinstance(output, tuple) else output).requires_grad

        layer.register_forward_hook(look)

    for number, layer in enumerate(model.get_base_model().model.layers):
        watch(number, layer)
    return seen


CHECKPOINTING = {
    "kept": {"gradient_checkpointing": False},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def test_the_backward_pass_ends_at_the_lowest_trained_layer(tmp_path, tiny_model_folder, monkeypatch):
    """However activations are kept; and what is trained is trained alike."""
    needs, watched = [], {}
    begin = sft.BandedTrainer.begin_stages

    def with_a_look(self):
        if self.state.global_step == 0:
            watched["layers"] = watch_layers(self.model)
        needs.append(dict(watched["layers"]))
        return begin(self)

    monkeypatch.setattr(sft.BandedTrainer, "begin_stages", with_a_look)
    bands = [{"band": "low", "layers": "0-3", "rank": 2}, {"band": "high", "layers": "4-5", "rank": 2}]
    losses = {}
    for name, checkpointing in CHECKPOINTING.items():
        needs.clear()
        loaded = run_recipe(
            tmp_path / name, tiny_model_folder, adapters=bands,
            stages=[{"at": 2, "freeze": "low"}, {"at": 4, "unfreeze": "low"}],
            training={"max_steps": 6, **checkpointing},
        )  # fmt: skip
        run = run_sft(loaded, console=QUIET).run
        assert [all(needs[step].values()) for step in (1, 2, 5)] == [True] * 3
        for step in (3, 4):
            assert needs[step] == {layer: layer >= 4 for layer in range(6)}, name
        losses[name] = [event["loss"] for event in read_events(run.events_file, "step")]
    assert losses["checkpointed"] == pytest.approx(losses["kept"], rel=1e-6)
    assert losses["reentrant"] == pytest.approx(losses["kept"], rel=1e-6)


def test_the_best_adapter_may_be_an_earlier_smaller_one(tmp_path, tiny_model_folder):
    """The loss falls and counts as worse for it, so the first evaluation is the best one."""
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"band": "all", "rank": 2}],
        stages=[{"at": 3, "expand": {"to": 5}}],
        training={
            "max_steps": 6, "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2,
            "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
        },
    )  # fmt: skip
    result = run_sft(loaded, console=QUIET)
    folder = result.run.folder
    assert result.figures["adapter_of_step"] == 2
    assert set(ranks_in(folder / "checkpoints/checkpoint-6").values()) == {5}
    assert set(ranks_in(folder).values()) == set(ranks_in(folder / "adapter").values()) == {2}
    best = (folder / "checkpoints/checkpoint-2/adapter.safetensors").read_bytes()
    assert (folder / "adapter/adapter.safetensors").read_bytes() == best
    # And so it is after a crash before the adapter was written.
    shutil.rmtree(folder / "adapter")
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**status, "status": "failed", "process": {}}))
    run_sft(loaded, resume=True, console=QUIET)
    assert (folder / "adapter/adapter.safetensors").read_bytes() == best
    assert set(ranks_in(folder).values()) == {2}


ADA = [
    {"band": "ada", "layers": "0-2", "kind": "adalora", "rank": 2, "adalora": {"init_rank": 4, "final": 4}},
    {"band": "rest", "layers": "3-5", "rank": 2},
]


def test_a_frozen_adalora_band_makes_up_for_its_last_allocation(tmp_path, tiny_model_folder):
    stages = [{"at": 4, "freeze": "ada"}, {"at": 9, "unfreeze": "ada"}]
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=ADA, stages=stages, training={"max_steps": 12})
    result = run_sft(loaded, console=QUIET)
    allocations = [e["step"] for e in read_events(result.run.events_file, "allocation")]
    assert [step for step in allocations if step > 4] == [10]  # step 8 was the one of the last allocation
    assert result.figures["live_ranks"] <= result.figures["target_ranks"] == 42
    records = read_events(result.run.events_file, "step")
    assert [r["regularizer"] > 0 for r in records] == [not 4 < r["step"] <= 9 for r in records]


def test_an_adalora_band_is_not_frozen_for_good_before_its_ranks_are_final(tmp_path, tiny_model_folder):
    stages = [{"at": 7, "freeze": "ada"}]
    loaded = run_recipe(tmp_path, tiny_model_folder, adapters=ADA, stages=stages, training={"max_steps": 12})
    with pytest.raises(RecipeError, match="its last allocation is after step 8") as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optim", "stage", "message"),
    [
        ("adafactor", {"expand": {"by": 1}}, "cannot go on when a matrix grows"),
        ("adamw_bnb_8bit", {"expand": {"by": 1}}, "cannot go on when a matrix grows"),
        ("paged_adamw_32bit", {"expand": {"by": 1}}, "cannot go on when a matrix grows"),
        ("schedule_free_adamw", {"freeze": "low"}, "a frozen band would not stand still"),
        ("lomo", {"freeze": "low"}, "a frozen band would not stand still"),
        ("adamw_torch", {"expand": {"bands": "low", "times": 20}}, "set expand.to to at most 32"),
        ("adamw_torch", {"expand": {"by": 1, "budget": 10}}, "expand.budget 10 is below"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    tmp_path, tiny_model_folder, optim, stage, message
):
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=BANDS, stages=[{"at": 2, **stage}],
        training={"optim": optim, "lr_scheduler_type": "constant"},
    )  # fmt: skip
    with pytest.raises((RecipeError, LayoutError), match=message) as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 2 and caught.value.hint and not (tmp_path / "run").exists()


def test_factored_states_may_be_frozen(tmp_path, tiny_model_folder):
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[BANDS[0], BANDS[3]], stages=[{"at": 2, "freeze": "low"}],
        training={"optim": "adafactor", "max_steps": 4, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    folder = run_sft(loaded, console=QUIET).run.checkpoints
    two, four = (load_file(folder / f"checkpoint-{n}" / "adapter.safetensors") for n in (2, 4))
    assert {("layers.5" in key) for key in two if not two[key].equal(four[key])} == {True}


def test_the_number_of_steps_is_known_only_with_the_data(tmp_path, tiny_model_folder):
    """Without max_steps a stage beyond the end is met when the training begins, and is no less an error."""
    loaded = run_recipe(
        tmp_path, tiny_model_folder, adapters=[{"rank": 2}], stages=[{"at": 9, "expand": {"by": 1}}],
        training={"max_steps": -1, "num_train_epochs": 1},
    )  # fmt: skip
    with pytest.raises(RecipeError, match="after step 9, and the run ends with step 8") as caught:
        run_sft(loaded, console=QUIET)
    assert caught.value.exit_code == 2


def test_the_command_line_tells_of_stages(tmp_path, tiny_model_folder):
    loaded = run_recipe(
        tmp_path, tiny_model_folder,
        adapters=[{"band": "a", "layers": "0-2", "rank": 2}, {"band": "b", "layers": "3-5"}],
        stages=[
            {"name": "grow", "at": 0.4, "expand": {"bands": "a", "by": 2}},
            {"name": "flat", "when": "plateau", "plateau": {"metric": "train_loss", "window": 9}, "freeze": "a"},
            {"name": "end", "at": 4, "freeze": "a"},
        ],
        training={"max_steps": 5},
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(loaded.recipe))
    planned = run_cli("plan", recipe)
    assert "; stages may make them" in planned.stdout
    done = run_cli("sft", recipe)
    assert done.returncode == 0, done.stderr
    for line in (
        "stage    grow: after 0.4 of all steps, expand all of a: 2 more in rank",
        "stage    grow after step 2: 21 modules from rank 2 to 4, ",
        "stage    flat is passed over after step 4: what it waited for has not come",
        "stage    end after step 4: frozen: a; the backward pass ends at layer 3",
        "2 of 3 begun (not flat);",
    ):
        assert line in done.stdout, done.stdout
    wrong = run_cli("sft", recipe, "stages.grow.expand.bands=[c]", "output_dir=x")
    assert wrong.returncode == 2 and "there is no band 'c'" in wrong.stderr and "command line" in wrong.stderr
    assert run_cli("recipes", "check", recipe).returncode == 0
    recipe.write_text(recipe.read_text().replace("by: 2", "by: 40"))
    beyond = run_cli("recipes", "check", recipe)
    assert beyond.returncode == 2 and "hint: set expand.to to at most 32" in beyond.stderr
