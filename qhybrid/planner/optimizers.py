"""What each optimizer keeps for a trained parameter, and what its step needs for a moment."""

from __future__ import annotations

from dataclasses import dataclass

from qhybrid.planner.tape import FP32

# bitsandbytes keeps fp32 states for smaller tensors (optim/optimizer.py, min_8bit_size), one scale for each block
# of 256 states, and puts states of larger tensors into unified memory when it pages (get_state_buffer).
_MIN_8BIT_SIZE, _BLOCK, _MIN_PAGED_SIZE = 4096, 256, 100_000


@dataclass(frozen=True)
class Rule:
    """States of one optimizer: how many for a parameter, and the bytes of each value.

    `width` 0 means the parameter's own dtype, 1 blockwise 8-bit, 0.5 blockwise 4-bit.
    """

    num_states: int
    width: float = 0
    paged: bool = False
    factored: bool = False  # rows and columns in place of a matrix
    counts_steps: bool = False  # a tensor on the device for each parameter
    copies_in_step: int = 0  # of a state in the parameter's dtype, for all parameters at once
    known: bool = True


_TORCH_ADAMW = Rule(2, counts_steps=True)
_RULES = {
    "adamw_torch_fused": _TORCH_ADAMW,
    "adamw_torch": Rule(2, copies_in_step=1),
    "adamw_anyprecision": Rule(2, 2),
    "adamw_torch_4bit": Rule(2, 0.5),
    "adamw_torch_8bit": Rule(2, 1),
    "adafactor": Rule(1, FP32, factored=True),
    "sgd": Rule(0),
    "adagrad": Rule(1),
    "rmsprop": Rule(1),
    "ademamix": Rule(3, FP32),
    "ademamix_8bit": Rule(3, 1),
    "adamw_bnb_8bit": Rule(2, 1),
    "adamw_8bit": Rule(2, 1),
    "lion_8bit": Rule(1, 1),
    "lion_32bit": Rule(1, FP32),
    "paged_adamw_32bit": Rule(2, FP32, paged=True),
    "paged_adamw_8bit": Rule(2, 1, paged=True),
    "paged_ademamix_32bit": Rule(3, FP32, paged=True),
    "paged_ademamix_8bit": Rule(3, 1, paged=True),
    "paged_lion_32bit": Rule(1, FP32, paged=True),
    "paged_lion_8bit": Rule(1, 1, paged=True),
    "rmsprop_bnb": Rule(1, FP32),
    "rmsprop_bnb_8bit": Rule(1, 1),
    "rmsprop_bnb_32bit": Rule(1, FP32),
    "schedule_free_adamw": Rule(2, copies_in_step=1),
    "schedule_free_radam": Rule(2, copies_in_step=1),
    "schedule_free_sgd": Rule(1, copies_in_step=1),
}
_ASSUMED = Rule(2, FP32, known=False)

# Of these every state has the parameter's shape and begins at zero, so a rank more is a row of zeros more. Paged
# states, blocks of 8 or 4 bits, factored moments and the averaged weights of schedule-free optimizers are not so.
GROWING = ("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop", "lion_32bit", "rmsprop_bnb_32bit")


def rule_of(optim: str) -> Rule:
    """The rule of transformers' optimizer `optim`; two fp32 states are assumed of those that are not known."""
    return _RULES.get(optim, _ASSUMED)


def state_bytes(rule: Rule, size: int, width: int, rounding: int, *, on_cuda: bool) -> tuple[int, int]:
    """Bytes of one parameter's states: (on the device, in unified memory).

    Args:
        size: values of the parameter. width: bytes of one.
    """

    def rounded(num_bytes: float) -> int:
        return -(-int(num_bytes) // rounding) * rounding

    if rule.factored:
        return rounded((size // 4 + 2) * FP32), 0  # rows and columns of an r x n matrix, for ranks from 4 on
    small = rule.width in (1, 0.5) and size < _MIN_8BIT_SIZE
    one = FP32 if small else (rule.width or width)
    scales = rounded(-(-size // _BLOCK) * FP32) if rule.width in (1, 0.5) and not small else 0
    values = rounded(size * one) * rule.num_states
    if rule.paged and on_cuda and size >= _MIN_PAGED_SIZE:
        return scales * rule.num_states, values
    steps = rounded(FP32) if rule.counts_steps else 0
    return values + scales * rule.num_states + steps, 0
