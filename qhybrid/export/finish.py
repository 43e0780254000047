"""What every result gets in the end: tokenizer, model card, and a record with figures and hashes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qhybrid import __version__
from qhybrid.base.tokenizer import save_tokenizer
from qhybrid.disk import write_bytes
from qhybrid.export.card import Artefact, write_card
from qhybrid.export.job import Job
from qhybrid.export.names import public_name
from qhybrid.export.resumable import FINISHED, sha256_of
from qhybrid.redaction import redacted_values

RECORD = "export.json"


@dataclass(frozen=True)
class Exported:
    """What was written, in lines for the user and figures for programs."""

    folder: Path
    lines: tuple[str, ...]
    figures: dict[str, Any] = field(default_factory=dict)


def finish(
    job: Job,
    folder: Path,
    target: str,
    figures: dict[str, Any],
    artefact: Artefact,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write tokenizer, model card and record; the record last, with the hashes of all other files.

    Args:
        hashes: SHA-256 of files that are known already.

    Raises:
        OSError: the disk is full or fails.
    """
    known = hashes or {}
    if target not in ("gguf", "merged"):  # the one holds it in its file, the other has it already
        save_tokenizer(job.tokenizer, folder)
    if job.approximated:
        rows = [("module", "rank", "error of ΔW")]
        rows += [(one.module.module, str(one.module.rank), f"{one.error:.2%}") for one in job.approximated]
        artefact = dataclasses.replace(artefact, errors=tuple(rows))
    write_card(artefact, job.adapter, folder)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    if FINISHED in files:  # it goes when the folder is whole
        files.remove(FINISHED)
    record = {
        "target": target,
        "base_model": public_name(job.adapter.info.base_model),
        "is_base_known": job.is_base_known,
        "qhybrid": __version__,
        **figures,
        "sha256": {name: known.get(name) or sha256_of(folder / name) for name in files},
    }
    write_bytes(folder / RECORD, (json.dumps(redacted_values(record), indent=2) + "\n").encode())


def told_approximation(job: Job) -> tuple[str, ...]:
    """A line on DoRA modules that became LoRA, if some did."""
    if not job.approximated:
        return ()
    errors = [one.error for one in job.approximated]
    worst = max(job.approximated, key=lambda one: one.error)
    return (
        f"{len(errors)} DoRA modules became LoRA of rank {worst.module.rank}: ||ΔW − B·A|| is "
        f"{sum(errors) / len(errors):.1%} of ||ΔW|| on average, {worst.error:.1%} at most ({worst.module.module})",
    )
