"""The catalog: shapes and parameter counts of well known models, so that a plan needs no network.

catalog.json holds for each model the fields of the config.json at huggingface.co/<hub_id>, and the published
parameter count: a tied embedding counts once, and the rotary buffers that some checkpoints store do not count. The
other hub ids have the same shape, vocabulary and rotary settings; their token ids and context length may differ
(Qwen2.5-7B: 131072 tokens, as Instruct 32768). Therefore not listed: Mistral-7B-Instruct-v0.2 (no sliding window,
another rope_theta), Qwen3-4B-*-2507 (another rope_theta), unsloth/Phi-3-mini-4k-instruct (made a mistral model).
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class CatalogEntry:
    """What the catalog knows about a model. `config` is what `spec_from_config` and AutoConfig take."""

    name: str  # short: "llama-2-7b"
    hub_id: str
    hub_ids: tuple[str, ...]  # hub_id first, then chat variants and mirrors of the same shape
    num_parameters: int  # a tied embedding counts once
    config: dict[str, Any] = field(hash=False)


def catalog_names() -> tuple[str, ...]:
    """The short names of all models, in the order of the catalog: families together, small before large."""
    return tuple(_entries())


def find_model(name: str) -> CatalogEntry | None:
    """The model that `name` stands for, or None where that is unknown or not certain.

    Taken are hub ids in any case; and, also with other separators ("llama2_7b", "qwen2_5-7b"), short names and the
    publisher's own model names without the organisation ("Llama-2-7b-hf", "Qwen2.5-7B-Instruct"). "@revision" may
    follow each. An organisation that the catalog does not list gives None whatever follows: its copy may have
    another vocabulary. So does "mistral-7b", which names no version.
    """
    text = name.partition("@")[0].strip()
    by_hub_id, by_name = _lookup()
    if "/" in text:
        found = by_hub_id.get(text.casefold())
    else:
        query = _canonical(text)
        matches = {short for alias, short in by_name.items() if _reads_as(query, alias)}
        found = by_name.get(query) or (matches.pop() if len(matches) == 1 else None)
    if found is None:
        return None
    entry = _entries()[found]
    return replace(entry, config=copy.deepcopy(entry.config))  # the caller may change it; the catalog stays


def nearest_names(name: str) -> list[str]:
    """Up to three short names that `name` may have meant, the likeliest first; empty if nothing is near."""
    text = name.partition("@")[0].strip()
    by_hub_id, by_name = _lookup()
    near: list[str] = []
    for alias in difflib.get_close_matches(text.casefold(), by_hub_id, n=10, cutoff=0.7):
        near.append(by_hub_id[alias])
    for alias in difflib.get_close_matches(_canonical(text.rpartition("/")[2]), by_name, n=10, cutoff=0.7):
        near.append(by_name[alias])
    return list(dict.fromkeys(near))[:3]


@functools.cache
def _entries() -> dict[str, CatalogEntry]:
    """All entries by short name, read once."""
    raw: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        name: CatalogEntry(
            name=name,
            hub_id=facts["hub_id"],
            hub_ids=(facts["hub_id"], *facts["other_hub_ids"]),
            num_parameters=facts["num_parameters"],
            config=facts["config"],
        )
        for name, facts in raw.items()
    }


@functools.cache
def _lookup() -> tuple[dict[str, str], dict[str, str]]:
    """The short name by case-folded hub id, and by canonical name without an organisation."""
    by_hub_id: dict[str, str] = {}
    by_name: dict[str, str] = {}
    for entry in _entries().values():
        by_name[_canonical(entry.name)] = entry.name
        publisher = entry.hub_id.partition("/")[0]
        for hub_id in entry.hub_ids:
            by_hub_id[hub_id.casefold()] = entry.name
            organisation, _, model = hub_id.partition("/")
            # A mirror's own name stays out: "mistral-7b" is v0.1 at unsloth, and ambiguous everywhere else.
            if organisation == publisher:
                for form in (model, model.removesuffix("-hf"), model.removeprefix("Meta-")):
                    by_name[_canonical(form)] = entry.name
    return by_hub_id, by_name


def _canonical(name: str) -> str:
    """`name` in lower case with a dash between words and numbers: "Llama3.1_8B" becomes "llama-3.1-8-b".

    A dot inside a number stays, so "llama-3-1.8b" is not "llama-3.1-8b".
    """
    text = re.sub(r"[\s_-]+", "-", name.casefold())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "-", text)
    text = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", "-", text)
    return re.sub(r"-+", "-", text).strip("-")


def _reads_as(query: str, alias: str) -> bool:
    """Whether a canonical name is `alias`, perhaps with a dash for the dot: file names often avoid dots."""
    return re.fullmatch(re.escape(alias).replace(r"\.", "[.-]"), query) is not None
