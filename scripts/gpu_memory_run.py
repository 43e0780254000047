"""One case of gpu_memory_cases.py in this process: trained, or simulated. Prints its figures as a line of JSON.

    scripts/gpu_memory_run.py CASE --device cuda [--cap MIB | --simulate]
    scripts/gpu_memory_run.py --machine --device cuda

Started by gpu_memory.py, each time anew: what one recipe leaves in the allocator must not help or hinder the next.
With --device cpu the same code runs, but what it counts is no GPU's memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: nothing may ask the hub

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from bitsandbytes.nn import Linear4bit, Params4bit
from gpu_memory_cases import Case, read_case
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from qhybrid.adapters.attach import attach
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.spec import spec_from_config
from qhybrid.cli.main import quiet_libraries
from qhybrid.planner.plan import Plan, make_plan
from qhybrid.recipe.schema import Recipe
from qhybrid.simulation.allocator import replay
from qhybrid.simulation.rehearsal import full_rows, shortened, two_word_tokenizer
from qhybrid.simulation.shell import meta_base
from qhybrid.simulation.step import simulate
from qhybrid.training.arguments import training_arguments
from qhybrid.training.callbacks.allocate import AllocateRanks
from qhybrid.training.events import EventLog
from qhybrid.training.memory import hardware_of, process_peak_bytes
from qhybrid.training.planning import Hardware
from qhybrid.training.run import versions
from qhybrid.training.trainer import BandedTrainer

STEPS = 4
PADDING = 8  # tokens of each row, where a case has padding
MIB = 2**20


# ---- the model ----


def random_base(recipe: Recipe, config: dict[str, Any], device: str) -> PreTrainedModel:
    """The recipe's base model on `device` with random values, written as NF4 from the start."""
    model = meta_base(recipe, config)
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by the placeholder, which tied weights share
    for module in model.modules():
        if isinstance(module, Linear4bit):
            _fill_nf4(module, device)
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if id(old) not in made:
                    made[id(old)] = (old, nn.Parameter(_random(name, old, device), requires_grad=False))
                module._parameters[name] = made[id(old)][1]
    decoder = model.get_decoder()
    with torch.device(device):  # its buffers follow from the configuration
        decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"still without values: {left}"
    return model.eval()


def _random(name: str, like: Tensor, device: str) -> Tensor:
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    if value.dim() > 1:
        return value.normal_(0, 0.02)
    return value.fill_(0 if name == "bias" else 1)


def _fill_nf4(module: Linear4bit, device: str) -> None:
    """Give a layer of `meta_base` random levels, with scales that make weights of about ±0.03."""

    def random_bytes(like: Tensor) -> Tensor:
        return torch.randint(0, 256, like.shape, dtype=torch.uint8, device=device)

    placeholder, state = module.weight, module.weight.quant_state
    state.code = get_4bit_type("nf4", device=device)
    if state.nested:  # the scales are 0.05 ± 0.01
        state.absmax = random_bytes(state.absmax)
        state.offset = torch.full((), 0.05, device=device)
        state.state2.absmax = torch.full(state.state2.absmax.shape, 0.01, device=device)
        state.state2.code = create_dynamic_map().to(device)
    else:
        state.absmax = torch.full(state.absmax.shape, 0.05, device=device)
    module.weight = Params4bit(
        random_bytes(placeholder),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=placeholder.compress_statistics,
        quant_type="nf4",
        quant_storage=placeholder.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


# ---- the counters ----


class CudaMeter:
    """What torch's allocator and the driver count. Made before the first tensor."""

    def __init__(self, cap: int | None) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.cuda.empty_cache()  # that tensor's segment is the allocator's, not the context's
        self._total = torch.cuda.get_device_properties(0).total_memory
        self.context = self._used()
        self._used_peak = self._outside_peak = self._resting = self._build_peak = 0
        if cap is not None:  # half a MiB more, so that rounding takes nothing away
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap + 0.5) * MIB / self._total))

    @staticmethod
    def _used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def start(self) -> None:
        """The model is built, and training begins."""
        self._build_peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        """A step was taken."""
        torch.cuda.synchronize()
        used, self._resting = self._used(), torch.cuda.memory_allocated()
        self._used_peak = max(self._used_peak, used)
        self._outside_peak = max(self._outside_peak, used - torch.cuda.memory_reserved())

    def figures(self) -> dict[str, Any]:
        """Bytes, since `start`."""
        measured = {
            "max_memory_allocated": torch.cuda.max_memory_allocated(),
            "max_memory_reserved": torch.cuda.max_memory_reserved(),
            "used": self._used_peak,  # of the device, after a step
            "context": self.context,
            "outside_allocator": self._outside_peak,  # the context once every kernel is loaded
            "resting": self._resting,
            "build_peak": self._build_peak,
        }
        # In one run torch makes a workspace for each thread that multiplies: the main one, and the engine's.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            before = torch.cuda.memory_allocated()
            clear()
            measured["workspace"] = before - torch.cuda.memory_allocated()
        return measured


