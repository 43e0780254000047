"""Checkpoints that can be trusted: sealed with a manifest, chosen by step, pruned only after a newer seal."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write the manifest, last of all files: the size and SHA-256 of every other one."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there and every file is as it was when it was sealed."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == facts["bytes"] and _sha256(folder / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def step_of(folder: Path) -> int:
    """The optimizer step of "checkpoint-120", or -1 for another name."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "checkpoint" and number.isdigit() else -1


def newest_sealed(folder: Path) -> Path | None:
    """The checkpoint of the highest step that is whole, or None."""
    found = [candidate for candidate in folder.glob("checkpoint-*") if step_of(candidate) >= 0]
    return next((one for one in sorted(found, key=step_of, reverse=True) if is_whole(one)), None)


def prune(folder: Path, *, newest: int, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never `keep` (the best one).

    Those after step `newest`, which was just sealed, do not count: they were damaged when the run was resumed.
    """
    if limit is None:
        return
    found = sorted((c for c in folder.glob("checkpoint-*") if 0 <= step_of(c) <= newest), key=step_of)
    kept = [c for c in found if keep is not None and c.resolve() == keep.resolve()]
    others = [c for c in found if c not in kept]
    for old in others[: max(0, len(found) - max(limit, 1 + len(kept)))]:
        shutil.rmtree(old)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
