"""What memory estimators say about the same six recipes, beside qhybrid's simulated step.

    .venv/bin/python scripts/compare_estimators.py [--out docs/data/estimators.json]

Writes every number in bytes, with what it covers, and prints a markdown table. Needs no GPU, no weights and no
hub: the reference is the peak of allocated memory in the simulated step, which is not a measurement. The network
is used once, to install fitcheck-llm into an environment of its own; without it, that tool's lines stay empty.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no tool may ask the hub

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.catalog import CatalogEntry, find_model
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec, spec_from_config
from qhybrid.planner.memory import predict
from qhybrid.recipe.load import resolve
from qhybrid.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
FITCHECK_VERSION = "0.3.1"
FITCHECK_FOLDER = Path.home() / ".cache" / "qhybrid" / "estimators" / "fitcheck-llm"
PIP_SECONDS = 300
PACKAGES = ("qhybrid", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "deepspeed")
GIB, MIB = 2**30, 2**20
PADDED = False  # every row is full: no tool beside qhybrid prices the attention mask that padding needs

# What is called, and what the number holds. fitcheck-llm has two lines: its overhead is the CUDA context and
# fragmentation, and the reference, allocated memory, holds neither.
SIMULATED, CLOSED = "qhybrid, simulated step", "qhybrid, closed form"
ACCELERATE = "accelerate estimate-memory, int4"
ZERO2, ZERO3 = "DeepSpeed estimate_zero2", "DeepSpeed estimate_zero3"
FITCHECK, FITCHECK_TOTAL = "fitcheck-llm, without overhead", "fitcheck-llm, total"
TOOLS = {
    SIMULATED: "qhybrid.simulation.step.simulate(recipe, config, device='cuda', padded=False).peak_bytes: "
    "the most that torch's allocator would hold during two training steps",
    CLOSED: "qhybrid.planner.memory.predict(recipe, spec, layout, device='cuda', padded=False).peak: "
    "the same peak from formulas",
    ACCELERATE: "accelerate.commands.estimate.gather_data on a folder with the config.json, 'Total Size' of int4; "
    "verify_on_hub, its one question to the hub, is answered here. It holds the loaded weights and buffers of "
    "AutoModel, which has no lm_head. The column 'Training using Adam' is N/A for int4",
    ZERO2: "deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs(total_params, "
    "num_gpus_per_node=1, num_nodes=1, cpu_offload=False), the GPU's share: all parameters trained, with Adam, "
    "in mixed precision",
    ZERO3: "deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs(total_params, "
    "largest_layer_params, num_gpus_per_node=1, num_nodes=1, cpu_offload=False, cpu_offload_params=False), "
    "the GPU's share: all parameters trained, with Adam, in mixed precision",
    FITCHECK: "fitcheck MODEL --json, training mode: weights + lora + optimizer + gradients + activations",
    FITCHECK_TOTAL: "the same call's total, with its overhead for the CUDA context and fragmentation: 500 MiB and "
    "5% of weights and activations, for every GPU but a T4",
}
NOT_INSTALLED = "fitcheck-llm could not be installed"


class CannotSay(Exception):
    """A tool has no number for a recipe."""


@dataclass(frozen=True)
class Case:
    """A recipe and what the tools are told about its model."""

    name: str
    entry: CatalogEntry
    spec: ModelSpec
    recipe: Recipe
    layout: Layout


def case(name: str, model: str, bands: list[dict], batch: int, length: int, **training) -> Case:
    """A recipe of NF4 with double quantisation and bf16, as the defaults are, on a model of the catalog."""
    entry = find_model(model)
    assert entry is not None
    spec = spec_from_config(entry.config)
    sizes = {"per_device_train_batch_size": batch, "max_length": length, "gradient_accumulation_steps": 1}
    recipe = resolve(
        Recipe.model_validate(
            {
                "model": {"path": entry.hub_id},
                "adapters": bands,
                "data": {"sources": "unused.jsonl"},  # nothing here reads data
                "output_dir": "unused",
                "training": {"gradient_checkpointing": True, **sizes, **training},
            }
        )
    )
    return Case(name, entry, spec, recipe, build_layout(recipe, spec))


def cases() -> list[Case]:
    """The six recipes; every band adapts all linears."""
    r8, r16 = ([{"band": "all", "kind": "lora", "rank": rank}] for rank in (8, 16))
    three = [
        {"layers": "bottom", "kind": "lora", "rank": 8},
        {"layers": "middle", "kind": "adalora", "rank": 16},
        {"layers": "top", "kind": "dora", "rank": 16},
    ]
    kept, paged = {"gradient_checkpointing": False}, {"optim": "paged_adamw_8bit"}
    return [
        case("SmolLM2-135M, LoRA 8, 8×512, no checkpointing", "smollm2-135m", r8, 8, 512, **kept),
        case("Llama-2-7B, LoRA 16, 1×2048, no checkpointing", "llama-2-7b", r16, 1, 2048, **kept),
        case("Llama-2-7B, LoRA 16, 1×2048", "llama-2-7b", r16, 1, 2048),
        case("Llama-2-7B, LoRA 8 / AdaLoRA 16 / DoRA 16, 4×1024", "llama-2-7b", three, 4, 1024),
        case("Llama-3.1-8B, LoRA 16, 1×8192, paged_adamw_8bit", "llama-3.1-8b", r16, 1, 8192, **paged),
        case("Llama-2-70B, LoRA 16, 1×2048", "llama-2-70b", r16, 1, 2048),
    ]


def simulated(case: Case) -> int:
    """Bytes at the peak of the simulated step."""
    from qhybrid.simulation.step import simulate

    return simulate(case.recipe, case.entry.config, device="cuda", padded=PADDED).peak_bytes


def closed_form(case: Case) -> int:
    """Bytes at the peak, by the planner."""
    return predict(case.recipe, case.spec, case.layout, device="cuda", padded=PADDED).peak


def accelerate_int4(case: Case) -> int:
    """Bytes of the weights in int4, by the functions behind `accelerate estimate-memory`."""
    from accelerate.commands import estimate

    hub_says = SimpleNamespace(config={})  # "there is such a model, and it needs no code of its own"
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(estimate, "verify_on_hub", return_value=hub_says),
    ):
        (Path(folder) / "config.json").write_text(json.dumps(case.entry.config))
        arguments = SimpleNamespace(
            model_name=folder, library_name="transformers", trust_remote_code=False, dtypes=["int4"]
        )
        [(_, _, total_bytes, training)] = estimate.gather_data(arguments)
    # It would be another table if accelerate began to price the training of int4 models.
    assert set(training.values()) == {-1}, training
    return int(total_bytes)


def zero2(case: Case) -> int:
    """Bytes of model states on the one GPU, nothing offloaded, by DeepSpeed's function for ZeRO 2."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, gpu_bytes = estimate_zero2_model_states_mem_needs(
        case.spec.num_parameters, num_gpus_per_node=1, num_nodes=1, cpu_offload=False
    )
    return gpu_bytes


