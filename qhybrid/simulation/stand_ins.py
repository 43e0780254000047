"""What a device's kernels do to memory, for operations that meta tensors take another way.

On the meta device torch picks other kernels than on the device that is simulated (attention, the fused
optimizers), knows no autocast, and sees nothing of what an operation allocates inside. Each stand-in below says
which behaviour of the real device it stands for. They hold for torch 2.11 to 2.13, bitsandbytes 0.50, trl 1.16
and transformers 5.23; tests/integration/test_simulation.py holds the CPU ones against measured memory.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
import trl.kernels.chunked_logprob as chunked_logprob
import trl.trainer.utils as trl_utils
from torch import Tensor

from qhybrid.base.nf4 import BLOCK_SIZE
from qhybrid.simulation.tracker import Answers, Scratch, StorageTracker, aten

Device = Literal["cuda", "cpu"]

_FLASH_ROWS = 128  # flash attention's backward rounds the sequence up to whole blocks of rows
_FLASH_COLUMNS = 32  # and the head up to a multiple of this many values
_EFFICIENT_ALIGNMENT = 16  # values: memory-efficient attention pads the mask's rows to it


def scratch_of(device: Device) -> Scratch:
    """What operations allocate and free inside, by operation."""
    scratch: Scratch = {
        torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_scratch,
    }
    if device == "cuda":
        scratch[aten._scaled_dot_product_flash_attention_backward.default] = _flash_backward_scratch
    return scratch


def _gemm_4bit_scratch(
    a: Tensor, b: Tensor, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, *nested, **named
) -> int:
    """The weight dequantised, and its block scales in fp32: one copy, and one more while the offset is added."""
    num_weights = math.prod(shape)
    scales = 8 * (num_weights // BLOCK_SIZE) if absmax_8bit is not None else 0
    return num_weights * a.element_size() + scales


def _flash_backward_scratch(grad_out: Tensor, query: Tensor, key: Tensor, *others, **named) -> int:
    """fp32 sums of dQ and the row statistics; with grouped queries also dK and dV of every query head."""
    batch, heads, length, head_dim = query.shape
    rows = math.ceil(length / _FLASH_ROWS) * _FLASH_ROWS
    columns = math.ceil(head_dim / _FLASH_COLUMNS) * _FLASH_COLUMNS
    sums = 4 * batch * heads * rows * (columns + 1)
    grouped = key.shape[1] != heads
    return sums + (2 * batch * heads * key.shape[2] * head_dim * query.element_size() if grouped else 0)


def answers_of(*, padded: bool) -> Answers:
    """Results that depend on values: a batch has padding or not, every position is labelled, all is finite."""

    def scalar(tensor: Tensor) -> Any:
        if not tensor.is_meta:
            return NotImplemented
        # The one bool that decides about memory is the mask code's "no padding at all?".
        return (not padded) if tensor.dtype == torch.bool else 1

    def index(tensor: Tensor, indices: list[Tensor | None]) -> Any:
        first = indices[0] if indices else None
        if not tensor.is_meta or first is None or first.dtype != torch.bool:
            return NotImplemented
        return tensor.new_empty((first.numel(), *tensor.shape[first.dim() :]))

    def index_put(
        tensor: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False, *_
    ) -> Any:
        first = indices[0] if indices else None
        if not tensor.is_meta or first is None or first.dtype != torch.bool:
            return NotImplemented
        return tensor

    def masked_select(tensor: Tensor, mask: Tensor) -> Any:
        return tensor.new_empty(mask.numel()) if tensor.is_meta else NotImplemented

    return {
        aten._local_scalar_dense.default: scalar,
        aten.index.Tensor: index,
        aten._index_put_impl_.default: index_put,
        aten.index_put_.default: index_put,
        aten.masked_select.default: masked_select,
        aten.equal.default: lambda a, b: True if a.is_meta or b.is_meta else NotImplemented,
    }


class Functions:
    """torch.nn.functional as the device would run it: attention, dropout and autocast."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._casts: dict[Tensor, Tensor] | None = None
        self._linear, self._attention, self._dropout = F.linear, F.scaled_dot_product_attention, F.dropout

    def linear(self, *args, **kwargs) -> Tensor:
        if args[0].is_meta and torch.is_autocast_enabled("cpu"):
            args = tuple(self._autocast(value) for value in args)
            kwargs = {name: self._autocast(value) for name, value in kwargs.items()}
        return self._linear(*args, **kwargs)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """On CUDA a fused kernel with a mask of bytes; on a CPU torch's own path, which meta takes too."""
        if self._device == "cuda" and input.is_meta and training and p > 0:
            return torch.native_dropout(input, p, True)[0]
        return self._dropout(input, p, training, inplace)

    def _autocast(self, value: Any) -> Any:
        """fp32 to the autocast dtype."""
        wanted = torch.get_autocast_dtype("cpu")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(wanted)
        if value not in self._casts:
            self._casts[value] = value.to(wanted)
        return self._casts[value]

    @contextlib.contextmanager
    def autocast_cache(self) -> Iterator[None]:
        """Inside the block trained weights are cast once, as in one autocast region: a forward pass."""
        self._casts = {}
        try:
            yield
        finally:
            self._casts = None

    def scaled_dot_product_attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        """The kernel that torch's own choice falls on: flash without a mask, memory-efficient with one."""
        if not query.is_meta:
            return self._attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = attn_mask
            attn_mask = torch.zeros_like(allowed, dtype=query.dtype)
            attn_mask.masked_fill_(allowed.logical_not(), float("-inf"))
        if self._device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
                0
            ]
        columns = attn_mask.shape[-1]
        if columns % _EFFICIENT_ALIGNMENT:
            attn_mask = F.pad(attn_mask, (0, -columns % _EFFICIENT_ALIGNMENT))[..., :columns]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]


