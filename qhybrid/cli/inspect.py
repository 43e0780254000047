"""`qhybrid inspect`: what an adapter is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qhybrid.cli.folders import adapter_folder
from qhybrid.errors import ExportError

if TYPE_CHECKING:
    from qhybrid.export.derive.inspect import Report

_PICTURES = (".png", ".svg")


@click.command("inspect")
@click.argument("adapter", type=click.Path())
@click.option("--module", "pattern", metavar="PATTERN", help="These modules only: q_proj, layers.3, 'mlp.*'.")
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw ranks, norms and spectra: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, singular values too.")
def command(adapter: str, pattern: str | None, plot: str | None, as_json: bool) -> None:
    """Show the bands, ranks, norms and spectra of ADAPTER: a run, an adapter folder, or a folder of peft.

    The energy rank is the fewest singular values of s·B·A with that share of their squares' sum.
    """
    folder = adapter_folder(adapter)
    if plot is not None:
        _require_picture(Path(plot))

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from qhybrid.export.derive.inspect import inspect_adapter

    with Console(stderr=True).status("reading the adapter") as status:
        report = inspect_adapter(folder, pattern, lambda done, total: status.update(f"module {done} of {total}"))
        if plot is not None:
            from qhybrid.export.derive.spectrum_plot import draw

            status.update("drawing")
            draw(report, Path(plot))
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        _show(report)
    if plot is not None:
        click.echo(f"picture  {plot}", err=as_json)


def _require_picture(file: Path) -> None:
    from qhybrid.export.output import require_free

    if file.suffix.lower() not in _PICTURES:
        raise ExportError(f"{file} is no picture that is drawn here", hint="name it .png or .svg")
    require_free(file)
    if not file.absolute().parent.is_dir():
        raise ExportError(f"there is no folder {file.parent} for the picture")


def _show(report: Report) -> None:
    from qhybrid.cli.columns import columns
    from qhybrid.units import format_count

    lines = [*_header(report), ""]
    header = ("band", "kind", "layers", "modules", "rank", "live ranks", "energy 99%", "norm", "parameters")
    lines += columns(
        header,
        [
            (
                band.band, band.kind, _span(*band.layers), str(band.modules), _span(*band.rank),
                _live(band.live_rank, band.rank_sum), str(band.energy_rank_99), f"{band.norm:.4g}",
                format_count(band.parameters),
            )
            for band in report.bands
        ],
        left=2,
    )  # fmt: skip
    header = ("layer", "module", "kind", "rank", "norm", "largest", "energy 90%", "99%", "stable", "effective")
    rows = [
        (
            str(m.layer), m.target, m.kind, _live(m.live_rank, m.rank), f"{m.norm:.4g}", f"{m.largest:.4g}",
            str(m.energy_rank_90), str(m.energy_rank_99), f"{m.stable_rank:.2f}", f"{m.effective_rank:.2f}",
        )
        for m in report.modules
    ]  # fmt: skip
    lines += ["", *columns(header, rows, left=3)]
    if any(module.kind == "dora" for module in report.modules):
        lines += ["", "norm and ranks are those of s·B·A, which for DoRA is inside the norm"]
    click.echo("\n".join(lines))


def _header(report: Report) -> list[str]:
    from qhybrid.cli.columns import columns
    from qhybrid.units import format_bytes

    info = report.info
    revision = f" at {info.base_revision}" if info.base_revision else ""
    lines = [("adapter", f"{report.folder}, {format_bytes(report.num_bytes)} in {info.adapter_dtype}")]
    lines.append(("base", f"{info.base_model or 'not named'}{revision}"))
    if report.is_own:
        double = ", double quantisation" if info.double_quant and info.quantization == "nf4" else ""
        lines.append(("loaded as", f"{info.quantization}{double}, {info.dtype}"))
        lines.append(("template", f"{len(info.chat_template)} characters" if info.chat_template else "none"))
    if report.base_minus is not None:
        lines.append(("note", "PiSSA: it belongs on what is left of the base without its principal part"))
    if report.num_pissa:
        lines.append(("note", f"{report.num_pissa} modules are PiSSA; norms and spectra are of s·B·A − s·B0·A0"))
    if info.versions:
        lines.append(("made with", ", ".join(f"{name} {version}" for name, version in info.versions.items())))
    return columns(lines[0], lines[1:], left=2)


def _live(live: int, rank: int) -> str:
    return str(live) if live == rank else f"{live} of {rank}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
