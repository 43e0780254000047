#!/usr/bin/env python
"""Times `qhybrid merge`'s methods on one module of a 7B model. Usage: bench_merge.py [METHOD ...]"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from pathlib import Path

import torch

from qhybrid.adapters.info import AdapterInfo
from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.export.derive.combine import METHODS, CombineSettings, combine

OUT, INNER, RANK, SOURCES = 4096, 11008, 16, 3
INFO = AdapterInfo(
    base_model="base", base_revision=None, quantization="nf4", double_quant=True, dtype="bfloat16",
    adapter_dtype="float32", attn_implementation="sdpa",
)  # fmt: skip


def random_adapter(seed: int) -> PlainAdapter:
    """One module whose singular values fall to a tenth, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    a = 0.01 * torch.randn(RANK, INNER, generator=generator)
    b = 0.01 * torch.randn(OUT, RANK, generator=generator) * torch.logspace(0, -1, RANK)
    return PlainAdapter((PlainModule("model.layers.0.mlp.down_proj", a, b, 2.0),), INFO, Path(f"{seed}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    methods = parser.parse_args().methods
    sources = [(random_adapter(seed), 1.0) for seed in range(SOURCES)]
    print(
        f"{SOURCES} adapters of rank {RANK} on {OUT}×{INNER}; {os.cpu_count()} cores ({platform.machine()}), ",
        end="",
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("method           rank   error  seconds  peak of the process")
    for method in methods:
        began = time.perf_counter()
        (found,) = combine(sources, CombineSettings(method))
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{method:16} {found.module.rank:4} {found.error:7.2%} {seconds:8.1f}  {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
