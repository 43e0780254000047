"""Compares the merged model that qhybrid streams with peft's merge_and_unload: seconds, peak memory, values.

    python scripts/bench_export.py [--folder FOLDER] [--rounds 3]

Writes a random checkpoint in TinyLlama's shape (1.1B weights, bfloat16, 500 MB shards) and a LoRA adapter of mixed
ranks to FOLDER, or to a temporary one, and merges them in fresh processes, the ways in turn. Needs 9 GB of disk.
Prints markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from bench_load import CONFIG, MIB, PeakMemory, tensor_shapes, write_checkpoint

WAYS = ("peft", "qhybrid 16bit", "qhybrid nf4")
RANKS = (8, 16, 32)  # of the lower, middle and upper third of the layers
SAMPLED_LAYERS = (0, 11, 21)  # whose values are computed again in fp64


def write_adapter(folder: Path, base: Path) -> None:
    """A peft folder with LoRA of three ranks on all linear modules, in fp32."""
    import torch

    from qhybrid.adapters.peft_folder import write_peft_folder
    from qhybrid.adapters.plain import PlainModule

    generator = torch.Generator().manual_seed(1)
    modules = []
    for name, shape in tensor_shapes():
        if "_proj" not in name:
            continue
        layer = int(name.split(".")[2])
        rank = RANKS[layer * len(RANKS) // CONFIG["num_hidden_layers"]]
        a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
        b = torch.randn(shape[0], rank, generator=generator) * 0.02
        modules.append(PlainModule(name.removesuffix(".weight"), a, b, 16 / rank))
    write_peft_folder(modules, str(base), folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with no words of its own: the model's files must be complete."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def measure(way: str, base: Path, adapter: Path, out: Path) -> dict[str, object]:
    """Merge once in this process, and describe the time and the memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.utils import logging

    from qhybrid.adapters.folder import read_plain
    from qhybrid.evaluation.models import sections_of
    from qhybrid.export.merged.bake import bake
    from qhybrid.recipe.schema import QuantizationSection

    assert LlamaForCausalLM  # imported before memory is measured
    logging.disable_progress_bar()
    os.sync()
    memory = PeakMemory()
    memory.start()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    if way == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    else:
        plain = read_plain(adapter)
        section, _ = sections_of(plain.info, adapter, str(base))
        with bake(plain, section, QuantizationSection(), out, onto=way.split()[1]):
            pass
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    peak = memory.stop()
    begin = time.perf_counter()
    os.sync()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "flush_seconds": time.perf_counter() - begin,
        "peak": peak,
        "method": memory.method,
        "threads": torch.get_num_threads(),
    }


def in_fresh_process(way: str, base: Path, adapter: Path, out: Path) -> dict[str, object]:
    """`measure` in a process of its own."""
    places = [str(base), str(adapter), str(out)]
    command = [sys.executable, __file__, "--measure", way, *places]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Tensors:
    """All tensors of a model folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from qhybrid.base.locate import weight_files
        from qhybrid.base.safetensors_reader import SafetensorsReader

        readers = [SafetensorsReader(file) for file in weight_files(folder)]
        self._places = {entry.name: reader for reader in readers for entry in reader}

    def names(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str):
        return self._places[name].read(name)


def compare(base: Path, adapter: Path, outs: dict[str, Path]) -> list[str]:
    """How the results relate to each other and to fp64, as lines of markdown."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qhybrid.adapters.folder import read_plain

    modules = {f"{module.module}.weight": module for module in read_plain(adapter)}
    stored, results = Tensors(base), {way: Tensors(out) for way, out in outs.items()}
    names = set(stored.names())
    assert all(set(tensors.names()) == names for tensors in results.values())
    untouched = all(
        torch.equal(tensors[name], stored[name]) for tensors in results.values() for name in names - modules.keys()
    )
    largest = max(
        float((results["peft"][name].float() - results["qhybrid 16bit"][name].float()).abs().max())
        for name in modules
    )
    exact, worst, count = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0.0), 0
    for name, module in modules.items():
        if int(name.split(".")[2]) not in SAMPLED_LAYERS:
            continue
        weight = stored[name]
        delta = module.scaling * (module.b.double() @ module.a.double())
        nf4 = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        for way in WAYS:
            seen = nf4 if way.endswith("nf4") else weight
            reference = seen.double() + delta
            value = results[way][name]
            exact[way] += int((value == reference.to(torch.bfloat16)).sum())
            worst[way] = max(worst[way], float((value.double() - reference).abs().max()))
        count += weight.numel()
    lines = [
        f"Tensors without an adapter are those of the base, in all results: {untouched}.  ",
        f"Largest difference between peft and qhybrid 16bit: {largest:.2e}.",
        "",
        f"Against W + s·B·A in fp64 ({count:,} weights; W by bitsandbytes' own NF4 for nf4):",
        "",
        "| way | correctly rounded to bf16 | largest error |",
        "|---|---|---|",
    ]
    return lines + [f"| {way} | {exact[way] / count:.4%} | {worst[way]:.2e} |" for way in WAYS]


def report(runs: dict[str, list[dict]], base: Path, comparison: list[str]) -> str:
    """The measurements as markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    first = runs[WAYS[0]][0]
    lines = [
        f"Machine: {_processor()}, {os.cpu_count()} cores ({first['threads']} threads). {libraries}, Python "
        f"{platform.python_version()}.",
        f"{total / MIB:.0f} MiB of weights, largest shard {largest / MIB:.0f} MiB, files in the page cache; peak "
        f"memory above the imports ({first['method']}).",
        "",
        "| way | seconds | median | of peft in the same round: median | range | CPU seconds | then to the disk "
        "| peak MiB | peak / shard |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        ratios = [
            mine["seconds"] / theirs["seconds"] for mine, theirs in zip(runs[way], runs["peft"], strict=True)
        ]
        median = statistics.median(run["seconds"] for run in runs[way])
        peak = max(run["peak"] for run in runs[way])
        seconds = ", ".join(f"{run['seconds']:.2f}" for run in runs[way])
        cpu = statistics.median(run["cpu_seconds"] for run in runs[way])
        flush = statistics.median(run["flush_seconds"] for run in runs[way])
        lines.append(
            f"| {way} | {seconds} | {median:.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to "
            f"{max(ratios):.2f} | {cpu:.2f} | {flush:.2f} | {peak / MIB:.0f} | {peak / largest:.2f} |"
        )
    lines += [
        "",
        "qhybrid's seconds include hashing all files and writing them through to the disk, which peft leaves to "
        'the system ("then to the disk").',
        "",
    ]
    return "\n".join([*lines, *comparison])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Write what is missing, merge in all ways in turn, compare the last results, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use it again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, *places = arguments.measure
        print(json.dumps(measure(way, *map(Path, places))))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        base, adapter = folder / "base", folder / "adapter"
        base.mkdir(parents=True, exist_ok=True)
        if not (base / "config.json").exists():  # written last
            write_tokenizer(base)
            write_checkpoint(base)
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, base)
        for file in base.glob("*.safetensors"):  # into the page cache
            file.read_bytes()
        runs: dict[str, list[dict]] = {way: [] for way in WAYS}
        outs = {way: folder / f"merged-{way.replace(' ', '-')}" for way in WAYS}
        for number in range(arguments.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                shutil.rmtree(outs[way], ignore_errors=True)
                runs[way].append(in_fresh_process(way, base, adapter, outs[way]))
        text = report(runs, base, compare(base, adapter, outs))
        for out in outs.values():
            shutil.rmtree(out)
    print(text)


if __name__ == "__main__":
    main()