def zero3(case: Case) -> int:
    """Bytes of model states on the one GPU, nothing offloaded, by DeepSpeed's function for ZeRO 3."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    spec = case.spec
    # DeepSpeed's "layer" is one module with parameters of its own; in these models none has a bias.
    linears = [linear.in_features * linear.out_features for linear in spec.linears]
    _, gpu_bytes, _ = estimate_zero3_model_states_mem_needs(
        spec.num_parameters,
        max(spec.vocab_size * spec.hidden_size, *linears),
        num_gpus_per_node=1,
        num_nodes=1,
        cpu_offload=False,
        cpu_offload_params=False,
    )
    return gpu_bytes


def fitcheck_program() -> Path | None:
    """fitcheck's command, installed into an environment of its own unless it is there; None if it cannot be."""
    program = FITCHECK_FOLDER / "bin" / "fitcheck"
    with contextlib.suppress(OSError):  # not there, or made by a Python that is gone
        told = subprocess.run([program, "--version"], capture_output=True, text=True)
        if told.stdout.split()[-1:] == [FITCHECK_VERSION]:
            return program
    print(f"installing fitcheck-llm {FITCHECK_VERSION} into {FITCHECK_FOLDER} ...", file=sys.stderr)
    pip = [FITCHECK_FOLDER / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    wanted = ["-c", ROOT / "constraints.txt", f"fitcheck-llm=={FITCHECK_VERSION}"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", FITCHECK_FOLDER], check=True, stdout=sys.stderr)
        subprocess.run([*pip, *wanted], check=True, stdout=sys.stderr, timeout=PIP_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"fitcheck-llm is left out: {error}", file=sys.stderr)
        return None
    return program


def fitcheck(program: Path, case: Case) -> tuple[str, dict[str, float]]:
    """The options that stand for the recipe, and fitcheck's answer to them by component, in MiB.

    Raises:
        CannotSay: it has no words for the recipe, or refuses it.
    """
    training = case.recipe.training
    if len(case.recipe.adapters) > 1 or case.recipe.adapters[0].kind != "lora":
        raise CannotSay("it takes one rank of plain LoRA for all layers")
    optimizer = {
        # The states have the adapters' dtype. That the adapters have it too cannot be said: they are fp32 there.
        "adamw_torch_fused": ["--optimizer", "adamw", "--optimizer-dtype", "bf16"],
        "paged_adamw_8bit": ["--optimizer", "adam8bit"],  # paging cannot be said
    }[training.optim]
    options = ["--quant", "nf4", "--double-quant", "--precision", "bf16", "--flash-attn", *optimizer]
    options += ["--lora-r", str(case.recipe.adapters[0].rank), "--lora-targets", "full"]
    options += ["--batch-size", str(training.per_device_train_batch_size), "--seq-len", str(training.max_length)]
    options += ["--grad-checkpoint"] if training.gradient_checkpointing else []
    with tempfile.TemporaryDirectory() as folder:
        # What it advises for work without a network: a config.json in the hub's cache, and HF_HUB_OFFLINE.
        commit = "0" * 40
        model = Path(folder) / f"models--{case.entry.hub_id.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(json.dumps(case.entry.config))
        done = subprocess.run(
            [program, case.entry.hub_id, *options, "--gpu", "h100", "--json"],
            env={**os.environ, "HF_HOME": folder, "HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):  # 1: it does not fit into the GPU
        raise CannotSay(f"it refuses: {' '.join(done.stderr.split())}")
    answer = json.loads(done.stdout)
    # It counts parameters by itself; other counts would mean that another recipe was priced.
    assert answer["model"]["num_params"] == case.spec.num_parameters, answer["model"]
    assert answer["trainable_params"] == case.layout.num_parameters, answer
    return " ".join(options), answer["memory_mib"]


def price(case: Case, program: Path | None) -> dict:
    """The recipe and a line for each tool: bytes, and their ratio to the simulated peak."""
    lines: dict[str, dict] = {
        SIMULATED: {"bytes": simulated(case)},
        CLOSED: {"bytes": closed_form(case)},
        ACCELERATE: {"bytes": accelerate_int4(case)},
        ZERO2: {"bytes": zero2(case)},
        ZERO3: {"bytes": zero3(case)},
    }
    try:
        if program is None:
            raise CannotSay(NOT_INSTALLED)
        options, memory_mib = fitcheck(program, case)
        parts = [amount for name, amount in memory_mib.items() if name not in ("overhead", "total")]
        lines[FITCHECK] = {"bytes": round(sum(parts) * MIB), "options": options, "components_mib": memory_mib}
        lines[FITCHECK_TOTAL] = {"bytes": round(memory_mib["total"] * MIB)}
    except CannotSay as reason:
        lines[FITCHECK] = lines[FITCHECK_TOTAL] = {"bytes": None, "reason": str(reason)}
    reference = lines[SIMULATED]["bytes"]
    training = case.recipe.training
    return {
        "name": case.name,
        "model": case.entry.hub_id,
        "num_parameters": case.spec.num_parameters,
        "num_trained_parameters": case.layout.num_parameters,
        "adapters": [
            {"layers": band.layers, "kind": band.kind, "rank": band.rank, "init_rank": band.init_rank}
            for band in case.recipe.adapters
        ],
        "num_rows": training.per_device_train_batch_size,
        "length_tokens": training.max_length,
        "gradient_checkpointing": training.gradient_checkpointing,
        "optimizer": training.optim,
        "lines": [
            {
                "tool": tool,
                "bytes": line["bytes"],
                "ratio": None if line["bytes"] is None else round(line["bytes"] / reference, 4),
                **line,
            }
            for tool, line in lines.items()
        ],
    }


def table(priced: list[dict]) -> str:
    """A line for each tool, a column for each recipe: GiB, and in brackets the ratio to the simulated peak."""
    rows = [["GiB (ratio)", *(recipe["name"] for recipe in priced)]]
    for tool in TOOLS:
        lines = [line for recipe in priced for line in recipe["lines"] if line["tool"] == tool]
        rows.append([tool, *(cell(line) for line in lines)])
    text = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([text[0], "|---" * len(rows[0]) + "|", *text[1:]])


def cell(line: dict) -> str:
    """GiB and ratio as in "4.80 (1.000)", or why there is none."""
    if line["bytes"] is None:
        return "not installed" if line["reason"] == NOT_INSTALLED else "cannot"
    ratio = f"{line['ratio']:.3f}" if line["ratio"] < 10 else f"{line['ratio']:.1f}"
    return f"{line['bytes'] / GIB:.2f} ({ratio})"


def main() -> None:
    """Price the recipes, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "data" / "estimators.json")
    out: Path = parser.parse_args().out
    with contextlib.redirect_stdout(sys.stderr):  # what the libraries print is not part of the table
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
        program = fitcheck_program()
        priced = []
        for each in cases():
            print(f"pricing {each.name} ...", file=sys.stderr)
            priced.append(price(each, program))
    facts = {
        "reference": f"{SIMULATED}: CUDA's kernels and rounding on meta tensors; nothing was measured on a GPU",
        "settings": "NF4 with double quantisation, bfloat16, adapters on all linears, full rows without padding, "
        "no gradient accumulation, one process",
        "machine": {"system": platform.system(), "processor": platform.machine(), "gpu": None},
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
            "fitcheck-llm": FITCHECK_VERSION if program else None,
        },
        "tools": TOOLS,
        "recipes": priced,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(priced))
    if program is None:
        print(f"\n{NOT_INSTALLED}: its lines are empty.")


if __name__ == "__main__":
    main()
