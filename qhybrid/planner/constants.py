"""Numbers that had to be measured or read in a driver's or library's source, each with where it comes from."""

from __future__ import annotations

import os

from qhybrid.planner.hardware import Gpu

MIB = 2**20

# What a process holds of a GPU before its first tensor: driver, kernels, streams. Not measured by us: no CUDA
# device was at hand. 300 to 600 MiB are commonly reported for torch on cards from Ampere on. scripts/gpu_memory.py
# measures it, `qhybrid plan --context` takes another value, and `qhybrid sft` on a GPU asks the driver.
CUDA_CONTEXT_BYTES = 512 * MIB

# cuBLAS' workspace, which torch takes from its own allocator on the first product
# (aten/src/ATen/cuda/CUDABlas/CublasHandlePool.cpp, parseChosenWorkspaceSize): 2 x 4096 KiB + 8 x 16 KiB, and
# 32 MiB on compute capability 9.0 and above.
CUBLAS_WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
CUBLAS_WORKSPACE_BYTES_SM90 = 32 * MIB

# What torch reserves beyond what is allocated, as a share of it: segments are not filled to the last byte. From
# replays of simulated steps through the caching allocator (simulation/allocator.py): with full rows, from 1 GiB
# on, 1.02 to 1.20 with a median of 1.10 over 14 recipes, and 1.003 to 1.066 with expandable segments; `plan
# --simulate` prints it for a recipe. Rows of very different lengths take more. Cached segments are given back
# before torch runs out of memory.
RESERVED_MARGIN = 0.10
RESERVED_MARGIN_EXPANDABLE = 0.05

# Resident memory of a training process before the model: Python, torch, transformers, trl and the rest, CPU build.
PROCESS_BYTES = 900 * MIB


# What the process grows by in its first steps: libraries that load late, and their caches. Measured on a CPU with
# a model of 0.4 MB (`qhybrid sft`, torch 2.13): 201 MiB.
PROCESS_GROWTH_BYTES = 201 * MIB


def reserved_margin() -> float:
    """The share for this environment, which may ask torch for expandable segments."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return RESERVED_MARGIN_EXPANDABLE if "expandable_segments:True" in settings else RESERVED_MARGIN


def cublas_workspace(gpu: Gpu | None, threads: int = 2) -> int:
    """Bytes of cuBLAS' workspaces on this GPU; of the smaller kind where it is not known.

    One for each thread that has a handle: that of the forward pass, and the autograd engine's for the device.
    """
    is_large = gpu is not None and gpu.compute_capability >= (9, 0)
    return threads * (CUBLAS_WORKSPACE_BYTES_SM90 if is_large else CUBLAS_WORKSPACE_BYTES)
