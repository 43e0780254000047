"""A recipe's bands with PiSSA, their model and their weights, for the tests of it."""

from __future__ import annotations

import numpy as np
import torch
from helpers import tiny_layout
from safetensors.torch import load_file

from qhybrid.adapters.attach import attach
from qhybrid.adapters.pissa import principal_parts
from qhybrid.base.load import load_base
from qhybrid.recipe.schema import ModelSection, QuantizationSection

TOKENS = torch.arange(4, 36)[None]
NF4, NONE = QuantizationSection(), QuantizationSection(method="none")
RANK = 4
BANDS = [
    {"band": "a", "layers": "0-1", "rank": RANK, "alpha": 12, "init": "pissa"},  # s = 3
    {"band": "b", "layers": "2-3", "kind": "rslora", "rank": RANK, "alpha": RANK, "init": "pissa"},  # s = 2
    {"band": "c", "layers": "4", "kind": "dora", "rank": RANK, "alpha": 10, "init": "pissa"},  # s = 2.5
    {"band": "d", "layers": "5", "rank": RANK},
]
SCALINGS = {0: 3.0, 1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}


def section(base, dtype="float32"):
    return ModelSection(path=str(base), dtype=dtype, adapter_dtype=dtype)


def layout_of(bands=BANDS):
    return tiny_layout(bands, intermediate_size=128)


def parts_of(base, layout=None, dtype=torch.float32, adapter_dtype=None):
    layout = layout or layout_of()
    return principal_parts(layout, base, dtype=dtype, adapter_dtype=adapter_dtype or dtype)


def pissa_model(base, quantization=NONE, dtype="float32", bands=BANDS):
    layout = layout_of(bands)
    parts = parts_of(base, layout, getattr(torch, dtype))
    loaded = load_base(section(base, dtype), quantization, without=parts)
    return attach(loaded, layout, dtype=getattr(torch, dtype)), layout


def weights_of(base):
    """Every weight as float64 by its module's name."""
    return {
        name.removesuffix(".weight"): value.double().numpy()
        for name, value in load_file(base / "model.safetensors").items()
    }


def best(weight: np.ndarray, rank: int) -> np.ndarray:
    """U_r·S_r·V_rᵀ."""
    u, sigma, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


def relative(one, other) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
