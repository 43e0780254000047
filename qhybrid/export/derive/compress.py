"""A compressed copy of an adapter: written smaller, with what that costs on s·B·A and in held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qhybrid.adapters.attach import attach_plain
from qhybrid.adapters.folder import read_plain
from qhybrid.adapters.int8 import WEIGHTS as INT8_WEIGHTS
from qhybrid.adapters.plain import PlainAdapter
from qhybrid.base.load import load_base
from qhybrid.errors import AdapterError
from qhybrid.evaluation.evaluate import evaluate
from qhybrid.evaluation.models import sections_of, tokenizer_of
from qhybrid.export.derive.derived import common_info, name_of, stored_size, write_derived
from qhybrid.export.derive.shorten import Shortened, ShortenSettings, shorten
from qhybrid.export.output import require_free
from qhybrid.export.probe import measured_rows
from qhybrid.recipe.schema import SourceSection

BAND, RECORD = "compressed", "compress.json"
_BATCH_SIZE = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Losses:
    """The mean cross-entropy of a token in nats, with the adapter before and after, and on what."""

    data: str  # "built-in probe", or the file's name
    rows: int
    dropped: int  # rows of the file that cannot be used
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class LossWanted:
    """What to measure the loss on: `data` or the built-in probe; and `base`, where the model lies, if it moved."""

    data: SourceSection | None = None
    base: str | None = None


@dataclass(frozen=True)
class Compression:
    """What came of it. Sizes are those of the weights files."""

    shortened: Shortened
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    losses: Losses | None


def compress(out: Path, folder: Path, settings: ShortenSettings, loss: LossWanted | None, say: Say) -> Compression:
    """Shorten the adapter in `folder` and write it to `out`.

    Args:
        loss: None to measure no loss; then no base model is needed.
        say: told what is being done.

    Raises:
        AdapterError: `folder` holds no adapter that can be compressed, or it would not become smaller.
        ExportError: `out` is taken or no usable name.
        ModelError: the base model cannot be loaded, or a file of the adapter is a link to another place.
        DataError: the rows cannot be used.
        OSError: the disk is full or fails. Nothing is left behind.
    """
    require_free(out)
    adapter = read_plain(folder)
    if (adapter.source / INT8_WEIGHTS).is_file():
        raise AdapterError(
            f"{adapter.source} is in INT8",
            hint="compress the adapter that it was made of, then export that to INT8",
        )
    before = stored_size(adapter.source)
    shortened = shorten(adapter, settings, lambda done, total: say(f"cutting: module {done} of {total}"))
    if shortened.num_bytes >= before.tensors:
        raise AdapterError("it would not become smaller", hint=f"qhybrid inspect {folder} shows its ranks")
    losses = None if loss is None else _losses(adapter, shortened, loss, say)
    info, _ = common_info([adapter])
    record: dict[str, Any] = {
        "source": name_of(adapter),
        **{key: value for key, value in dataclasses.asdict(settings).items() if value is not None},
        "error": shortened.error,
        "losses": losses and dataclasses.asdict(losses),
        "modules": [
            {
                "module": module.before.module,
                "rank_before": module.before.rank,
                "rank_after": module.after.rank if module.after else 0,
                "norm": module.norm,
                "error": module.error,
            }
            for module in shortened.modules
        ],
    }
    write_derived(out, shortened.kept, info, [adapter], band=BAND, record_file=RECORD, record=record)
    after = stored_size(out)
    return Compression(shortened, before.file, after.file, before.values, after.values, losses)


def _losses(adapter: PlainAdapter, shortened: Shortened, wanted: LossWanted, say: Say) -> Losses:
    """Both on one base that is loaded once, with A and B in fp32, so that the difference is the cut's alone."""
    section, quantization = sections_of(adapter.info, adapter.source, wanted.base)
    tokenizer = tokenizer_of(adapter.source, section)
    measured = measured_rows(wanted.data, tokenizer, adapter.info)
    rows = measured.rows
    say("loading the base model")
    model = load_base(section, quantization)
    found = []
    for name, modules in (("before", adapter.modules), ("after", shortened.kept)):
        model = attach_plain(model, modules, dtype=torch.float32, name=name)
        model.set_adapter(name)

        def report(_: str, done: int, name: str = name) -> None:
            say(f"loss {name}: {done} of {len(rows)} rows")

        found.append(
            evaluate(model, tokenizer, rows, batch_size=_BATCH_SIZE, max_new_tokens=None, progress=report)
        )
    before, after = found
    return Losses(measured.name, before.num_rows, measured.dropped, before.num_tokens, before.loss, after.loss)