class CpuMeter:
    """Stands in for the dry run: bytes of tensors from torch's profiler, and the process's resident memory."""

    context = 0

    def __init__(self, cap: int | None) -> None:
        self._cap = cap
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()

    def start(self) -> None:
        """The model is built, and training begins."""

    def sample(self) -> None:
        """A step was taken."""

    def figures(self) -> dict[str, Any]:
        """Bytes, since this was made.

        Raises:
            torch.OutOfMemoryError: they were more than the cap.
        """
        self._profiler.__exit__(None, None, None)
        events = self._profiler.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        alive = peak = 0
        for _, change in sorted(changes, key=lambda item: item[0]):
            alive += change
            peak = max(peak, alive)
        if self._cap is not None and peak > self._cap * MIB:
            raise torch.OutOfMemoryError(f"the dry run's cap of {self._cap} MiB is below its {peak / MIB:.1f} MiB")
        return {"max_memory_allocated": peak, "max_memory_reserved": process_peak_bytes(), "context": 0}


# ---- the run ----


class _Watch(TrainerCallback):
    """The seconds of each step, and the meter's sample after it."""

    def __init__(self, meter: CudaMeter | CpuMeter) -> None:
        self._meter = meter
        self._ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._ends = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._meter.sample()
        self._ends.append(time.perf_counter())

    def seconds(self) -> float | None:
        """The median step without the first, in which libraries load and kernels are compiled."""
        later = [end - begin for begin, end in zip(self._ends[1:], self._ends[2:], strict=False)]
        return round(statistics.median(later), 4) if later else None


