"""A model's config.json without downloading anything: from its folder, the hub's cache, or the catalog."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhybrid.architecture.catalog import find_model, nearest_names
from qhybrid.architecture.spec import ModelSpec, read_config, spec_from_config
from qhybrid.base.locate import find_local, hub_name
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model before it is here."""

    config: dict[str, Any]
    spec: ModelSpec
    source: str  # "config.json of …" or "the catalog's llama-2-7b"
    hub_id: str | None = None  # where the catalog knows it


def model_facts(model: ModelSection, config: str | Path | None = None) -> ModelFacts:
    """The facts about `model`, or about the config.json (or folder) `config` in its place.

    Raises:
        ModelError: no config is at hand, or it is not one of a supported family.
    """
    if config is not None:
        return _from_file(Path(config))
    if re.fullmatch(r"[\w.\-@ ]+", model.path) and not model.path.startswith(".") and not _is_here(model.path):
        return _from_catalog(model.path)  # a bare name
    files = find_local(model)
    if files is None:
        cached = _hub_cache(model)
        return _from_file(cached) if cached else _from_catalog(model.path)
    if files.kind == "folder":
        return _from_file(files.path / "config.json")
    return _from_catalog(files.path.name.split(".Q")[0].removesuffix(".gguf"))


def _is_here(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False


def _from_file(path: Path) -> ModelFacts:
    file = path / "config.json" if path.is_dir() else path
    values = read_config(file)
    return ModelFacts(values, spec_from_config(values, str(file)), str(file))


def _from_catalog(name: str) -> ModelFacts:
    entry = find_model(name)
    if entry is None:
        near = nearest_names(name)
        raise ModelError(
            f"the config.json of {name} is not on this machine, and the catalog does not know the model",
            hint=(f"did you mean {' or '.join(near)}? " if near else "")
            + "name a config.json or a model folder with --config; no weights are needed",
        )
    spec = spec_from_config(entry.config, entry.name)
    return ModelFacts(entry.config, spec, f"the catalog's {entry.name}", entry.hub_id)


def _hub_cache(model: ModelSection) -> Path | None:
    """The config.json of a hub model that was downloaded before."""
    repo, revision = hub_name(model.path, model.revision)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub") / f"models--{repo.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError):  # a commit in full, or nothing
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    file = folder / "snapshots" / commit / "config.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return file
