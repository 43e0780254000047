"""Compares load_base with transformers' own NF4 load: seconds, peak memory, and that the bits are equal.

    python scripts/bench_load.py [--folder FOLDER] [--rounds 2] [--device cpu]

Writes a random checkpoint in TinyLlama's shape (1.1B weights, bfloat16, 500 MB shards) to FOLDER, or to a
temporary one, and loads it in fresh processes, the ways in turn: also for PiSSA of rank 16 on all linear layers,
which decomposes every weight first. Needs 2.3 GB of disk. Prints markdown.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 500_000_000
PISSA, PISSA_RANK = "qhybrid, PiSSA", 16
LOADERS = ("transformers", "qhybrid", PISSA)
TOKENS = [1, 450, 7483, 310, 3444, 338, 3681, 29889, 12, 31999, 0, 77, 2048, 5632, 9, 2]
MIB = 2**20


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, in the order of the model."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    key_value = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, outputs, inputs in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", key_value, hidden),
            ("self_attn.v_proj", key_value, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}{name}.weight", (outputs, inputs)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (CONFIG["vocab_size"], hidden)


def write_checkpoint(folder: Path) -> None:
    """Write config.json, shards and index, holding one tensor in memory at a time."""
    import torch

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensor_shapes():
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and filled + num_bytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += num_bytes

    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shard:
            end = position + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            weight_map[name] = file_name
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shard:
                value = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.02
                file.write(value.to(torch.bfloat16).view(torch.uint8).numpy())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


class PeakMemory:
    """The highest resident memory of this process since `start`, by the kernel's mark or by polling."""

    def __init__(self) -> None:
        self.method = "VmHWM, reset before loading"
        self._polled_peak = 0
        self._done = threading.Event()

    def start(self) -> None:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.method = "resident memory, polled every 2 ms"
            threading.Thread(target=self._poll, daemon=True).start()
        self._before = self._resident()

    def stop(self) -> int:
        """Bytes above those at `start`."""
        self._done.set()
        peak = self._polled_peak or self._status("VmHWM")
        return peak - self._before

    def _poll(self) -> None:
        while not self._done.wait(0.002):
            self._polled_peak = max(self._polled_peak, self._resident())

    def _resident(self) -> int:
        if Path("/proc/self/status").exists():
            return self._status("VmRSS")
        import psutil

        return psutil.Process().memory_info().rss

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(key)


def measure(loader: str, folder: Path, device_name: str) -> dict[str, object]:
    """Load once in this process, and describe the time, the memory and the result."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    from qhybrid.adapters.pissa import principal_parts
    from qhybrid.architecture.bands import layout_of_bands
    from qhybrid.architecture.spec import read_spec
    from qhybrid.base.load import keep_exact_on_cpu, load_base
    from qhybrid.recipe.band import BandSection
    from qhybrid.recipe.schema import ModelSection, QuantizationSection

    logging.disable_progress_bar()
    device = torch.device(device_name)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.zeros(1, device=device)  # the CUDA context is not part of the model
        torch.cuda.reset_peak_memory_stats(device)

    memory = PeakMemory()
    memory.start()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    if loader == "qhybrid":
        model = load_base(ModelSection(path=str(folder)), QuantizationSection(), device=device)
    elif loader == PISSA:
        layout = layout_of_bands((BandSection(rank=PISSA_RANK, init="pissa"),), read_spec(folder))
        bf16 = torch.bfloat16
        parts = principal_parts(layout, folder, dtype=bf16, adapter_dtype=bf16, device=device)
        model = load_base(ModelSection(path=str(folder)), QuantizationSection(), device=device, without=parts)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            dtype=torch.bfloat16,
            device_map={"": device},
        )
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    host_peak = memory.stop()
    device_peak = torch.cuda.max_memory_allocated(device) if on_cuda else None

    state = model.state_dict()
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in state.values()}
    hashes = {
        name: hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in state.items()
    }
    keep_exact_on_cpu(model)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS], device=device)).logits
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "host_peak": host_peak,
        "device_peak": device_peak,
        "method": memory.method,
        "size": sum(tensor.numel() * tensor.element_size() for tensor in storages.values()),
        "num_quantized": sum(isinstance(module, Linear4bit) for module in model.modules()),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "hashes": hashes,
        "logits": hashlib.sha256(logits.float().cpu().contiguous().numpy()).hexdigest(),
    }


def in_fresh_process(loader: str, folder: Path, device: str) -> dict[str, object]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", loader, "--folder", str(folder), "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_name() -> str:
    """The processor's name, as the machine tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(runs: dict[str, list[dict]]) -> str:
    """The comparison as markdown."""
    first = runs["qhybrid"][0]
    on_cuda = first["device_peak"] is not None
    peak_key = "device_peak" if on_cuda else "host_peak"
    packages = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
    lines = [
        f"Machine: {cpu_name()}, {os.cpu_count()} cores, {first['threads']} torch threads; "
        f"model on {first['device']}.  ",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in packages) + ".  ",
        f"Model: {sum(math.prod(shape) for _, shape in tensor_shapes()):,} weights, {first['num_quantized']} "
        f"layers in NF4; {first['size'] / MIB:.0f} MiB when loaded. The files are in the page cache.  ",
        f"Peak: {'torch.cuda.max_memory_allocated' if on_cuda else 'resident memory above the imports'}"
        f" (host: {first['method']}).",
        "",
        "| loader | seconds | median | CPU seconds | peak MiB | peak / size | host peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = {}
    for loader in LOADERS:
        seconds = [run["seconds"] for run in runs[loader]]
        medians[loader] = statistics.median(seconds)
        peak = max(run[peak_key] for run in runs[loader])
        host = max(run["host_peak"] for run in runs[loader])
        cpu = ", ".join(f"{run['cpu_seconds']:.2f}" for run in runs[loader])
        lines.append(
            f"| {loader} | {', '.join(f'{value:.2f}' for value in seconds)} | {medians[loader]:.2f} "
            f"| {cpu} | {peak / MIB:.0f} | {peak / first['size']:.2f} | {host / MIB:.0f} |"
        )
    everything = [run for loader in LOADERS if loader != PISSA for run in runs[loader]]
    pissa_is_one = all(run["hashes"] == runs[PISSA][0]["hashes"] for run in runs[PISSA])
    same_state = all(run["hashes"] == first["hashes"] for run in everything)
    same_logits = all(run["logits"] == first["logits"] for run in everything)
    return "\n".join(
        [
            *lines,
            "",
            f"Time, qhybrid / transformers: {medians['qhybrid'] / medians['transformers']:.2f}.  ",
            f"All {len(first['hashes'])} tensors (packed weights, absmax, the rest) equal: {same_state}.  ",
            f"Logits of {len(TOKENS)} tokens bit-equal: {same_logits}.  ",
            f"Tensors of the PiSSA loads (rank {PISSA_RANK}, decomposed anew each time) equal: {pissa_is_one}.",
        ]
    )


def main() -> None:
    """Write the checkpoint where it is missing, run both loaders in turn, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use it again")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default=None, help="cpu or cuda; cuda when there is one")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.device)))
        return

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():  # written last
            write_checkpoint(folder)
        runs: dict[str, list[dict]] = {loader: [] for loader in LOADERS}
        for _ in range(arguments.rounds):
            for loader in LOADERS:
                runs[loader].append(in_fresh_process(loader, folder, device))
    print(report(runs))


if __name__ == "__main__":
    main()
