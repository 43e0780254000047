"""PiSSA: which part of a weight is trained, and what becomes of that part on a base that has it still.

Meng et al., arXiv 2404.02948. W = U·S·Vᵀ; B0 = U_r·√(S_r/s) and A0 = √(S_r/s)·V_rᵀ, so that s·B0·A0 is the best
approximation of W of rank r. W − s·B0·A0 is frozen (on a 4-bit base its NF4 form is, the paper's QPiSSA), and B, A
are trained from B0, A0 on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from qhybrid.adapters.low_rank import leading_triple
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import read_config
from qhybrid.base.nf4 import quantize_nf4
from qhybrid.base.principal import Parts, PrincipalPart, stored_quantized
from qhybrid.base.weights import ModuleWeights
from qhybrid.errors import ModelError
from qhybrid.recipe.band import PISSA
from qhybrid.recipe.schema import QuantizationSection


def principal_part(
    weight: Tensor, rank: int, scaling: float, *, dtype: torch.dtype, name: str = "the weight"
) -> PrincipalPart:
    """A0 (rank, in) and B0 (out, rank) of W (out, in) in `dtype`, on the CPU.

    The rounding to `dtype` takes nothing from W: what the rounded factors lack stays in W − s·B0·A0.

    Args:
        weight: in the dtype of the training.

    Raises:
        ModelError: W has a lower rank, or holds values that are not finite; the message has `name`.
    """
    if not weight.isfinite().all():
        raise ModelError(f"{name} of the base model holds values that are not finite", hint="copy the model again")
    u, sigma, v = leading_triple(weight.float(), rank) if weight.any() else (weight, weight[:0, 0], weight)
    if len(sigma) < rank:
        raise ModelError(
            f"{name} of the base model has rank {len(sigma)}, and PiSSA is to train {rank} of it",
            hint=f"a rank of at most {len(sigma)}, or init: kaiming" if len(sigma) else "init: kaiming there",
        )
    share = (sigma / scaling).sqrt()
    a, b = share[:, None] * v, u * share
    return PrincipalPart(a.to("cpu", dtype).contiguous(), b.to("cpu", dtype).contiguous(), scaling)


def principal_parts(
    layout: Layout,
    folder: Path,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, PrincipalPart]:
    """The principal parts of all weights that `layout` starts so, by the names of their modules.

    Read one at a time and before the model is loaded: at the peak there is one weight in fp32 and the factors.

    Args:
        folder: the base model's.
        dtype: of the training, to which each weight is cast first. adapter_dtype: of A0 and B0.
        device: where to decompose them.

    Raises:
        ModelError: the folder's weights are quantised, damaged or missing; or as `principal_part`.
    """
    rows = [row for row in layout if row.init == PISSA]
    if not rows:
        return {}
    if read_config(folder / "config.json").get("quantization_config") is not None:
        raise stored_quantized(str(folder))
    with ModuleWeights(folder) as weight_of:
        return {
            row.module: principal_part(
                weight_of(row.module).to(device, dtype),
                row.rank,
                row.scaling,
                dtype=adapter_dtype,
                name=row.module,
            )
            for row in rows
        }


def distance_on_whole_base(
    parts: Parts,
    folder: Path,
    dtype: torch.dtype,
    quantization: QuantizationSection,
    *,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """How far PiSSA's weights are from the trained ones when they run on the base as it is.

    There s·B·A − s·B0·A0 is added to Q(W), where training added s·B·A to Q(W − s·B0·A0); Q is NF4 and back, and
    without quantisation the rounding to `dtype`. Whatever A and B became, the weights differ by the same.

    Returns:
        ‖Q(W) − s·B0·A0 − Q(W − s·B0·A0)‖ / ‖W‖ over all weights with a part; and ‖Q(W) − W‖ / ‖W‖, the base's own
        error, to compare it with.

    Raises:
        ModelError: a weight cannot be read.
    """

    def seen(weight: Tensor) -> Tensor:
        if quantization.method == "none":
            return weight.float()
        return dequantize_4bit(*quantize_nf4(weight, double_quant=quantization.double_quant)).float()

    moved = own = whole = 0.0
    with ModuleWeights(folder) as weight_of:
        for name, part in parts.items():
            weight = weight_of(name).to(device, dtype)
            on_base = seen(weight)
            rest = weight.clone()
            part.take_out_of(rest)
            own += float((on_base - weight.float()).norm()) ** 2
            a, b = part.a.to(on_base), part.b.to(on_base)
            on_base.addmm_(b, a, alpha=-part.scaling)
            moved += float((on_base - seen(rest)).norm()) ** 2
            whole += float(weight.float().norm()) ** 2
    return (moved / whole) ** 0.5, (own / whole) ** 0.5
