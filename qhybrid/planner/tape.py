"""A tape of tensor operations that keeps account of memory alone: sizes instead of values, without torch.

Tensors live as long as something refers to them, as in torch: Python's reference counts do the bookkeeping. The
operations below allocate, save and free what torch's own do; running a decoder layer through them takes about a
millisecond. Which operation saves what follows torch's tools/autograd/derivatives.yaml, and when gradients are
added in place torch/csrc/autograd/input_buffer.cpp. simulation/ checks the result against torch itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

FP32, BF16, BOOL = 4, 2, 1  # bytes of one value


class Ledger:
    """What is alive, and the most that ever was, in bytes."""

    __slots__ = ("_count", "alive", "peak", "peak_weights", "rounding", "weights")

    def __init__(self, rounding: int = 512) -> None:
        self.alive = 0
        self.peak = 0
        self.weights = 0  # of which dequantised weights
        self.peak_weights = 0  # at the peak
        self.rounding = rounding
        self._count = 0

    def round(self, num_bytes: float) -> int:
        """As the allocator rounds a request."""
        return -(-int(num_bytes) // self.rounding) * self.rounding

    def scratch(self, num_bytes: float, *, weights: float = 0) -> None:
        """Memory that an operation allocates inside and frees again; how much of it are dequantised weights."""
        self.note(self.alive + self.round(num_bytes), self.weights + int(weights))

    def note(self, alive: int, weights: int) -> None:
        """So much is alive for a moment."""
        if alive > self.peak:
            self.peak, self.peak_weights = alive, weights

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_weights = self.alive, self.weights

    def next_number(self) -> int:
        self._count += 1
        return self._count


class Storage:
    """One block of memory; it ends with the last reference to it."""

    __slots__ = ("is_weight", "ledger", "num_bytes")

    def __init__(self, ledger: Ledger, num_bytes: float, *, is_weight: bool = False) -> None:
        self.ledger = ledger
        self.num_bytes = ledger.round(num_bytes)
        self.is_weight = is_weight
        ledger.alive += self.num_bytes
        if is_weight:
            ledger.weights += self.num_bytes
        if ledger.alive > ledger.peak:
            ledger.peak, ledger.peak_weights = ledger.alive, ledger.weights

    def __del__(self) -> None:
        self.ledger.alive -= self.num_bytes
        if self.is_weight:
            self.ledger.weights -= self.num_bytes


Backward = Callable[["Tensor"], "Sequence[Tensor | None]"]


class Node:
    """One step of the backward pass: from the gradient of an output to those of the inputs."""

    __slots__ = ("backward", "inputs", "number", "waiting")

    def __init__(self, number: int, inputs: Sequence[Tensor], backward: Backward) -> None:
        self.number = number
        self.inputs = [tensor.node if tensor.requires_grad else None for tensor in inputs]
        self.backward: Backward | None = backward
        self.waiting = 0


class Tensor:
    """A size in place of values. `size` counts values, `width` is the bytes of one."""

    __slots__ = ("is_view", "ledger", "node", "requires_grad", "size", "storage", "width")

    def __init__(
        self,
        ledger: Ledger,
        size: int,
        width: int,
        *,
        requires_grad: bool = False,
        storage: Storage | None = None,
        is_view: bool = False,
    ) -> None:
        self.ledger = ledger
        self.size = size
        self.width = width
        self.storage = storage or Storage(ledger, size * width)
        self.requires_grad = requires_grad
        self.node: Node | None = None
        self.is_view = is_view

    def like(self, *, size: int | None = None, width: int | None = None) -> Tensor:
        """A new tensor of this one's size and width, unless others are given."""
        return Tensor(self.ledger, self.size if size is None else size, width or self.width)

    def alias(self, size: int | None = None) -> Tensor:
        """Another tensor on the same memory."""
        return Tensor(
            self.ledger, self.size if size is None else size, self.width, storage=self.storage, is_view=True
        )


def record(output: Tensor, inputs: Sequence[Tensor], backward: Backward) -> Tensor:
    """Put an operation on the tape if any of its inputs needs a gradient. Returns `output`."""
    if any(tensor.requires_grad for tensor in inputs):
        output.requires_grad = True
        output.node = Node(output.ledger.next_number(), inputs, backward)
    return output


def leaf(ledger: Ledger, size: int, width: int) -> Tensor:
    """A tensor from outside whose gradient is wanted; its memory is counted here."""
    tensor = Tensor(ledger, size, width, requires_grad=True)
    tensor.node = Node(ledger.next_number(), (), lambda gradient: ())
    return tensor


def run_backward(output: Tensor, gradient: Tensor) -> dict[int, Tensor]:
    """Run the tape from `output`; returns the gradients of the leaves by their node's number.

    Nodes run in the reverse of the order in which they were made, as in torch's engine. A node's gradient is let
    go of when it has run, then what it saved, then its results are added to what waits for other nodes.
    """
    root = output.node
    assert root is not None
    waiting: dict[int, tuple[Node, Tensor]] = {root.number: (root, gradient)}
    queue = [-root.number]
    leaves: dict[int, Tensor] = {}
    del gradient, output
    while queue:
        node, incoming = waiting.pop(-heapq.heappop(queue))
        if not node.inputs:
            leaves[node.number] = incoming
            continue
        assert node.backward is not None
        results = list(node.backward(incoming))
        del incoming
        node.backward = None  # with what it saved
        for index, target in enumerate(node.inputs):
            result = results[index]
            results[index] = None
            if target is None or result is None:
                continue
            known = waiting.get(target.number)
            if known is None:
                waiting[target.number] = (target, result)
                heapq.heappush(queue, -target.number)
            else:
                waiting[target.number] = (target, _accumulate(known[1], result))
                del known
            del result
    return leaves