def train(case: Case, device: str, meter: CudaMeter | CpuMeter, watch: _Watch) -> int:
    """The optimizer steps of a real run, on full rows. Returns how many were taken."""
    changes: dict[str, Any] = {"max_steps": STEPS}
    length = case.recipe.training.max_length
    if case.padded:  # every row, so that every micro-batch is, whichever rows it gets
        changes |= {"pad_to_multiple_of": length, "max_length": length - PADDING}
    recipe = shortened(case.recipe)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})
    layout = build_layout(recipe, spec_from_config(case.config))
    set_seed(0)
    model = random_base(recipe, case.config, device)
    model = attach(model, layout, dtype=getattr(torch, recipe.model.resolved_adapter_dtype))
    with tempfile.TemporaryDirectory() as folder, closing(EventLog(Path(folder) / "events.jsonl")) as events:
        trainer = BandedTrainer(
            model=model,
            recipe=recipe,
            layout=layout,
            find_rows=lambda batches: [],
            report=lambda event, **facts: None,
            args=training_arguments(recipe, Path(folder)),
            train_dataset=full_rows(recipe),
            processing_class=two_word_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(AllocateRanks(trainer, events))
        trainer.add_callback(watch)
        gc.collect()
        meter.start()
        trainer.train()
    return trainer.state.global_step


def plan_of(case: Case, hardware: Hardware) -> Plan:
    """The plan as `sft` makes it, without the peak of loading: the random model is never in 16 bits."""
    spec = spec_from_config(case.config)
    plan = make_plan(
        case.recipe,
        spec,
        hardware.budget,
        device=hardware.device,
        padded=case.padded,
        process_bytes=hardware.process_bytes,
    )
    exact = replace(plan, load_peak=0)
    return replace(exact, margin=plan.margin * exact.allocated // plan.allocated)


def predicted_figures(plan: Plan) -> dict[str, Any]:
    """Bytes of the plan, by the names that the report reads."""
    on_cuda = plan.device == "cuda"
    return {
        "predicted_allocated": plan.allocated,
        "predicted_reserved": plan.reserved if on_cuda else plan.needed,
        "predicted_needed": plan.needed,
        "predicted_workspace": plan.workspace,
        "predicted_resting": plan.prediction.moments["model and states"],
        "predicted_moment": plan.prediction.moment,
        "predicted_components": plan.prediction.components,
        "fits": plan.fits,
    }


def measure(case: Case, device: str, cap: int | None) -> dict[str, Any]:
    """Train, and say what it took: status ok, oom or failed."""
    meter = (CudaMeter if device == "cuda" else CpuMeter)(cap)
    # Asked for before the first tensor of the model, as in a real run: it holds the context's size.
    found: dict[str, Any] = predicted_figures(plan_of(case, hardware_of(case.recipe)))
    watch = _Watch(meter)
    try:
        steps = train(case, device, meter, watch)
        found |= {"status": "ok", "steps": steps, "seconds_per_step": watch.seconds()}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        short = any(word in text for word in ("OutOfMemory", "out of memory", "ALLOC_FAILED"))
        found |= {"status": "oom" if short else "failed", "error": text[:500]}
    gc.collect()
    try:
        return found | meter.figures()
    except torch.OutOfMemoryError as error:
        return found | {"status": "oom", "error": str(error)}


def simulated_figures(case: Case, device: str) -> dict[str, Any]:
    """The simulated run, which needs no GPU. cuBLAS' workspace is not in it."""
    began = time.perf_counter()
    result = simulate(case.recipe, case.config, device=device, padded=case.padded)
    allocated = result.peak_bytes
    if device == "cuda":  # max_memory_allocated also counts what is left of blocks that are not split
        allocated = replay(result.timeline).allocated_bytes
    return {
        "status": "ok",
        "simulated_bytes": result.peak_bytes,
        "simulated_allocated": allocated,
        "simulated_reserved": result.reserved_bytes,
        "seconds": round(time.perf_counter() - began, 1),
    }


# ---- the machine ----


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: versions, the GPU, its driver, its context and cuBLAS' workspaces."""
    found: dict[str, Any] = {"status": "ok", "python": sys.version.split()[0], "versions": versions()}
    if device == "cpu" or not torch.cuda.is_available():
        return {**found, "gpu": None}
    context = CudaMeter(None).context
    properties = torch.cuda.get_device_properties(0)
    main, engine = _workspaces()
    return {
        **found,
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "total": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "")),
        "context": context,
        "workspace": main,  # what the first product leaves behind
        "workspace_backward": engine,  # the autograd engine's thread has a cuBLAS handle of its own
    }


def _workspaces() -> tuple[int, int]:
    """What memory_allocated grows by over the first matmul, and over the first one in a backward pass."""
    a = torch.ones(256, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    size = a.numel() * a.element_size()  # a multiple of the allocator's 512 bytes, as the result's is
    before = torch.cuda.memory_allocated()
    product = a @ a
    main = torch.cuda.memory_allocated() - before - size
    total = product.sum()
    before = torch.cuda.memory_allocated()
    total.backward()  # leaves the gradient of a
    torch.cuda.synchronize()
    return main, torch.cuda.memory_allocated() - before - size


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="?", help="a line of gpu_memory_cases.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--cap", type=int, help="MiB that torch's allocator may take")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--machine", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    if options.machine:
        figures = machine(options.device)
    elif options.simulate:
        figures = simulated_figures(read_case(options.case, options.device), options.device)
    else:
        figures = measure(read_case(options.case, options.device), options.device, options.cap)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
