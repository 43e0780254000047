"""Settings for all tests: no network, deterministic order of threads, helpers importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: two threads wait for each other longer than one works, in the processes of tests too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")
    parser.addoption("--write-docs", action="store_true", help="write the docs that hold results of tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --all"))
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a chat tokenizer, saved once for all tests."""
    from helpers import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """As on the command line: no progress bars and notices of the libraries."""
    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
