"""One finished run for all integration tests."""

from __future__ import annotations

import pytest
from helpers import run_recipe
from rich.console import Console

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
