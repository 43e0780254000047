"""DoRA on a (quantised) linear layer: the forward pass, its row norms and its magnitudes.

W' = m ⊙ (W + s·B·A) / ||W + s·B·A||, with the norm taken along each output row, held constant in the backward
pass, and m starting at ||W|| (Liu et al., arXiv 2402.09353, eq. 5 and section 4.3). W is the weight that the
forward pass sees: on a 4-bit base the dequantised one.

peft's own DoRA builds B·A as an (out, in) matrix on every forward pass. Here the norm comes from
||W + sBA||² = rowsum(W²) + 2s·rowsum((W·Aᵀ) ⊙ B) + s²·rowsum((B·(A·Aᵀ)) ⊙ B), which needs nothing larger than
the one dequantised weight, and is computed once for each optimizer step instead of once for each micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

_ROWS_PER_CHUNK = 1024  # rows of W that are widened to fp32 at a time
# Some checkpoints have all-zero rows (Llama-3.1-8B's o_proj); their direction is undefined and stays zero.
_SMALLEST_NORM = 1e-12


def dequantized_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) that `linear` multiplies with; a 4-bit weight is dequantised into a new tensor."""
    weight = linear.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach()


class DoraMagnitude(nn.Module):
    """The magnitudes m (out,) in fp32, and what the row norms need. Named and saved as in peft."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        square = torch.cat(
            [rows.float().square().sum(1) for rows in dequantized_weight(base).split(_ROWS_PER_CHUNK)]
        )
        self.register_buffer("base_square", square, persistent=False)  # rowsum(W²), never changes
        self.weight = nn.Parameter(square.sqrt())
        self.holding = False
        self._held: Tensor | None = None

    @torch.no_grad()
    def norm(self, base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """||W + s·B·A|| for each output row.

        Args:
            base: the layer that holds W (out, in).
            a: (r, in). b: (out, r). scaling: s.

        Returns:
            (out,) in fp32, without a gradient.
        """
        if self.holding and self._held is not None:
            return self._held
        with torch.autocast(
            "cpu" if a.is_meta else a.device.type, enabled=False
        ):  # or the products below are rounded to bf16
            norm = self._compute_norm(dequantized_weight(base), a.float(), b.float(), scaling)
        if self.holding:
            self._held = norm
        return norm

    def _compute_norm(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        cross = torch.cat(
            [
                ((rows.float() @ a.T) * b_rows).sum(1)
                for rows, b_rows in zip(weight.split(_ROWS_PER_CHUNK), b.split(_ROWS_PER_CHUNK), strict=True)
            ]
        )
        own = ((b @ (a @ a.T)) * b).sum(1)
        square = self.base_square + 2 * scaling * cross + scaling**2 * own
        return square.clamp_min(0).sqrt()

    def refresh(self) -> None:
        """Forget the held norm, because A or B changed."""
        self._held = None


class DoraVariant(LoraVariant):
    """Plugs DoRA into a peft LoRA layer. `init` is not used: `adapters.attach` builds the magnitudes."""

    @staticmethod
    def _parts(module: LoraLayer, adapter: str) -> tuple[DoraMagnitude, Tensor, Tensor, float]:
        return (
            module.lora_magnitude_vector[adapter],
            module.lora_A[adapter].weight,
            module.lora_B[adapter].weight,
            module.scaling[adapter],
        )

    @staticmethod
    def _factor(module: LoraLayer, adapter: str) -> Tensor:
        """m / ||W + s·B·A||, (out,) in fp32."""
        magnitude, a, b, scaling = DoraVariant._parts(module, adapter)
        return magnitude.weight / magnitude.norm(module.get_base_layer(), a, b, scaling).clamp_min(_SMALLEST_NORM)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """The layer's output (..., out), given its input x (..., in) and the base layer's output."""
        factor = DoraVariant._factor(module, active_adapter)
        bias = module.get_base_layer().bias
        delta = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        directed = (result if bias is None else result - bias) + delta
        # v + (f - 1)·v instead of f·v: f is near 1, and f - 1 keeps its digits when it is rounded to bf16.
        output = torch.addcmul(directed, directed, (factor - 1).to(directed.dtype))
        return output if bias is None else output + bias

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W' (out, in) in the dtype of `orig_weight`, which must be the base weight W."""
        _, a, b, scaling = DoraVariant._parts(module, active_adapter)
        factor = DoraVariant._factor(module, active_adapter).detach()
        module._cache_store(f"{active_adapter}-dora_factor", factor)  # unmerge needs it after W is gone
        merged = factor[:, None] * (orig_weight.float() + scaling * (b.float() @ a.float()))
        return merged.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """As `merge_safe`, in place."""
        orig_weight.data.copy_(DoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W again, from W'."""
        _, a, b, scaling = DoraVariant._parts(module, active_adapter)
        factor = module._cache_pop(f"{active_adapter}-dora_factor")
        weight = orig_weight.float() / factor[:, None] - scaling * (b.float() @ a.float())
        return weight.to(orig_weight.dtype)


def _magnitudes(model: nn.Module) -> Iterator[DoraMagnitude]:
    return (module for module in model.modules() if isinstance(module, DoraMagnitude))


@contextlib.contextmanager
def hold_norms(model: nn.Module) -> Iterator[None]:
    """Compute each DoRA norm once and keep it until `refresh_norms`, for loops that know when A and B change."""
    magnitudes = list(_magnitudes(model))
    for magnitude in magnitudes:
        magnitude.refresh()
        magnitude.holding = True
    try:
        yield
    finally:
        for magnitude in magnitudes:
            magnitude.holding = False
            magnitude.refresh()


def refresh_norms(model: nn.Module) -> None:
    """Forget all held norms; call it after every change of the adapters."""
    for magnitude in _magnitudes(model):
        magnitude.refresh()
