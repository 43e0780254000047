"""`qhybrid export ADAPTER OUT --to …`: an adapter for other programs, or merged into the model."""

from __future__ import annotations

import json
from pathlib import Path

import click

_TARGETS = ("peft", "vllm", "merged", "gguf", "int8")


@click.command("export")
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--to", "target", type=click.Choice(_TARGETS), required=True, help="What to write into OUT.")
@click.option("--base", help="Where the base model lies, if not where the adapter says: a folder or a hub id.")
@click.option(
    "--other-base", is_flag=True, help="Take the base as it is, though its hashes are not the adapter's."
)
@click.option(
    "--onto", type=click.Choice(["16bit", "nf4"]),
    help="merged and gguf: the weights to merge into: as they are, or dequantised from NF4, as training saw them.",
)  # fmt: skip
@click.option(
    "--dora-to-lora", type=click.IntRange(1), metavar="RANK",
    help="Make LoRA of DoRA modules: the best approximation of their change, with an error that is printed.",
)  # fmt: skip
@click.option(
    "--prove", type=click.Path(), metavar="DATA",
    help="merged: the rows that the proof is measured on; a short built-in probe when left out.",
)  # fmt: skip
@click.option("--no-proof", is_flag=True, help="merged: measure nothing.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 1), help="merged: the least share of equal top tokens that passes."
)
@click.option(
    "--gguf-type", type=click.Choice(["f16", "bf16", "f32"]),
    help="gguf: the dtype of the matrices; f16 for models, f32 for adapters.",
)  # fmt: skip
@click.option("--quantization", type=click.Choice(["nf4", "none"]), help="Of the base, for a peft folder; none.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the base, for a peft folder; bfloat16.",
)
@click.option("--push", metavar="ORG/NAME", help="Upload OUT to the hub when it is written.")
@click.option("--private", is_flag=True, help="With --push: make the repository private.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    adapter: str,
    out: str,
    target: str,
    base: str | None,
    other_base: bool,
    onto: str | None,
    dora_to_lora: int | None,
    prove: str | None,
    no_proof: bool,
    min_agreement: float | None,
    gguf_type: str | None,
    quantization: str | None,
    dtype: str | None,
    push: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER (a run, an adapter folder, or a LoRA folder of peft) into the new folder OUT.

    What is written is first held against the adapter: peft and vllm by the logits, merged by --prove.
    """
    from qhybrid.cli.folders import adapter_folder
    from qhybrid.errors import ExportError
    from qhybrid.export.output import require_free

    is_model = target == "merged" or (target == "gguf" and onto is not None)
    for given, name in ((prove, "--prove"), (no_proof, "--no-proof"), (min_agreement, "--min-agreement")):
        if given and not is_model:
            raise ExportError(f"{name} is for merged models", hint="--to merged, or --to gguf with --onto")
    if gguf_type and target != "gguf":
        raise ExportError(f"--gguf-type has no effect with --to {target}", hint="leave it out")
    if gguf_type == "bf16" and not is_model:
        raise ExportError("llama.cpp's adapters are f32 or f16", hint="--gguf-type f32")
    if onto and target not in ("merged", "gguf"):
        raise ExportError(f"--onto has no effect with --to {target}", hint="leave it out")
    for given, name in ((prove, "--prove"), (min_agreement, "--min-agreement")):
        if given and no_proof:
            raise ExportError(f"{name} and --no-proof exclude each other", hint="leave one of them out")
    if private and not push:
        raise ExportError("--private has no effect without --push", hint="give --push ORG/NAME")
    place = Path(out)
    folder = adapter_folder(adapter)
    require_free(place)
    if push:
        from qhybrid.export.hub import require_repository

        require_repository(push)

    from qhybrid.cli.main import quiet_libraries

    quiet_libraries()
    from qhybrid.cli.phases import phases
    from qhybrid.export import as_adapter, as_model
    from qhybrid.export.job import Source, prepare

    source = Source(folder, base, other_base, quantization, dtype, dora_to_lora)
    with phases("reading the adapter") as say:
        job = prepare(source, say)
        if is_model:
            wanted = as_model.ProofWanted(None if prove is None else Path(prove), not no_proof, min_agreement)
            if target == "merged":
                result = as_model.to_merged(job, place, onto or "16bit", wanted, say)
            else:
                result = as_model.to_merged_gguf(job, place, onto, gguf_type or "f16", wanted, say)
        elif target == "gguf":
            result = as_adapter.to_gguf(job, place, gguf_type or "f32", say)
        else:
            write = {"peft": as_adapter.to_peft, "vllm": as_adapter.to_vllm, "int8": as_adapter.to_int8}[target]
            result = write(job, place, say)
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), **result.figures}))
    else:
        for line in result.lines:
            click.echo(line)
        if not job.is_base_known:
            click.echo("note: the adapter does not know the hashes of its base, so they were not compared")
        click.echo(f"wrote {result.folder}")
    if push:
        from qhybrid.export.hub import push as upload

        click.echo(f"uploaded {upload(place, push, private=private)}", err=as_json)
