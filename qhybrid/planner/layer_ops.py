"""Operations of a decoder layer on the tape that are made of several, or that differ by device and kernel."""

from __future__ import annotations

from qhybrid.planner.tape import (
    BOOL,
    FP32,
    Tensor,
    cast,
    multiply,
    record,
    reduce,
    result_activation,
    square,
    unary,
)


def turned(x: Tensor) -> Tensor:
    """(batch, length, heads, dim) as (batch, heads, length, dim): the gradient is copied back into order."""
    return record(x.alias(), (x,), lambda g: (g.like(),))


def repeated(x: Tensor, groups: int) -> Tensor:
    """Key or value heads copied for each query head; their gradients are summed."""
    if groups == 1:
        return x
    size = x.size
    return record(x.like(size=size * groups), (x,), lambda g: (g.like(size=size),))


def product(a: Tensor, b: Tensor, size: int) -> Tensor:
    """A batched product of two activations: both are saved."""

    def backward(g: Tensor, a: Tensor = a, b: Tensor = b):
        return a.like(), b.like()

    return record(a.like(size=size), (a, b), backward)


def softmax(x: Tensor) -> Tensor:
    """softmax in fp32."""
    wide = cast(x, FP32)
    del x
    return result_activation(wide)


def dropout(x: Tensor, device: str) -> Tensor:
    """On CUDA a mask of bytes is saved, on a CPU the noise in x's own type."""
    mask = Tensor(x.ledger, x.size, BOOL if device == "cuda" else x.width)
    return record(x.like(), (x,), lambda g, mask=mask: (g.like(),))


def gated_unit(*inputs: Tensor, size: int | None = None) -> Tensor:
    """Liger's SwiGLU or GEGLU, of `size` values: it saves its inputs, and overwrites them with their gradients."""

    def backward(g: Tensor, saved: tuple[Tensor, ...] = inputs):
        return tuple(tensor.alias() for tensor in saved)

    return record(inputs[0].like(size=size), inputs, backward)


def rms_norm(x: Tensor, size: int, kind: str, *, fused: bool = False, in_place: bool = True) -> Tensor:
    """RMSNorm as transformers writes it out, in fp32; or Liger's, which saves x and one value for each token.

    Args:
        in_place: whether Liger puts the gradient in the place of the incoming one.
    """
    groups = x.size // size
    if fused:
        out = x.like()
        scale = Tensor(x.ledger, groups, FP32)
        return record(out, (x,), lambda g, saved=(x, scale): (g.alias() if in_place else g.like(),))
    width = x.width
    wide = cast(x, FP32)
    del x
    squares = square(wide)
    means = reduce(squares, groups)
    del squares
    scale = result_activation(unary(means))
    del means
    normal = multiply(wide, scale)
    del wide, scale
    if kind == "llama":  # the weight is applied after the cast
        narrow = cast(normal, width)
        return unary(narrow)
    weighted = unary(normal)
    return cast(weighted, width)
