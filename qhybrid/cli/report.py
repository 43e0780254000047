"""`qhybrid report`: a run or a sweep as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

_MOST_SAMPLES = 64
_MAX_NEW_TOKENS = 128


@click.command("report")
@click.argument("run", metavar="RUN|SWEEP", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), metavar="FILE", help="Where to write it; RUN/report.html by default."
)
@click.option(
    "--samples", type=click.IntRange(1, _MOST_SAMPLES), metavar="N",
    help="Load the model, and let it answer N held-out rows with the adapter and without. They are kept in "
    "RUN/samples.json for later reports.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of each sample; 128 by default.")
def command(run: str, output: str | None, samples: int | None, max_new_tokens: int | None) -> None:
    """Draw a run or a sweep as one HTML file that needs nothing else.

    Of a run: curves, ranks, spectra, memory, data, answers; also while it is going on, or when it ended badly.
    Of a sweep: its table, the arms beside the control, quality against memory and time, rank maps.
    """
    if max_new_tokens is not None and samples is None:
        raise click.UsageError("--max-new-tokens has no effect without --samples")
    from qhybrid.report.sweep_report import is_sweep

    if is_sweep(Path(run)):
        if samples is not None:
            raise click.UsageError("--samples is for runs: those of a sweep lie in its folder runs/")
        _report_sweep(Path(run), output)
        return
    from qhybrid.report.run_facts import require_run
    from qhybrid.report.samples import make_samples, require_adapter
    from qhybrid.report.write import require_place

    folder = Path(run)
    found = require_run(folder)
    file = Path(output) if output is not None else found.report_file
    require_place(file)
    if samples is not None:
        require_adapter(found)

    from qhybrid.cli.main import quiet_libraries

    if found.adapter.is_dir():  # whose tensors are read
        quiet_libraries()
    from rich.console import Console

    from qhybrid.report.run_report import run_report
    from qhybrid.report.write import write_report

    with Console(stderr=True).status("reading the run") as status:
        if samples is not None:
            make_samples(found, samples, max_new_tokens or _MAX_NEW_TOKENS, status.update)
        page = run_report(folder, status.update)
    _tell(file, write_report(page, file))


def _report_sweep(folder: Path, output: str | None) -> None:
    from qhybrid.report.sweep_report import sweep_report
    from qhybrid.report.write import require_place, write_report

    file = Path(output) if output is not None else folder / "report.html"
    require_place(file)
    _tell(file, write_report(sweep_report(folder), file))


def _tell(file: Path, size: int) -> None:
    from qhybrid.units import format_bytes

    click.echo(f"report  {file} ({format_bytes(size)})")
