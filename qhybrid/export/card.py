"""The model card that goes with a result: what it is, how to load it, proof, recipe, data and memory.

Nothing of this machine is in it: paths are cut to their last part, secrets and the home directory are hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qhybrid.adapters.plain import PlainAdapter
from qhybrid.errors import QhybridError
from qhybrid.export.names import is_hub_id, public_name
from qhybrid.export.proof import Proof
from qhybrid.recipe.load import load_recipe
from qhybrid.redaction import redacted, redacted_values
from qhybrid.training.run import Run
from qhybrid.training.summary import summary_rows
from qhybrid.units import format_count

CARD = "README.md"


@dataclass(frozen=True)
class Artefact:
    """What the card is about.

    Attributes:
        kind: one sentence on what lies in the folder.
        library: "peft", "transformers" or "llama.cpp", as the hub calls them.
        loading: the code or commands that load it, with their language, for the card.
        notes: what else is to be known, a sentence each.
        found: what was measured when it was held against the source, a line each.
    """

    name: str
    kind: str
    library: str
    loading: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    proof: Proof | None = None
    errors: tuple[tuple[str, ...], ...] = field(
        default=()
    )  # a header and rows, for conversions that are not exact


def write_card(artefact: Artefact, adapter: PlainAdapter, folder: Path) -> None:
    """Write README.md into `folder`.

    Raises:
        OSError: the disk is full or fails.
    """
    (folder / CARD).write_text(redacted(_card(artefact, adapter)), encoding="utf-8")


def _card(artefact: Artefact, adapter: PlainAdapter) -> str:
    base = public_name(adapter.info.base_model)
    head: dict[str, Any] = {"library_name": artefact.library, "pipeline_tag": "text-generation"}
    if is_hub_id(base):
        head["base_model"] = base
    head["tags"] = ["qhybrid", "dora" if adapter.dora and not adapter.lora else "lora"]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {artefact.name}",
        f"{artefact.kind} Base model: `{base}`. Made with qhybrid.",
        *artefact.notes,
        "## How to load it",
        *(f"```{language}\n{code.rstrip()}\n```" for language, code in artefact.loading),
    ]
    if artefact.proof is None:
        parts += ["## Proof", *(artefact.found or ("Nothing was measured.",))]
    else:
        proof = artefact.proof
        parts += [
            "## Proof",
            f"Measured on {proof.rows} rows ({proof.data}), {proof.tokens} tokens. KL is KL(trained model‖form), "
            "in nats a token; * is what lies here.",
            _markdown(proof.table()),
            f"* has the top token of the same weights with the adapter beside them at {proof.faithful:.1%}.",
        ]
    if artefact.errors:
        parts += ["## What the conversion changed", _markdown(artefact.errors)]
    parts += _training(adapter.source)
    if adapter.info.versions:
        versions = ", ".join(f"{name} {version}" for name, version in adapter.info.versions.items())
        parts += ["## Versions", f"Trained with {versions}."]
    return "\n\n".join(parts) + "\n"


def _training(source: Path) -> list[str]:
    """Recipe, data and memory of the run that the adapter lies in, as far as they are there."""
    run = Run(source.parent)
    status = run.status
    if source.name != "adapter" or status is None:
        return []
    parts: list[str] = []
    try:
        recipe = load_recipe(str(run.recipe_file)).recipe
        content = recipe.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    except (QhybridError, OSError):
        content = None
    if content is not None:
        text = yaml.safe_dump(redacted_values(_without_paths(content)), sort_keys=False, allow_unicode=True)
        parts += ["## Recipe", f"```yaml\n{text}```"]
    try:
        audit = json.loads(run.audit_file.read_text(encoding="utf-8"))
        rows = [("data", "used for", "rows", "kept", "repaired", "dropped", "tokens")]
        for use, key in (("training", "sources"), ("evaluation", "eval_sources")):
            for one in audit[key]:
                counts = [format_count(one[name]) for name in ("rows_in", "kept", "repaired", "dropped")]
                rows.append((public_name(one["path"]), use, *counts, format_count(one["tokens"]["total"])))
        parts += ["## Data", _markdown(rows)]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # of an older version, or removed: the card does without
    figures = status.get("figures")
    if figures:
        parts += ["## The run", _markdown([("", ""), *summary_rows(figures)])]
    return parts


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or (":\\" in value)):
        return public_name(value)
    return value


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
