"""`qhybrid report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

_MOST_SAMPLES = 64
_MAX_NEW_TOKENS = 128


@click.command("report")
@click.argument("run", type=click.Path())
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
    """Draw RUN, a run folder, as one HTML file that needs nothing else: curves, ranks, spectra, memory, data.

    Of a run that is going on, or ended badly, it shows what there is.
    """
    if max_new_tokens is not None and samples is None:
        raise click.UsageError("--max-new-tokens has no effect without --samples")
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
    size = write_report(page, file)
    from qhybrid.units import format_bytes

    click.echo(f"report  {file} ({format_bytes(size)})")