@contextlib.contextmanager
def device_behaviour(device: Device, tracker: StorageTracker) -> Iterator[Functions]:
    """Inside the block, libraries that ask about the device of meta tensors are told that it is `device`."""
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def is_autocast_enabled(device_type: str | None = None) -> bool:
        if device_type in ("meta", "cpu"):
            return enabled("cpu")
        return enabled("cpu") if device == "cuda" else enabled()  # no argument asks about CUDA

    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return dtype("cpu" if device_type == "meta" else device_type)

    with contextlib.ExitStack() as stack:

        def replace(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        replace(torch, "is_autocast_enabled", is_autocast_enabled)
        replace(torch, "get_autocast_dtype", get_autocast_dtype)
        if device == "cuda":
            _cuda_loss(replace)
        _optimizers(replace, tracker, device)
        functions = Functions(device)
        replace(F, "linear", functions.linear)
        replace(F, "dropout", functions.dropout)
        replace(F, "scaled_dot_product_attention", functions.scaled_dot_product_attention)
        yield functions


def _cuda_loss(replace: Callable[[Any, str, Any], None]) -> None:
    """trl's loss with Triton: tiles are folded in place, and their products summed into fp32 without a copy."""

    class NoKernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    class NoTriton:
        cdiv = staticmethod(lambda a, b: -(-a // b))

    replace(chunked_logprob, "_use_triton", lambda device: True)
    replace(trl_utils, "_use_triton", lambda device: True)
    replace(chunked_logprob, "_forward_kernel", NoKernel())
    replace(chunked_logprob, "_backward_kernel", NoKernel())
    replace(chunked_logprob, "_addmm_fp32", lambda acc, a, b: None)
    if not hasattr(chunked_logprob, "triton"):
        chunked_logprob.triton = NoTriton  # the module lacks the name where Triton is not installed


def _optimizers(replace: Callable[[Any, str, Any], None], tracker: StorageTracker, device: Device) -> None:
    """Fused AdamW takes meta tensors; paged states lie in unified memory, beside the allocator."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim hides this module's name
    supported = optimizers._get_fused_kernels_supported_devices
    replace(optimizers, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        with tracker.not_counting() if on_cuda else contextlib.nullcontext():
            return torch.zeros(*shape, dtype=dtype, device="meta")

    on_cuda = device == "cuda"  # on a CPU bitsandbytes does not page
    replace(bnb.functional, "get_paged", get_paged)
    replace(bnb.functional, "fill", lambda tensor, value, **_: None)
