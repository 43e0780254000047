"""`qhybrid doctor`: what is installed, what works, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import click

_OPTIONAL = {"deepspeed": "pip install 'qhybrid[zero]'", "flash_attn": "pip install flash-attn (CUDA only)"}

_REINSTALL = "reinstall bitsandbytes for this torch"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str  # ok, note or problem
    name: str
    text: str
    advice: str = ""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Show versions, GPU and 4-bit readiness, and what to do. Exit code 1 if something does not work."""
    from qhybrid.cli.main import quiet_libraries

    findings = [_python(), *_libraries()]
    if any(finding.state == "problem" for finding in findings):
        findings.append(Finding("note", "tests", "left out until the libraries are there"))
    else:
        quiet_libraries()
        findings += [_gpu(), _four_bit(), _deepspeed(), _disk()]
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("FAIL", "red")}
        for finding in findings:
            word, colour = marks[finding.state]
            click.echo(f"{click.style(word.ljust(4), fg=colour)}  {finding.name.ljust(13)} {finding.text}")
            if finding.advice:
                click.echo(f"{'':21}→ {finding.advice}")
    if any(finding.state == "problem" for finding in findings):
        sys.exit(1)


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("ok", "python", text)


def _libraries() -> list[Finding]:
    from packaging.requirements import Requirement

    findings = []
    for requirement in map(Requirement, requires("qhybrid") or []):
        if requirement.marker is not None:  # of an extra
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(Finding("problem", requirement.name, "not installed", f"pip install '{requirement}'"))
            continue
        if requirement.specifier.contains(found, prereleases=True):
            findings.append(Finding("ok", requirement.name, found))
        else:
            findings.append(Finding("problem", requirement.name, found, f"pip install '{requirement}'"))
    for name, advice in _OPTIONAL.items():
        try:
            findings.append(Finding("ok", name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding("note", name, "not installed (optional)", advice))
    return findings


def _gpu() -> Finding:
    import torch

    from qhybrid.units import format_bytes

    if not torch.cuda.is_available():
        advice = "training works on the CPU, for small models"
        if torch.version.cuda is None:
            advice += "; this torch is a CPU build: see pytorch.org for a CUDA build if there is a GPU"
        elif shutil.which("nvidia-smi") is None:
            advice += "; no NVIDIA driver was found"
        return Finding("note", "gpu", "no CUDA device", advice)
    properties = torch.cuda.get_device_properties(0)
    compute = f"{properties.major}.{properties.minor}"
    text = f"{properties.name}, {format_bytes(properties.total_memory)}, compute {compute}"
    if properties.major < 8:
        return Finding(
            "note",
            "gpu",
            text,
            "no bfloat16 before compute 8.0: set model.dtype: float16 (the adapters then train in float32)",
        )
    return Finding("ok", "gpu", text)


def _four_bit() -> Finding:
    """Quantise a small weight, run it forward and backward, and compare with the exact product."""
    import torch

    try:
        import bitsandbytes as bnb

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        exact = torch.nn.Linear(256, 256, bias=False)
        layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(exact.weight.data.clone(), requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        x = torch.randn(8, 256, requires_grad=True)
        y = layer(x.to(device))
        y.sum().backward()
        error = float(((y.cpu() - exact(x)).norm() / exact(x).norm()).detach())
    except Exception as error:
        return Finding("problem", "4-bit", f"{type(error).__name__}: {error}", _REINSTALL)
    if not 0 < error < 0.2:
        return Finding("problem", "4-bit", f"NF4 is off by {error:.1%}", _REINSTALL)
    return Finding("ok", "4-bit", f"NF4 forward and backward on {device}, error {error:.1%} (about 9% is usual)")


def _deepspeed() -> Finding:
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return Finding("note", "zero", "DeepSpeed is not installed; needed for several GPUs only")
    import torch

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_available():
        return Finding("problem", "zero", "this torch has no torch.distributed", "install another build of torch")
    if not getattr(torch.distributed, f"is_{backend}_available")():
        return Finding("problem", "zero", f"this torch has no {backend}", "install another build of torch")
    return Finding("ok", "zero", f"DeepSpeed is installed, backend {backend} is there")


def _disk() -> Finding:
    from qhybrid.units import format_bytes

    cache = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    place = cache if os.path.isdir(cache) else os.path.expanduser("~")
    free = shutil.disk_usage(place).free
    text = f"{format_bytes(free)} free for downloaded models"
    if free < 20 * 2**30:
        return Finding("note", "disk", text, "a 7B model in 16 bit takes 14 GB; HF_HOME moves the cache")
    return Finding("ok", "disk", text)
