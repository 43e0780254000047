"""Names of axolotl, LLaMA-Factory and older trl: read, refused or left out, in files and on the command line."""

from __future__ import annotations

import pytest
from helpers import GOOD_RECIPE as GOOD
from helpers import recipe_error as error_of

from qhybrid.recipe.load import parse_recipe

FOREIGN = """\
base_model: org/model
load_in_4bit: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
lora_dropout: 0.05
sequence_len: 512
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: true
sample_packing: true
val_set_size: 0.1
datasets:
  - path: rows.jsonl
    type: alpaca
output_dir: out
"""


def test_an_axolotl_config_is_read_with_notices():
    recipe, notices = parse_recipe(FOREIGN, "axolotl.yaml")
    band = recipe.adapters[0]
    assert (band.rank, band.alpha, band.dropout) == (16, 32, 0.05)
    assert band.target_modules == ("q_proj", "v_proj")
    assert recipe.training.per_device_train_batch_size == 2 and recipe.training.max_length == 512
    assert recipe.training.packing and recipe.training.optim == "adamw_bnb_8bit"
    assert recipe.data.sources[0].format == "alpaca" and recipe.data.eval_fraction == 0.1
    assert "axolotl.yaml:9: micro_batch_size is read as training.per_device_train_batch_size" in notices


def test_a_llama_factory_config_is_read():
    recipe, _ = parse_recipe(
        "model_name_or_path: org/model\nstage: sft\ndo_train: true\nfinetuning_type: lora\nquantization_bit: 4\n"
        "lora_rank: 8\nlora_target: all\nuse_dora: true\ndataset: rows.json\ncutoff_len: 256\nval_size: 0.1\n"
        "output_dir: out\nper_device_train_batch_size: 1\n",
        "lf.yaml",
    )
    assert recipe.adapters[0].kind == "dora" and recipe.adapters[0].target_modules == ("all",)
    assert recipe.training.max_length == 256 and recipe.quantization.method == "nf4"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("load_in_8bit: true", "load_in_8bit"),
        ("quantization_bit: 8", "8 bits"),
        ("stage: dpo", "stage"),
        ("template: llama3", "chat template"),
        ("lora_rank: eight", "adapters.0.rank"),
        ("cutoff_len: long", "training.max_length"),
    ],
)
def test_foreign_settings_that_we_cannot_do(line, words):
    text = error_of(f"base_model: x\ndata: {{sources: a}}\noutput_dir: o\n{line}\n")
    assert words in text and "r.yaml:4" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "base_model: other\n", "different things"),
        (FOREIGN + "use_dora: true\nuse_rslora: true\n", "use_dora and use_rslora say different things"),
        (FOREIGN + "lora_rank: 32\n", "lora_r and lora_rank say different things about rank"),
        (FOREIGN + "adapters: [{rank: 4}]\n", "lora_r has no effect"),
    ],
)
def test_contradictions_between_two_names_are_refused(text, words):
    assert words in error_of(text)


@pytest.mark.parametrize(
    ("override", "dtype"), [("bf16=false", "float32"), ("fp16=true", "float16"), ("bf16=auto", "bfloat16")]
)
def test_foreign_precision_decides_the_dtype(override, dtype):
    recipe, _ = parse_recipe(FOREIGN.replace("bf16: true\n", ""), "axolotl.yaml", [override])
    assert recipe.model.dtype == dtype


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("learning_rate=1e-5", lambda r: r.training.learning_rate, 1e-5),
        ("training.learning_rate=1e-5", lambda r: r.training.learning_rate, 1e-5),
        ("cutoff_len=99", lambda r: r.training.max_length, 99),
        ("lora_rank=4", lambda r: r.adapters[0].rank, 4),
        ("adapters.all.rank=4", lambda r: r.adapters[0].rank, 4),
        ("adapters.0.lora_alpha=4", lambda r: r.adapters[0].alpha, 4),
        ("adapters=[{r: 3}]", lambda r: r.adapters[0].rank, 3),
        ("max_samples=7", lambda r: r.data.sources[0].limit, 7),
        ("use_dora=true", lambda r: r.adapters[0].kind, "dora"),
        ("base_model=org/other", lambda r: r.model.path, "org/other"),
        ("training.warmup_ratio=0.1", lambda r: r.training.warmup_steps, 0.1),
    ],
)
def test_the_command_line_wins_over_a_foreign_file(override, get, expected):
    text = FOREIGN.replace("lora_dropout: 0.05\n", "")  # which a dora band cannot have
    recipe, _ = parse_recipe(text, "axolotl.yaml", [override])
    assert get(recipe) == expected


def test_a_flat_rank_on_the_command_line_is_every_bands():
    recipe, notices = parse_recipe(GOOD, "r.yaml", ["lora_rank=5"])
    assert [band.rank for band in recipe.adapters] == [5, 5]
    assert notices == ["command line: lora_rank is read as adapters.rank"]


def test_keys_of_other_tools_without_a_counterpart():
    text = (
        FOREIGN
        + "pad_to_sequence_len: true\nwandb_project:\nlora_model_dir:\nlora_fan_in_fan_out:\nlocal_rank: 0\n"
    )
    recipe, notices = parse_recipe(text, "axolotl.yaml")
    assert recipe.adapters[0].rank == 16
    assert notices[-1].endswith("left out: pad_to_sequence_len, lora_model_dir, lora_fan_in_fan_out")
    both = error_of(FOREIGN + "evals_per_epoch: 4\noverwrite_output_dir: true\n")
    assert (
        "r.yaml:22: evals_per_epoch" in both
        and "r.yaml:23: overwrite_output_dir" in both
        and "--overwrite" in both
    )


def test_overrides_of_one_kind_do_not_depend_on_their_order():
    for overrides in (["fp16=true", "bf16=false"], ["bf16=false", "fp16=true"]):
        recipe, _ = parse_recipe(FOREIGN.replace("bf16: true\n", ""), "r", overrides)
        assert recipe.model.dtype == "float16"


def test_an_override_without_an_effect_says_so():
    _, notices = parse_recipe(GOOD, "r", ["wandb_project=x"])
    assert notices == ["command line: wandb_project has no effect"]
