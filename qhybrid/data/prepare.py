"""Preparation: the recipe's data section as tokenised data sets, with the audit that goes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qhybrid.data.audit import Audit, SourceAudit
from qhybrid.data.formats import SourceFormat, find_format
from qhybrid.data.mixture import hold_out, mix, mixture_quotas
from qhybrid.data.readers import open_source
from qhybrid.data.rows import RawRow, Row, RowFault
from qhybrid.data.templates import chat_template_text, resolve_chat_template
from qhybrid.data.tokenize import EncodedRow, RowEncoder
from qhybrid.errors import DataError
from qhybrid.recipe.schema import DataSection, Recipe, SourceSection
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.units import format_count

_ROWS_TO_FIND_FORMAT = 100
_BATCH_ROWS = 1000
_TABLE_CHUNK_ROWS = 10_000  # arrow lists count their values in int32; a chunk stays far below
_MOST_TIMES_LARGER = 100  # a mixture beyond this many times its data is a slip in the weights


@dataclass(frozen=True)
class PreparedData:
    """What a trainer needs: `train` and `eval` hold int32 lists `input_ids` and `labels` (-100: not trained).

    `chat_template` is the jinja text that conversations were rendered with, to be saved with the adapter;
    None where neither the recipe nor the tokenizer has one.
    """

    train: Dataset
    eval: Dataset | None
    audit: Audit
    chat_template: str | None
    origins: tuple[tuple[str, int], ...]  # the source and the row's number in it, of every row of `train`

    def origin(self, index: int) -> str:
        """Where row `index` of `train` comes from, as "train.jsonl 17"."""
        source, number = self.origins[index]
        return f"{source.rpartition('/')[2]} {number}"

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(source.longest_tokens for source in (*self.audit.train, *self.audit.eval))

    @property
    def fingerprint(self) -> str:
        """A hash of all rows, those to evaluate on included."""
        return "-".join(rows._fingerprint for rows in (self.train, self.eval) if rows is not None)


@dataclass(frozen=True)
class _Source:
    section: SourceSection
    audit: SourceAudit
    rows: list[EncodedRow]


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, base_folder: Path, date: str | None = None
) -> PreparedData:
    """Read, check, tokenise, truncate, hold out and mix what `recipe.data` names; nothing is written to disk.

    The rows are final: trl takes them as they are, and at most packs them. Every row has a token that is
    trained. Equal recipes, files and tokenizers give equal data sets.

    Args:
        recipe: `data` and, of `training`, seed, max_length, truncation_mode, eos_token, chat_template_path,
            completion_only_loss and assistant_only_loss.
        tokenizer: of the base model; it is not changed.
        base_folder: where relative paths are looked for after the current directory (the recipe's folder).
        date: what chat templates that write the date are told (ISO 8601); today when left out.

    Raises:
        DataError: a source cannot be read, has no known format, or has more unusable rows than
            `data.max_dropped_fraction`; or there is nothing left to train on.
    """
    template = resolve_chat_template(recipe, tokenizer, base_folder)
    system_prompt = recipe.data.system_prompt
    encoder = RowEncoder(
        tokenizer, recipe.training, chat_template=template, system_prompt=system_prompt, date=date
    )
    limit = recipe.data.max_dropped_fraction
    train = [_prepare_source(section, encoder, limit, base_folder) for section in recipe.data.sources]
    evaluation = [_prepare_source(section, encoder, limit, base_folder) for section in recipe.data.eval_sources]

    seed = recipe.training.seed
    train_rows, held_out_rows = _choose_rows(train, recipe.data, seed)
    eval_rows = held_out_rows + [row for source in evaluation for row in source.rows]
    for source in evaluation:
        source.audit.used_rows = len(source.rows)
        source.audit.share = len(source.rows) / len(eval_rows)
    audit = Audit(
        train=[source.audit for source in train],
        eval=[source.audit for source in evaluation],
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        warnings=_warnings(recipe, encoder, train),
    )
    return PreparedData(
        train=_dataset(train_rows),
        eval=_dataset(eval_rows) if eval_rows else None,
        audit=audit,
        chat_template=template,
        origins=tuple((row.source, row.number) for row in train_rows),
    )


def prepare_file(
    section: SourceSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None,
    base_folder: Path,
    system_prompt: str | None = None,
    date: str | None = None,
) -> tuple[list[EncodedRow], SourceAudit]:
    """Read, check and tokenise one source as for training, for evaluation without a recipe.

    Args:
        chat_template: a built-in name or a .jinja file; None takes the tokenizer's own.
        date: what chat templates that write the date are told (ISO 8601); today when left out.

    Raises:
        DataError: as `prepare_data`, but only a source without any usable row is refused.
    """
    template = chat_template_text(chat_template, None, tokenizer, base_folder)
    training = TrainingSection(max_length=None)
    encoder = RowEncoder(tokenizer, training, chat_template=template, system_prompt=system_prompt, date=date)
    source = _prepare_source(section, encoder, 1.0, base_folder)
    return source.rows, source.audit


def prepare_held_out(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, base_folder: Path, date: str | None = None
) -> list[EncodedRow]:
    """The rows that `prepare_data` gives to evaluate on, in the same order, but whole: max_length cuts none.

    Raises:
        DataError: as `prepare_data`.
    """
    template = resolve_chat_template(recipe, tokenizer, base_folder)
    chosen = recipe.data.eval_sources or recipe.data.sources

    def prepared(training: TrainingSection) -> list[_Source]:
        encoder = RowEncoder(
            tokenizer, training, chat_template=template, system_prompt=recipe.data.system_prompt, date=date
        )
        limit = recipe.data.max_dropped_fraction
        return [_prepare_source(section, encoder, limit, base_folder) for section in chosen]

    sources = prepared(recipe.training.model_copy(update={"max_length": None}))
    if recipe.data.eval_sources:
        return [row for source in sources for row in source.rows]
    # Rows that truncation leaves nothing of were not there to be chosen from.
    for source, cut in zip(sources, prepared(recipe.training), strict=True):
        numbers = {row.number for row in cut.rows}
        source.rows[:] = [row for row in source.rows if row.number in numbers]
    return _choose_rows(sources, recipe.data, recipe.training.seed)[1]


def _prepare_source(
    section: SourceSection, encoder: RowEncoder, max_dropped_fraction: float, base_folder: Path
) -> _Source:
    stream = open_source(section, base_folder)
    head, first_values = _read_head(stream.rows)
    # Without one object among the rows there is no format to find, and the account below ends in an error.
    found = (
        find_format(section, first_values)
        if first_values
        else SourceFormat(section.format, section.columns, found=False)
    )
    audit = SourceAudit(section.path, stream.numbering, found)
    kept: list[EncodedRow] = []
    seen: set[bytes] = set()
    rows = chain(head, stream.rows)
    while batch := list(islice(rows, _BATCH_ROWS)):
        normal: list[tuple[int, Row, set[str]]] = []
        for raw in batch:
            try:
                normal.append((raw.number, *_normalise(raw, found)))
            except RowFault as fault:
                audit.drop(raw.number, fault.reason)
        results = encoder.encode([row for _, row, _ in normal])
        for (number, row, repairs), result in zip(normal, results, strict=True):
            if isinstance(result, RowFault):
                audit.drop(number, result.reason)
                continue
            audit.keep(number, repairs, result)
            digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
            audit.duplicates += digest in seen
            seen.add(digest)
            kept.append(replace(result, number=number, source=section.path))
    audit.check(max_dropped_fraction)
    return _Source(section, audit, kept)


def _read_head(rows: Iterator[RawRow]) -> tuple[list[RawRow], list[dict]]:
    """Rows from the front until enough of them are objects, and the values of those."""
    head: list[RawRow] = []
    values: list[dict] = []
    for row in rows:
        head.append(row)
        if isinstance(row.value, dict):
            values.append(row.value)
            if len(values) == _ROWS_TO_FIND_FORMAT:
                break
    return head, values


def _normalise(raw: RawRow, found: SourceFormat) -> tuple[Row, set[str]]:
    if raw.fault is not None:
        raise RowFault(raw.fault)
    row, repairs = found.normalise(raw.value)
    return row, repairs | raw.repairs


def _choose_rows(
    sources: Sequence[_Source], settings: DataSection, seed: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """The rows to train on, mixed, and the rows held out for evaluation; enters both in the audits."""
    pools = [list(range(len(source.rows))) for source in sources]
    held_out: list[EncodedRow] = []
    if settings.eval_fraction:
        for index, rows in enumerate(hold_out([len(pool) for pool in pools], settings.eval_fraction, seed)):
            held_out += [sources[index].rows[row] for row in rows]
            sources[index].audit.held_out = len(rows)
            pools[index] = sorted(set(pools[index]) - set(rows))
        _check_something_is_left(sources, pools, settings)

    sizes = [len(pool) for pool in pools]
    weights = [source.section.weight for source in sources]
    if all(weight is not None for weight in weights):
        quotas = mixture_quotas(sizes, weights, settings.mixture)
        _check_mixture(sources, sizes, quotas)
        picks = mix(sizes, quotas, seed)
    else:
        quotas = sizes
        picks = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    for source, quota in zip(sources, quotas, strict=True):
        source.audit.used_rows = quota
        source.audit.share = quota / len(picks)
    return [sources[source].rows[pools[source][row]] for source, row in picks], held_out


def _check_something_is_left(
    sources: Sequence[_Source], pools: Sequence[list[int]], settings: DataSection
) -> None:
    emptied = [source for source, pool in zip(sources, pools, strict=True) if not pool]
    weighted = sources[0].section.weight is not None
    if emptied and (weighted or len(emptied) == len(sources)):
        raise DataError(
            f"eval_fraction {settings.eval_fraction} holds out every row and leaves none to train on",
            where=emptied[0].section.path,
            hint="lower data.eval_fraction, or name a file in data.eval_sources instead",
        )


def _check_mixture(sources: Sequence[_Source], sizes: Sequence[int], quotas: Sequence[int]) -> None:
    for source, quota in zip(sources, quotas, strict=True):
        if not quota:
            raise DataError(
                "the weights leave no row of this source in the mixture",
                where=source.section.path,
                hint="raise its weight, use data.mixture: all_exhausted, or remove the source",
            )
    if sum(quotas) > _MOST_TIMES_LARGER * sum(sizes):
        raise DataError(
            f"the weights make a mixture of {format_count(sum(quotas))} rows out of {format_count(sum(sizes))}",
            hint="bring the weights nearer to the sizes of the sources, or use data.mixture: first_exhausted",
        )


def _warnings(recipe: Recipe, encoder: RowEncoder, train: Sequence[_Source]) -> list[str]:
    notes = list(encoder.warnings)
    if encoder.num_lost_thinking:
        notes.append(
            f"the chat template leaves thinking out of {format_count(encoder.num_lost_thinking)} rows, "
            "so it is not trained there"
        )
    for name, value in (
        ("data.chat_template", recipe.data.chat_template),
        ("training.chat_template_path", recipe.training.chat_template_path),
        ("training.assistant_only_loss", recipe.training.assistant_only_loss),
    ):
        if value and not encoder.num_conversations:
            notes.append(f"{name} is not used: no source holds conversations")
    if recipe.data.system_prompt is not None and not encoder.num_system_prompts:
        notes.append("data.system_prompt is not used: there is no conversation without a system message")
    if recipe.data.mixture != "first_exhausted" and train[0].section.weight is None:
        notes.append("data.mixture is not used: the sources have no weights")
    return notes


def _dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """`rows` as a data set in memory, whose fingerprint is a hash of its content."""
    digest = hashlib.sha256()
    tables = []
    for start in range(0, len(rows), _TABLE_CHUNK_ROWS):
        chunk = rows[start : start + _TABLE_CHUNK_ROWS]
        offsets = np.cumsum([0, *(len(row.input_ids) for row in chunk)], dtype=np.int32)
        columns = {}
        for name in ("input_ids", "labels"):
            values = np.concatenate([getattr(row, name) for row in chunk])
            columns[name] = pyarrow.ListArray.from_arrays(offsets, values)
            digest.update(values.tobytes())
        digest.update(offsets.tobytes())
        tables.append(pyarrow.table(columns))
    return Dataset(pyarrow.concat_tables(tables), fingerprint=digest.hexdigest()[:16])