def _accumulate(old: Tensor, new: Tensor) -> Tensor:
    """In place, unless the memory of `old` is shared: views keep the tensor that they look at."""
    if old.is_view:
        return old.like()
    return old


# ---- operations: each returns its output; `x` may be freed by the caller as soon as it is not needed ----


def cast(x: Tensor, width: int) -> Tensor:
    """x.to(dtype): x itself if nothing changes."""
    if x.width == width:
        return x
    original = x.width
    return record(x.like(width=width), (x,), lambda g: (g.like(width=original),))


def clone(x: Tensor) -> Tensor:
    """A copy; the gradient passes as it is."""
    return record(x.like(), (x,), lambda g: (g,))


def contiguous(x: Tensor) -> Tensor:
    """A copy in another order; the gradient is a view of the incoming one."""
    return record(x.like(), (x,), lambda g: (g.alias(),))


def unary(x: Tensor) -> Tensor:
    """neg, or times a number: nothing is saved."""
    return record(x.like(), (x,), lambda g: (g.like(),))


def activation(x: Tensor) -> Tensor:
    """SiLU or GELU: the input is saved."""

    def backward(g: Tensor, x: Tensor | None = x if x.requires_grad else None):
        return (g.like(),)

    return record(x.like(), (x,), backward)


def result_activation(x: Tensor) -> Tensor:
    """tanh or rsqrt: the result is saved."""
    out = x.like()
    kept = Tensor(x.ledger, out.size, out.width, storage=out.storage)
    return record(out, (x,), lambda g, kept=kept: (g.like(),))


def square(x: Tensor) -> Tensor:
    """x², whose gradient takes x¹, 2·x and their product with the gradient."""

    def backward(g: Tensor, x: Tensor = x):
        power = x.like()
        doubled = power.like()
        result = doubled.like()
        del doubled, power
        return (result,)

    return record(x.like(), (x,), backward)


def reduce(x: Tensor, size: int) -> Tensor:
    """A mean over the last dimension: `size` values are left. The gradient is spread and divided."""
    full = x.size
    return record(x.like(size=size), (x,), lambda g: (g.like(size=full),))


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b: both get the same gradient."""
    return record(a.like(width=max(a.width, b.width)), (a, b), lambda g: (g, g))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a · b. The smaller one is spread over the larger one."""
    size, width = max(a.size, b.size), max(a.width, b.width)
    saved_b = b if a.requires_grad else None
    saved_a = a if b.requires_grad else None
    sizes = a.size, b.size

    def backward(g: Tensor, saved_a: Tensor | None = saved_a, saved_b: Tensor | None = saved_b):
        of_b = g.like() if saved_a is not None else None
        of_a = g.like() if saved_b is not None else None
        if of_b is not None and sizes[1] < size:
            of_b = of_b.like(size=sizes[1])
        if of_a is not None and sizes[0] < size:
            of_a = of_a.like(size=sizes[0])
        return of_a, of_b

    return record(a.like(size=size, width=width), (a, b), backward)


def view(x: Tensor) -> Tensor:
    """Another shape of the same memory."""
    return record(x.alias(), (x,), lambda g: (g.alias(),))


def part(x: Tensor, fraction: float) -> Tensor:
    """A slice. Its gradient is a full-size tensor of zeros with the slice filled in."""
    full = x.size
    return record(x.alias(int(full * fraction)), (x,), lambda g: (g.like(size=full),))


def concatenate(*parts: Tensor) -> Tensor:
    """torch.cat; the gradients are views of the incoming one."""
    sizes = [tensor.size for tensor in parts]
    out = parts[0].like(size=sum(sizes))
    return record(out, parts, lambda g: tuple(g.alias(size) for size in sizes))


def matmul(
    x: Tensor,
    in_features: int,
    out_features: int,
    *,
    trained: bool = True,
    bias: bool = False,
    rounded_weight: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ with a 16- or 32-bit W that is counted elsewhere; W's gradient is counted with the gradients.

    Args:
        trained: W is trained, so x is saved.
        bias: W has a frozen bias. Without one a batched x is folded into two dimensions: its gradient is a view.
        rounded_weight: the copy of W that autocast made, which is saved for the gradient of x.
    """

    def backward(g: Tensor, x: Tensor | None = x if trained else None, weight: Tensor | None = rounded_weight):
        result = g.like(size=g.size // out_features * in_features)
        return (result if bias else result.alias(),)

    out = x.like(size=x.size // in_features * out_features)
    if x.requires_grad or trained:
        out.requires_grad = True
        out.node = Node(x.ledger.next_number(), (x,), backward)
    return out


def nf4_matmul(x: Tensor, in_features: int, out_features: int, *, nested: bool) -> Tensor:
    """bitsandbytes' matmul_4bit: W is dequantised in the forward and again in the backward pass."""
    num_weights = in_features * out_features
    scales = num_weights // 64 * FP32
    out = x.like(size=x.size // in_features * out_features)
    inside = num_weights * x.width + (2 * scales if nested else 0)
    x.ledger.scratch(inside, weights=inside)

    def backward(g: Tensor):
        absmax = Storage(g.ledger, scales, is_weight=True) if nested else None
        weight = Storage(g.ledger, num_weights * g.width, is_weight=True)
        del absmax
        result = g.like(size=g.size // out_features * in_features)
        del weight
        return (result.alias(),)

    return record(out, (x,), backward)
