"""What adapter.json tells of a saved adapter: the base model that it belongs to, and how that was loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qhybrid.architecture.layout import Layout, first_fault
from qhybrid.errors import AdapterError
from qhybrid.recipe.schema import AttnImplementation, Dtype, Method
from qhybrid.recipe.tasks import FOLDER

LAYOUT, INFO = "layout.json", "adapter.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterInfo:
    """What is needed to load an adapter again: its base model and how that was loaded."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    base_model: str  # as the recipe names it
    base_revision: str | None  # the commit, for a model from the hub
    quantization: Method
    double_quant: bool
    dtype: Dtype  # of the base model's unquantised weights
    adapter_dtype: Dtype
    attn_implementation: AttnImplementation
    chat_template: str | None = None  # what conversations were rendered with
    system_prompt: str | None = None  # for conversations that have none
    date: str | None = None  # what chat templates that write the date were told (ISO 8601)
    base_config_sha256: str | None = None  # of what `base.fingerprint.config_hash` hashes
    base_sha256: dict[str, str] | None = None  # of the base model's weight files, by name
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def adapter_of_run(folder: Path) -> Path:
    """The adapter in a run folder; any other folder as it is.

    Raises:
        AdapterError: the run has none yet, or one for each of its tasks.
    """
    if not (folder / "run.json").is_file():
        return folder
    if (folder / "adapter").is_dir():
        return folder / "adapter"
    tasks = sorted(run.parent for run in (folder / FOLDER).glob("*/run.json"))
    if tasks:
        raise AdapterError(f"the run in {folder} has an adapter for each task", hint=f"name one: {tasks[0]}")
    raise AdapterError(f"the run in {folder} has not finished: it has no adapter yet")


def read_adapter(folder: Path) -> tuple[Layout, AdapterInfo]:
    """The layout and the description of a saved adapter.

    Raises:
        AdapterError: not an adapter folder of qhybrid, or one of another format version.
        LayoutError: its layout is damaged.
    """
    if not (folder / INFO).is_file() or not (folder / LAYOUT).is_file():
        nearby = [candidate.parent for candidate in sorted(folder.glob(f"*/{INFO}"))] if folder.is_dir() else []
        raise AdapterError(
            f"{folder} is not an adapter folder of qhybrid",
            hint=f"did you mean {nearby[0]}?" if nearby else f"it holds neither {INFO} nor adapter_config.json",
        )
    layout = Layout.from_json((folder / LAYOUT).read_bytes(), str(folder / LAYOUT))
    try:
        content = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if content.get("format_version") != FORMAT_VERSION:
            raise AdapterError(
                f"format version {content.get('format_version')} is not {FORMAT_VERSION}", where=str(folder / INFO)
            )
        return layout, TypeAdapter(AdapterInfo).validate_json(json.dumps(content))
    except ValidationError as error:
        raise AdapterError(f"not an adapter description: {first_fault(error)}", where=str(folder / INFO)) from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(f"not an adapter description: {error}", where=str(folder / INFO)) from None
