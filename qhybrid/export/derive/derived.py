"""An adapter made from others: what is known of it, its folder, and the tokenizer that comes with it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qhybrid.adapters.folder import WEIGHTS, save_plain
from qhybrid.adapters.info import INFO, AdapterInfo
from qhybrid.adapters.int8 import WEIGHTS as INT8_WEIGHTS
from qhybrid.adapters.peft_folder import WEIGHTS as PEFT_WEIGHTS
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.base.safetensors_reader import SafetensorsReader
from qhybrid.disk import write_bytes
from qhybrid.export.resumable import new_folder
from qhybrid.redaction import redacted

_SETTINGS = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer.json", _SETTINGS, _TEMPLATE, "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def name_of(adapter: PlainAdapter) -> str:
    """What a record calls an adapter: its folder's name, or the run's; no path of this machine."""
    folder = adapter.source.absolute()
    return folder.parent.name if folder.name == "adapter" else folder.name


class StoredSize(NamedTuple):
    """Of a weights file: its bytes, those of its tensors, and the number of their values."""

    file: int
    tensors: int
    values: int


def stored_size(folder: Path) -> StoredSize:
    """The size of an adapter folder's weights file, by its header."""
    file = next(folder / name for name in (WEIGHTS, INT8_WEIGHTS, PEFT_WEIGHTS) if (folder / name).is_file())
    with SafetensorsReader(file) as reader:
        entries = reader.entries.values()
        tensors, values = (
            sum(entry.end - entry.begin for entry in entries),
            sum(math.prod(e.shape) for e in entries),
        )
        return StoredSize(file.stat().st_size, tensors, values)


def common_info(adapters: Sequence[PlainAdapter]) -> tuple[AdapterInfo, list[str]]:
    """What is known of an adapter made from `adapters`, and one line for each thing in which they differ.

    It is that of the first that is qhybrid's own and has its base's hashes, since that knows most; with the chat
    template of the tokenizer that `write_derived` copies.
    """
    own = [adapter for adapter in adapters if (adapter.source / INFO).is_file()]
    first = next((a for a in own if a.info.base_sha256), (own or list(adapters))[0])
    notes = []
    for what, values in (
        ("on bases that were quantised differently", [a.info.quantization for a in own]),
        ("with different system prompts", [a.info.system_prompt for a in own]),
    ):
        if len(set(values)) > 1:
            notes.append(f"the adapters were trained {what}; the result takes that of {first.source}")
    with_template = [adapter for adapter in adapters if _template_of(adapter) is not None]
    donor = _tokenizer_donor(adapters) or next(iter(with_template), first)
    if len({_template_of(adapter) for adapter in with_template}) > 1:
        notes.append(f"the adapters have different chat templates; the result takes that of {donor.source}")
    return dataclasses.replace(first.info, chat_template=_template_of(donor)), notes


def write_derived(
    out: Path,
    modules: Sequence[PlainModule],
    info: AdapterInfo,
    sources: Sequence[PlainAdapter],
    *,
    band: str,
    record_file: str,
    record: Mapping[str, Any],
) -> None:
    """Write an adapter folder of one band, with the tokenizer of the first of `sources` that has one.

    Args:
        record_file: the name of the file for `record`, which says how the adapter was made.

    Raises:
        ExportError: `out` is taken or no usable name.
        OSError: the disk is full or fails. Nothing is left behind.
    """
    with new_folder(out) as folder:
        save_plain(tuple(modules), info, folder, band)
        donor = _tokenizer_donor(sources)
        if donor is not None:
            _copy_tokenizer(donor.source, folder)
        write_bytes(folder / record_file, (json.dumps(record, indent=2) + "\n").encode())


def _tokenizer_donor(adapters: Sequence[PlainAdapter]) -> PlainAdapter | None:
    return next((adapter for adapter in adapters if (adapter.source / _SETTINGS).is_file()), None)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        file = source / name
        if file.is_file():
            content = file.read_bytes()
            if name == _SETTINGS:  # the one that may hold paths of the machine on which it was made
                content = redacted(content.decode(errors="replace")).encode()
            write_bytes(folder / name, content)


def _template_of(adapter: PlainAdapter) -> str | None:
    """The chat template beside an adapter, or that of its description; None where it has none."""
    file = adapter.source / _TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    try:
        template = json.loads((adapter.source / _SETTINGS).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        template = None
    return template if isinstance(template, str) else adapter.info.chat_template
