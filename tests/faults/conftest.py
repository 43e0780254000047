"""How much the sweeps try, one uninterrupted run to hold others against, and a process that starts others."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import recipe_in, train


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether the sweeps run in full."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, tiny_model_folder):
    """The recipe and the folder of a finished run of ten steps, as `runs.EVALUATING` says."""
    loaded = recipe_in(tmp_path_factory.mktemp("uninterrupted"), tiny_model_folder)
    return loaded, train(loaded).run.folder


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Starts real processes without waiting for their imports; see `launcher.py`."""
    from launcher import Launcher

    with Launcher(Path(tmp_path_factory.mktemp("launcher"))) as started:
        yield started
