"""The command as an attacker's victim runs it, in this process, and a finished run to take apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import THREE_BANDS, chat_rows, record_figure, run_recipe, write_rows
from rich.console import Console

from qhybrid.cli import main


@pytest.fixture
def command() -> Callable[..., int]:
    """Runs `qhybrid ARGUMENTS…` in this process and returns its exit code."""

    def run(*arguments: Any) -> int:
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return 0

    return run


@pytest.fixture(scope="module")
def silent(request) -> Iterator[list[Path]]:
    """The canaries that did not run; once all attacks are through, they are told under the module's CANARIES."""
    found: list[Path] = []
    yield found
    record_figure(*request.module.CANARIES, f"ran 0 times in {len(found)} attacks")


@pytest.fixture
def ran(tmp_path: Path, silent: list[Path]) -> Iterator[Path]:
    """The file that every canary of a test creates; it must not be there when the test ends."""
    file = tmp_path / "canary-ran"
    yield file
    assert not file.exists(), "what came with a model or a run was executed"
    silent.append(file)


@pytest.fixture
def project(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """recipe.yaml with a model folder, data and an output folder beside it, all its own."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", chat_rows(16))
    write_rows(tmp_path / "eval.jsonl", chat_rows(3, seed=5))
    recipe = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "adapters": THREE_BANDS,
        "data": {"sources": str(tmp_path / "train.jsonl")},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "max_length": 64,
            "save_strategy": "no",
        },
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe, indent=1))
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model_folder):
    """A finished run of six steps with a checkpoint at every second one; tests work on copies of it."""
    from qhybrid.training.sft import run_sft

    loaded = run_recipe(
        tmp_path_factory.mktemp("trained"),
        tiny_model_folder,
        training={"max_steps": 6, "save_strategy": "steps", "save_steps": 2},
    )
    return loaded, run_sft(loaded, console=Console(quiet=True))


@pytest.fixture
def crashed(trained, tmp_path: Path):
    """The recipe of that run, and its folder as a crash after step 5 leaves it."""
    loaded, result = trained
    folder = tmp_path / "run"
    shutil.copytree(result.run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    shutil.rmtree(folder / "adapter")
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**status, "status": "running", "figures": None}))
    recipe = loaded.recipe.model_copy(update={"output_dir": str(folder)})
    text = (folder / "recipe.yaml").read_text().replace(str(result.run.folder), str(folder))
    (folder / "recipe.yaml").write_text(text)
    return type(loaded)(recipe, loaded.path), folder
