"""Liger's layer kernels on meta tensors: what they allocate, keep and return, and nothing computed.

Triton kernels do not run on meta. The stand-ins follow liger-kernel 0.8 (ops/rms_norm.py, swiglu.py, geglu.py and
rope.py), and which modules of a model are replaced follows transformers/monkey_patch.py there. trl leaves Liger's
losses out, so they are not here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_HEAD_NORMS = {"qwen3": ("q_norm", "k_norm")}  # the queries' and keys' norms of other families stay as they are
# Where a norm follows a block, the residual stream still needs the gradient that would be overwritten.
_NEW_GRADIENT = {"gemma2": (*_LAYER_NORMS, "norm"), "olmo2": _LAYER_NORMS}


@contextlib.contextmanager
def liger_layers(
    model: PreTrainedModel, *, wanted: bool, options: dict[str, bool] | None = None
) -> Iterator[None]:
    """Inside the block `model` runs as with Liger's kernels for norms, gated MLPs and rotary embeddings.

    Args:
        wanted: False leaves the model as it is.
        options: training.liger_kernel_config, which may switch kernels off.
    """
    if not wanted:
        yield
        return

    def applies(*names: str) -> bool:
        return all((options or {}).get(name, True) for name in names)

    decoder = model.get_decoder()
    if applies("rms_norm"):
        _replace_norms(decoder, model.config.model_type)
    if applies("swiglu", "geglu"):
        for layer in decoder.layers:
            layer.mlp.forward = MethodType(_mlp, layer.mlp)
    modeling = sys.modules[type(model).__module__]
    rotate = _rotate if applies("rope") else modeling.apply_rotary_pos_emb
    with mock.patch.object(modeling, "apply_rotary_pos_emb", rotate):
        yield


def _replace_norms(decoder: nn.Module, model_type: str) -> None:
    norms = [("norm", decoder.norm)]
    for layer in decoder.layers:
        norms += [(name, getattr(layer, name, None)) for name in _LAYER_NORMS]
        norms += [(name, getattr(layer.self_attn, name)) for name in _HEAD_NORMS.get(model_type, ())]
    for name, norm in norms:
        if norm is not None:
            norm.liger_in_place = name not in _NEW_GRADIENT.get(model_type, ())
            norm.forward = MethodType(_norm, norm)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return RMSNorm.apply(hidden_states, self.weight, self.liger_in_place)


def _mlp(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "gate_up_proj"):
        return self.down_proj(GatedUnit.apply(self.gate_proj(x), self.up_proj(x)))
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # alive until the end
    return self.down_proj(GatedUnit.apply(gate, up))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *unused: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return Rotation.apply(q, k, cos, sin)


class RMSNorm(torch.autograd.Function):
    """Keeps the input and one fp32 value for each row; the gradient takes the place of the incoming one."""

    @staticmethod
    def forward(ctx, x, weight, in_place):
        rows = x.contiguous().view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        ctx.save_for_backward(rows, weight, scale)
        ctx.in_place = in_place
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        _ = ctx.saved_tensors  # a checkpointed layer is computed again when one is asked for
        rows = gradient.view(-1, gradient.shape[-1])
        return (rows if ctx.in_place else torch.zeros_like(rows)).view(gradient.shape), None, None


class GatedUnit(torch.autograd.Function):
    """Keeps both inputs, and overwrites them with their gradients."""

    @staticmethod
    def forward(ctx, gate, up):
        shape = gate.shape
        gate, up = (x.contiguous().view(-1, shape[-1]) for x in (gate, up))
        out = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        return out.view(shape)

    @staticmethod
    def backward(ctx, gradient):
        shape = gradient.contiguous().shape
        gate, up = ctx.saved_tensors
        return gate.view(shape), up.view(shape)


class Rotation(torch.autograd.Function):
    """Rotates (batch, heads, length, dim) in place if it lies in memory as (batch, length, heads, dim)."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _in_token_order(q), _in_token_order(k)

    @staticmethod
    def backward(ctx, of_q, of_k):
        _ = ctx.saved_tensors
        return _in_token_order(of_q), _in_token_order(of_k), None, None


def _in_token_order(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
