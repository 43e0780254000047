"""What the process and the GPU hold, and what they may hold."""

from __future__ import annotations

import ctypes
import resource

import psutil
import torch

from qhybrid.planner.hardware import Gpu
from qhybrid.planner.plan import Budget
from qhybrid.recipe.schema import Recipe
from qhybrid.training.planning import Hardware
from qhybrid.units import format_bytes, parse_bytes


def measured_memory() -> dict[str, int]:
    """Bytes: the process's resident set and, on CUDA, the allocator's peaks since the start."""
    measured = {"process_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        measured["cuda_max_allocated_bytes"] = torch.cuda.max_memory_allocated()
        measured["cuda_max_reserved_bytes"] = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        measured["cuda_used_bytes"] = total - free  # by every process, as NVML sees it
    return measured


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU, or torch on the CPU, had no memory left."""
    if not isinstance(error, RuntimeError):
        return False
    words = str(error).lower()
    found = any(word in words for word in ("out of memory", "alloc_failed", "can't allocate memory"))
    return found or isinstance(error, torch.OutOfMemoryError)


def process_peak_bytes() -> int:
    """The largest resident set that this process ever had, loading included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def give_back_freed_memory() -> None:
    """Let the system have what was freed: glibc keeps it for the thread that had it, and no other can use it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries of C have none, or need none
    if trim is not None:
        trim(0)


def hardware_of(recipe: Recipe) -> Hardware:
    """Where `recipe` would run on this machine, and what it may use there.

    On a GPU what the driver counts as taken before the first tensor (this process' context, and whatever others
    hold) is not there for the run. memory.vram limits what torch takes beside that, as `limit_vram` makes sure.
    """
    process = psutil.Process().memory_info().rss
    if recipe.training.use_cpu or not torch.cuda.is_available():
        return Hardware("cpu", Budget(None), process)
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    card = Gpu(properties.name, total, (properties.major, properties.minor), 0.0, None)
    wanted = parse_bytes(recipe.memory.vram) if recipe.memory.vram is not None else total
    taken = total - free
    limit = min(wanted + taken, total)
    source = "memory.vram" if limit < total else properties.name
    return Hardware("cuda", Budget(limit, card, taken, source), process)


def limit_vram(vram: str | None) -> str | None:
    """Let this process take at most `vram` ("24GiB") of the current GPU.

    Returns:
        A notice when the setting has no effect: there is no GPU, or it is clearly smaller. A "24 GB" card has a
        little less than 24 GiB, which is not worth a word.
    """
    if vram is None:
        return None
    if not torch.cuda.is_available():
        return f"memory.vram {vram} has no effect: there is no CUDA device"
    device = torch.cuda.current_device()
    total, wanted = torch.cuda.get_device_properties(device).total_memory, parse_bytes(vram)
    if wanted < total:
        torch.cuda.set_per_process_memory_fraction(wanted / total)
    elif wanted > 1.1 * total:
        return f"memory.vram is {vram}, but the GPU has only {format_bytes(total)}"
    return None
