"""What the integration tests share: one finished run, and adapters to serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_recipe
from rich.console import Console
from serving_helpers import info_of, load_test, save_banded

from qhybrid.adapters.folder import read_plain, save_plain
from qhybrid.training.sft import run_sft


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model_folder):
    """One run of three bands, with evaluation and checkpoints."""
    loaded = run_recipe(
        tmp_path_factory.mktemp("finished"),
        tiny_model_folder,
        training={
            "max_steps": 20,
            "eval_strategy": "steps",
            "eval_steps": 10,
            "save_strategy": "steps",
            "save_steps": 5,
            "save_total_limit": 2,
            "gradient_accumulation_steps": 2,
        },
    )
    return loaded, run_sft(loaded, console=Console(quiet=True))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_model_folder) -> dict[str, Path]:
    """Adapters of one base: two LoRA, one DoRA, one of three bands, and one on a few modules only, from peft."""
    folder = tmp_path_factory.mktemp("adapters")
    lora, other, dora = load_test.make_adapters(str(tiny_model_folder), folder, 3, scale=0.3)
    few = tuple(module for module in read_plain(lora) if "layers.1." in module.module)
    save_plain(few, info_of(tiny_model_folder), folder / "made", "few")
    banded = save_banded(tiny_model_folder, folder / "banded", 5)
    return {"lora": lora, "other": other, "dora": dora, "banded": banded, "few": folder / "made" / "peft" / "lora"}
