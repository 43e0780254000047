"""`qhybrid compress`: an adapter at lower rank, with what that costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.cli.folders import adapter_folder
from qhybrid.errors import DataError, ModelError

if TYPE_CHECKING:
    from qhybrid.export.derive.compress import Compression
    from qhybrid.recipe.schema import SourceSection

_WORST_SHOWN = 5


@click.command("compress")
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--energy", type=float, metavar="SHARE", help="Keep that share of each module's ||s·B·A||².")
@click.option("--rank", type=int, metavar="N", help="Keep at most that rank in each module.")
@click.option(
    "--prune-terms", type=float, metavar="SHARE", help="Drop the smallest rank-1 terms, that share of all."
)
@click.option(
    "--data", type=click.Path(), help="Rows for the loss before and after; a built-in probe when left out."
)
@click.option("--limit", type=click.IntRange(1), help="The first rows of --data only.")
@click.option("--base", help="Where the base model lies, if not where the adapter says: a folder or a hub id.")
@click.option("--no-loss", is_flag=True, help="Measure no loss, which needs the base model.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    adapter: str,
    out: str,
    energy: float | None,
    rank: int | None,
    prune_terms: float | None,
    data: str | None,
    limit: int | None,
    base: str | None,
    no_loss: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER (a run, an adapter folder, or a LoRA folder of peft) at lower rank into the new folder OUT."""
    for given, name in ((data, "--data"), (base, "--base")):
        if given and no_loss:
            raise DataError(f"{name} has no effect with --no-loss", hint="leave one of them out")
    if limit and not data:
        raise DataError("--limit has no effect without --data", hint="name the rows with --data")
    source = _rows(data, limit) if data is not None else None
    folder = adapter_folder(adapter)

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from qhybrid.cli.phases import phases
    from qhybrid.export.derive.compress import RECORD, LossWanted, compress
    from qhybrid.export.derive.shorten import ShortenSettings

    settings = ShortenSettings(energy, rank, prune_terms)
    wanted = None if no_loss else LossWanted(source, base)
    with phases("reading the adapter") as say:
        try:
            done = compress(Path(out), folder, settings, wanted, say)
        except ModelError as error:
            if no_loss or "--no-loss" in (error.hint or ""):
                raise
            hint = f"{error.hint}; or measure no loss with --no-loss" if error.hint else "--no-loss needs no model"
            raise ModelError(error.message, hint=hint, where=error.where) from None
    if as_json:
        record = json.loads((Path(out) / RECORD).read_text(encoding="utf-8"))
        sizes = dataclasses.asdict(dataclasses.replace(done, shortened=None, losses=None))  # type: ignore[arg-type]
        sizes = {key: value for key, value in sizes.items() if value is not None}
        click.echo(json.dumps({"out": out, **sizes, **record}))
    else:
        _show(done, out)


def _rows(data: str, limit: int | None) -> SourceSection:
    from pydantic import ValidationError

    from qhybrid.data.readers import check_local_source
    from qhybrid.recipe.schema import SourceSection

    try:
        source = SourceSection.model_validate({"path": data, "limit": limit})
    except ValidationError:
        raise DataError(f"--data {data!r} is no name of a file") from None
    check_local_source(source, Path())
    return source


def _show(done: Compression, out: str) -> None:
    from qhybrid.cli.columns import columns
    from qhybrid.units import format_bytes, format_count

    modules, kept, losses = done.shortened.modules, done.shortened.kept, done.losses
    counts = {
        "parameters": (done.parameters_before, done.parameters_after),
        "modules": (len(modules), len(kept)),
        "sum of ranks": (sum(module.before.rank for module in modules), sum(module.rank for module in kept)),
    }
    rows = [("weights file", format_bytes(done.bytes_before), format_bytes(done.bytes_after))]
    rows += [(name, *map(format_count, pair)) for name, pair in counts.items()]
    if losses:
        rows.append(("loss", f"{losses.before:.4f}", f"{losses.after:.4f}"))
    lines = columns(("", "before", "after"), rows)
    if losses:
        left = f"; {losses.dropped} could not be used" if losses.dropped else ""
        lines.append(
            f"the loss is of {losses.data}, {losses.rows} rows, {format_count(losses.tokens)} tokens{left}"
        )
    else:
        lines.append("no loss was measured")
    worst = sorted(modules, key=lambda module: -module.error)[:_WORST_SHOWN]
    # DoRA without a term left still has one, of zeros.
    ranks = [(m.before.rank, 0 if m.after is None or m.error == 1 else m.after.rank) for m in worst]
    lines += ["", *columns(
        ("largest errors of s·B·A", "rank", "error"),
        [(m.before.module, f"{b} to {a}", f"{m.error:.2%}") for m, (b, a) in zip(worst, ranks, strict=True)],
    )]  # fmt: skip
    if any(module.before.num_principal for module in modules):
        lines.append("of PiSSA this is the change of the whole base, which the result is for too")
    inside = " (for DoRA inside the norm)" if any(m.before.magnitude is not None for m in modules) else ""
    lines += [f"over all modules{inside}: {done.shortened.error:.2%}", "", f"adapter  {out}"]
    click.echo("\n".join(lines))
