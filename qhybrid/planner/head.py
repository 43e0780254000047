"""The end of the model on the tape: the last norm, lm_head and the loss, forward and backward.

trl 1.16's loss (trl/kernels/chunked_logprob.py) never builds the logits: it works through tiles of 4,096 positions
by 32,768 tokens of the vocabulary. Label smoothing needs the full logits, and takes a second forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner.layer_ops import rms_norm
from qhybrid.planner.tape import (
    BOOL,
    FP32,
    Ledger,
    Tensor,
    cast,
    clone,
    leaf,
    record,
    result_activation,
    run_backward,
    unary,
)
from qhybrid.planner.workload import Loss, Pass

_TILE_POSITIONS, _TILE_VOCABULARY = 4096, 32768
_STATISTICS = 7  # fp32 values kept for each position while the tiles are folded
_LABEL = 8  # bytes of a token's number
# Without Triton a tile is folded by torch's own operations, on fp32 copies of it.
_FORWARD_COPIES, _BACKWARD_COPIES = 3, 7


@dataclass(frozen=True)
class HeadCost:
    """Bytes of the model's end; the peaks include its input and what it keeps, but nothing of the layers."""

    kept: int
    forward_peak: int
    backward_peak: int


def head_cost(spec: ModelSpec, how: Pass, loss: Loss) -> HeadCost:
    """The cost of the last norm and the loss, when every position is labelled."""
    ledger = Ledger(rounding=512 if how.device == "cuda" else 1)
    x = leaf(ledger, how.tokens * spec.hidden_size, how.width)
    family = spec.family
    in_place = not (family.pre_norm and family.post_norm)  # Liger's norm; Gemma 2's makes a new gradient
    hidden = rms_norm(x, spec.hidden_size, family.norm, fused=how.fused_layers, in_place=in_place)
    del x
    scored = how.batch * (how.length - 1)
    result = _chunked(hidden, spec, how, scored) if loss == "chunked" else _full(hidden, spec, how)
    del hidden
    kept, forward_peak = ledger.alive, ledger.peak
    gradient = result.like()
    ledger.restart()
    handle = Tensor(ledger, 0, 1, requires_grad=True)
    handle.node = result.node
    del result
    run_backward(handle, gradient)
    return HeadCost(kept, forward_peak, ledger.peak)


def _tile_bytes(spec: ModelSpec, how: Pass, copies: int) -> int:
    """One tile of logits, and what folds it."""
    positions = min(how.batch * (how.length - 1), _TILE_POSITIONS)
    columns = min(spec.vocab_size, _TILE_VOCABULARY)
    folding = 0 if how.device == "cuda" else positions * columns * (copies * FP32 + BOOL)
    return positions * _TILE_VOCABULARY * how.width + folding


def _chunked(hidden: Tensor, spec: ModelSpec, how: Pass, scored: int) -> Tensor:
    ledger, h = hidden.ledger, spec.hidden_size
    on_cuda = how.device == "cuda"
    whole = hidden.size
    # On CUDA the labelled positions are copied out of the rest; elsewhere the last position is cut off.
    kept_hidden = hidden.like(size=scored * h) if on_cuda or how.batch > 1 else hidden.alias(scored * h)
    targets = Tensor(ledger, scored, _LABEL)
    positions = min(scored, _TILE_POSITIONS)
    statistics = Tensor(ledger, _STATISTICS * scored, FP32)
    ledger.scratch(_tile_bytes(spec, how, _FORWARD_COPIES))
    del statistics
    normaliser = Tensor(ledger, scored, FP32)
    out = Tensor(ledger, scored, FP32)

    def backward(g: Tensor, saved=(kept_hidden, targets, normaliser)):
        wide = Tensor(ledger, scored * h, FP32)
        ledger.scratch(_tile_bytes(spec, how, _BACKWARD_COPIES))
        buffer = Tensor(ledger, positions * _TILE_VOCABULARY, how.width)
        narrow = wide.like(width=how.width) if how.width < FP32 else wide
        del buffer, wide
        if not on_cuda and how.batch == 1:
            return (narrow.like(size=whole),)
        spread = narrow.like(size=scored * h) if on_cuda else narrow
        del narrow
        return (spread.like(size=whole),)

    return record(out, (hidden,), backward)


def _full(hidden: Tensor, spec: ModelSpec, how: Pass) -> Tensor:
    """transformers' label smoother on the whole logits, which accelerate widens to fp32.

    Its log-probabilities are kept twice: as the result of log_softmax, and negated. trl then scores the batch once
    more, in tiles, for its metrics.
    """
    ledger = hidden.ledger
    size = how.tokens * spec.vocab_size
    projected = how.tokens * spec.hidden_size
    logits = record(Tensor(ledger, size, how.width), (hidden,), lambda g: (g.like(size=projected),))
    wide = cast(logits, FP32)
    del logits
    shifted = clone(wide) if how.batch > 1 else wide  # without the last position; one row needs no copy for that
    scores = result_activation(shifted)
    negative = unary(scores)
    del wide, shifted, scores
    out = Tensor(ledger, how.tokens, FP32)
    ledger.scratch(_tile_bytes(spec, how, _FORWARD_COPIES) + 2 * hidden.storage.num_bytes)
    return record(out, (negative,), lambda g, kept=negative: (kept.like(),))
