"""`qhybrid merge`: several adapters into one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.cli.folders import adapter_folder
from qhybrid.errors import ExportError

if TYPE_CHECKING:
    from qhybrid.export.derive.merge import Merge

_METHODS = ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_WORST_SHOWN = 5


@click.command("merge")
@click.argument("out", type=click.Path())
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option(
    "--method", type=click.Choice(_METHODS), required=True, help="cat is exact; docs/adapters.md has all."
)
@click.option("--rank", type=int, metavar="N", help="Of every module of the result.")
@click.option("--energy", type=float, metavar="SHARE", help="Of each module's ||ΔW||² to keep; svd: 0.99.")
@click.option("--density", type=float, metavar="SHARE", help="Of each ΔW's values to keep; 0.5.")
@click.option("--seed", type=int, help="Of what dare drops; 0.")
@click.option(
    "--same-base", is_flag=True, help="Take adapters as of one base though names or hashes of their bases differ."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, every module in it.")
def command(
    out: str,
    adapters: tuple[str, ...],
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    seed: int | None,
    same_base: bool,
    as_json: bool,
) -> None:
    """Merge adapters of one base model into the new adapter folder OUT.

    Each is a run, an adapter folder of qhybrid or a LoRA folder of peft, with a weight of 1 unless it says
    another: qhybrid merge both runs/a runs/b=0.5 --method cat
    """
    sources = [_source(text) for text in adapters]

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from qhybrid.export.derive.combine import CombineSettings
    from qhybrid.export.derive.merge import RECORD, merge

    settings = CombineSettings(method, rank, energy, density, seed)  # type: ignore[arg-type]
    with Console(stderr=True).status("reading the adapters") as status:
        merged = merge(
            Path(out),
            sources,
            settings,
            same_base=same_base,
            progress=lambda done, total: status.update(f"module {done} of {total}"),
        )
    for note in merged.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        record = json.loads((Path(out) / RECORD).read_text(encoding="utf-8"))
        figures = {"bytes": merged.num_bytes, "parameters": merged.num_parameters, "notes": merged.notes}
        click.echo(json.dumps({"out": out, **figures, **record}))
    else:
        _show(merged, method, out)


def _source(text: str) -> tuple[Path, float]:
    """The folder and the weight of "folder=0.5"; a folder whose own name ends in "=0.5" is found too."""
    folder, separator, number = text.rpartition("=")
    try:
        weight = float(number) if separator else None
    except ValueError:
        weight = None
    if separator and weight is None and Path(folder).is_dir() and not Path(text).exists():
        raise ExportError(f"the weight of {folder} is {number!r}, which is no number")
    if weight is None or not folder:
        return adapter_folder(text), 1.0
    if Path(text).is_dir():
        if Path(folder).is_dir():
            raise ExportError(
                f"{text} and {folder} are both folders",
                hint=f"write {text}=1, or the weight of {folder} in another way (+0.5 for 0.5)",
            )
        return Path(text), 1.0
    if not math.isfinite(weight) or weight == 0:
        raise ExportError(f"the weight of {folder} is {number}", hint="any number but 0; it may be negative")
    return adapter_folder(folder), weight


def _show(merged: Merge, method: str, out: str) -> None:
    from qhybrid.cli.columns import columns
    from qhybrid.units import format_bytes, format_count

    lines = []
    worst = [
        module for module in sorted(merged.modules, key=lambda one: -one.error)[:_WORST_SHOWN] if module.error
    ]
    if worst:
        rows = [(c.module.module, str(c.module.rank), f"{c.norm:.4g}", f"{c.error:.2%}") for c in worst]
        lines += [*columns(("largest errors", "rank", "norm", "error"), rows), ""]
    ranks = [combined.module.rank for combined in merged.modules]
    rank = str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    lines.append(f"modules  {len(ranks)}, rank {rank}")
    if merged.left_out:
        lines.append(
            f"         {len(merged.left_out)} left out, {merged.left_out[0]} first: nothing is left in them"
        )
    lines.append(f"size     {format_bytes(merged.num_bytes)}, {format_count(merged.num_parameters)} parameters")
    exact = "none: cat is the weighted sum" if method == "cat" else f"{merged.error:.2%} of what {method} asks for"
    lines += [f"error    {exact}", f"adapter  {out}"]
    click.echo("\n".join(lines))
