"""One decoder layer on the tape: what its forward pass keeps, and what its forward and backward passes need.

The order of the operations is that of transformers 5.23 (models/llama and its relatives), of peft 0.21's LoRA
layers and of qhybrid's own DoRA and AdaLoRA variants. Where a family differs, `architecture.spec.Family` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qhybrid.architecture.spec import Linear, ModelSpec
from qhybrid.planner.layer_ops import dropout, gated_unit, product, repeated, rms_norm, softmax, turned
from qhybrid.planner.tape import (
    FP32,
    Ledger,
    Tensor,
    activation,
    add,
    cast,
    clone,
    concatenate,
    contiguous,
    leaf,
    matmul,
    multiply,
    nf4_matmul,
    part,
    record,
    result_activation,
    run_backward,
    unary,
    view,
)
from qhybrid.planner.workload import Pass

_ALIGNMENT = 16  # values: memory-efficient attention pads the rows of its mask
_DORA_ROWS = 1024  # rows of W that adapters/dora.py widens to fp32 at a time


@dataclass(frozen=True)
class Adapter:
    """What decides about the memory of one linear's adapter."""

    kind: str
    rank: int
    dropout: bool


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer; the peaks include its input and what it keeps, but nothing of other layers."""

    kept: int  # from the forward to the backward pass
    forward_peak: int
    forward_weights: int  # of which weights that were dequantised for a moment
    backward_peak: int  # with the recomputation, if it is checkpointed
    backward_weights: int


@lru_cache(maxsize=4096)
def layer_cost(
    spec: ModelSpec,
    adapters: tuple[tuple[str, Adapter], ...],
    how: Pass,
    *,
    checkpointed: bool,
    input_needs_grad: bool,
) -> LayerCost:
    """The cost of one layer whose linears have these adapters, by the linear's name.

    Args:
        input_needs_grad: whether anything below the layer is trained, or the inputs are made to need gradients.
    """
    trains = bool(adapters) or input_needs_grad
    ledger = Ledger(rounding=512 if how.device == "cuda" else 1)
    layer = _Layer(spec, dict(adapters), how)
    x = leaf(ledger, how.tokens * spec.hidden_size, how.width)
    x.requires_grad = input_needs_grad
    size = x.storage.num_bytes
    if checkpointed or not trains:
        x.requires_grad = False
        out = layer.forward(x, trained=False)
        forward = ledger.peak, ledger.peak_weights
        if not trains:
            return LayerCost(0, *forward, 0, 0)
        gradient = out.like()
        waiting = layer.before_recomputation(out)
        del out
        ledger.restart()
        x.requires_grad = input_needs_grad
        out = layer.forward(x)
        del waiting
        kept = size
    else:
        out = layer.forward(x)
        forward = ledger.peak, ledger.peak_weights
        del x
        kept = ledger.alive - out.storage.num_bytes
        gradient = out.like()
        ledger.restart()
    node = out.node
    del out
    handle = Tensor(ledger, 0, 1, requires_grad=True)
    handle.node = node
    del node
    if not checkpointed:
        ledger.restart()
    run_backward(handle, gradient)
    return LayerCost(kept, *forward, ledger.peak, ledger.peak_weights)


class _Layer:
    def __init__(self, spec: ModelSpec, adapters: dict[str, Adapter], how: Pass) -> None:
        self.spec = spec
        self.adapters = adapters
        self.how = how
        self.linears = {linear.target: linear for linear in spec.linears}
        self.trained = True

    def forward(self, x: Tensor, *, trained: bool = True) -> Tensor:
        self.trained = trained
        family = self.spec.family
        residual = x
        if family.pre_norm:
            x = self.norm(x)
        x = self.attention(x)
        if family.post_norm:
            x = self.norm(x)
        if family.residual_scale:
            x = unary(x)
        x = add(residual, x)
        residual = x
        if family.pre_norm:
            x = self.norm(x)
        x = self.mlp(x)
        if family.post_norm:
            x = self.norm(x)
        if family.residual_scale:
            x = unary(x)
        return add(residual, x)

    def before_recomputation(self, out: Tensor) -> list[Tensor]:
        """Gradients that exist when the first tensor is asked for that a checkpoint must compute again.

        The residual's and LoRA's scalings, and casts, need nothing that was saved: they are behind it then.
        """
        if self.spec.family.post_norm:
            return [] if self.how.fused_layers else [out.like(width=FP32)]
        adapter = self.adapters.get(self.linears["down_proj"].name)
        scaled = adapter is not None and adapter.kind not in ("adalora", "dora")
        return [out.like() for _ in range(self.spec.family.residual_scale + scaled)]

    # ---- norms ----

    def norm(self, x: Tensor, size: int | None = None) -> Tensor:
        """RMSNorm over the last dimension of `size` values (the hidden size when left out)."""
        family = self.spec.family
        fused = self.how.fused_layers and not (size and family.qk_norm == "full")  # Liger leaves those as they are
        return rms_norm(x, size or self.spec.hidden_size, family.norm, fused=fused, in_place=not family.post_norm)

    # ---- attention ----

    def attention(self, x: Tensor) -> Tensor:
        spec = self.spec
        queries = spec.num_attention_heads * spec.head_dim
        keys = spec.num_key_value_heads * spec.head_dim
        reordered = view if self.how.fused_layers else turned  # Liger leaves the gradient in order
        if "qkv_proj" in self.linears:
            q, k, v = self.fused_projections(x, queries, keys)
        else:
            q = self.linear("q_proj", x)
            if spec.family.qk_norm == "full":
                q, k = self.norm(q, queries), self.norm(self.linear("k_proj", x), keys)
                q, k = reordered(q), reordered(k)
            elif spec.family.qk_norm == "head":
                q = reordered(self.norm(view(q), spec.head_dim))
                k = reordered(self.norm(view(self.linear("k_proj", x)), spec.head_dim))
            else:
                q = reordered(q)
                k = reordered(self.linear("k_proj", x))
            v = self.linear("v_proj", x)
        del x
        rotated_q = self.rotate(q)
        rotated_k = self.rotate(k)
        del q, k
        out = self.attend(rotated_q, rotated_k, view(v))
        del rotated_q, rotated_k, v
        return self.linear("o_proj", out)

    def fused_projections(self, x: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.linear("qkv_proj", x)
        whole = queries + 2 * keys
        return part(qkv, queries / whole), part(qkv, keys / whole), part(qkv, keys / whole)

    def rotate(self, x: Tensor) -> Tensor:
        """x·cos + rotate_half(x)·sin; cos and sin are shared by all layers."""
        if self.how.fused_layers:
            return self.rotate_in_place(x)
        of_cos = unary(x)
        half = part(x, 0.5)
        other = part(x, 0.5)
        negative = unary(other)
        turned = concatenate(negative, half)
        del half, other, negative
        of_sin = unary(turned)
        del turned
        rotated = add(of_cos, of_sin)
        if self.spec.family.rotates_by_parts:
            rotated = concatenate(rotated)
        return rotated

    def rotate_in_place(self, x: Tensor) -> Tensor:
        """Liger's rotation works on (batch, length, heads, dim), and copies what lies in memory otherwise."""
        how, spec = self.how, self.spec
        is_slice = "qkv_proj" in self.linears
        summed = how.masked and x.size < how.tokens * spec.num_attention_heads * spec.head_dim
        copied = how.attention == "eager" or summed
        return record(x.like() if is_slice else x.alias(), (x,), lambda g: (g.like() if copied else g.alias(),))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how, heads = self.how, self.spec.num_attention_heads
        groups = heads // self.spec.num_key_value_heads
        if how.attention == "eager":
            return self.attend_eagerly(q, k, v, groups)
        if how.masked:  # transformers copies the heads itself, because a masked kernel cannot share them
            k, v = repeated(k, groups), repeated(v, groups)
        mask = None
        if how.masked:
            mask = self.attention_bias(q.ledger)
        out = q.like()
        statistics = Tensor(q.ledger, how.tokens * heads, FP32)
        kept = Tensor(q.ledger, out.size, out.width, storage=out.storage)
        flash = how.attention == "flash" and not how.masked

        def backward(g: Tensor, saved=(q, k, v, kept, statistics, mask)):
            q, k, v, *_ = saved
            of_q, of_k, of_v = q.like(), k.like(), v.like()
            rows = -(-how.length // 128) * 128
            if flash:
                columns = -(-self.spec.head_dim // 32) * 32
                spread = 2 * q.size * q.width if groups > 1 else 0
                g.ledger.scratch(FP32 * how.batch * heads * rows * (columns + 1) + spread)
            return of_q, of_k, of_v

        out = record(out, (q, k, v), backward)
        reordered = self.spec.family.rotates_by_parts and not how.fused_layers
        return contiguous(out) if reordered else out  # as q lies, so does the result

    def attention_bias(self, ledger: Ledger) -> Tensor:
        """The mask as numbers to add, built anew in each layer; the efficient kernel wants aligned rows."""
        how = self.how
        rows = how.batch * how.length
        bias = Tensor(ledger, rows * how.length, how.width)
        ledger.scratch(rows * how.length)
        aligned = -(-how.length // _ALIGNMENT) * _ALIGNMENT
        if how.attention == "efficient" and aligned != how.length:
            bias = Tensor(ledger, rows * aligned, how.width)
        return bias

    def attend_eagerly(self, q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
        """Every score is built: batch x heads x length² values, several times over."""
        k, v = repeated(k, groups), repeated(v, groups)
        num_scores = self.how.batch * self.spec.num_attention_heads * self.how.length**2
        scores = product(q, k, num_scores)
        scaled = unary(scores)
        del scores
        if self.spec.family.softcaps_attention:
            scaled = unary(scaled)
            scaled = result_activation(scaled)
            scaled = unary(scaled)
        if self.how.masked or self.how.attention == "eager":
            masked = record(scaled.like(), (scaled,), lambda g: (g,))
        else:
            masked = scaled
        del scaled
        wide = softmax(masked)
        del masked
        weights = cast(wide, q.width)
        del wide
        out = product(weights, v, q.size)
        return contiguous(out)

    # ---- MLP ----

    def mlp(self, x: Tensor) -> Tensor:
        if "gate_up_proj" in self.linears:
            both = self.linear("gate_up_proj", x)
            if self.how.fused_layers:
                # Liger wants the halves in memory of their own; `both` stays to the end of the MLP.
                halves = record(both.like(), (both,), lambda g: (g.like(),))
                mixed = gated_unit(halves, size=halves.size // 2)
                return self.linear("down_proj", mixed)
            gate, up = part(both, 0.5), part(both, 0.5)
            del both, x
            active = activation(gate)
            del gate
            mixed = multiply(up, active)
        else:
            gate = self.linear("gate_proj", x)
            if self.how.fused_layers:
                up = self.linear("up_proj", x)
                mixed = gated_unit(gate, up)
                active = None
            else:
                active = activation(gate)
                del gate
                up = self.linear("up_proj", x)
                mixed = multiply(active, up)
        del active, up
        return self.linear("down_proj", mixed)

    # ---- linear layers and their adapters ----

    def linear(self, target: str, x: Tensor) -> Tensor:
        linear = self.linears[target]
        adapter = self.adapters.get(linear.name)
        base = self.base(linear, x)
        if adapter is None:
            return base
        if self.how.nf4:
            base = clone(base)
        return self.adapted(adapter, linear, x, base)

    def base(self, linear: Linear, x: Tensor) -> Tensor:
        if self.how.nf4:
            return nf4_matmul(x, linear.in_features, linear.out_features, nested=self.how.nested)
        return matmul(x, linear.in_features, linear.out_features, trained=False, bias=linear.bias)

    def adapted(self, adapter: Adapter, linear: Linear, x: Tensor, base: Tensor) -> Tensor:
        how = self.how
        converts = (
            how.device == "cpu" or not how.nf4
        )  # peft widens the input itself; else autocast narrows A and B
        if converts:
            x = cast(x, how.adapter_width)
        factor = None
        if adapter.kind == "dora":
            factor = self.dora_factor(linear, adapter, x)
        if adapter.dropout:
            x = dropout(x, how.device)
        hidden = self.factor_product(x, linear.in_features, adapter.rank)
        if adapter.kind == "adalora":
            hidden = self.with_lambda(hidden, adapter.rank)
        delta = self.factor_product(hidden, adapter.rank, linear.out_features)
        del hidden
        if adapter.kind != "adalora":
            delta = unary(delta)
        if converts and how.nf4:
            delta = cast(delta, base.width)
        result = add(base, delta)
        del base, delta
        if factor is not None:
            result = self.redirect(result, linear)
        return cast(result, how.width)

    def factor_product(self, x: Tensor, in_features: int, out_features: int) -> Tensor:
        """x·Aᵀ or x·Bᵀ. Under autocast an fp32 factor is rounded first, and the rounded copy is kept."""
        how = self.how
        if self.trained and how.autocast and how.adapter_width > how.width:
            x = cast(x, how.width)
            rounded = Tensor(x.ledger, in_features * out_features, how.width)
            return matmul(x, in_features, out_features, rounded_weight=rounded)
        return matmul(x, in_features, out_features, trained=self.trained)

    def with_lambda(self, hidden: Tensor, rank: int) -> Tensor:
        scale = Tensor(hidden.ledger, rank, hidden.width, requires_grad=self.trained)
        return multiply(hidden, scale)

    def dora_factor(self, linear: Linear, adapter: Adapter, x: Tensor) -> Tensor:
        """m / ||W + s·B·A||: the weight once, and blocks of its rows in fp32."""
        num_weights = linear.in_features * linear.out_features
        weight = num_weights * self.how.width if self.how.nf4 else 0
        rows = min(_DORA_ROWS, linear.out_features)
        factors = (
            adapter.rank * (linear.in_features + linear.out_features) * (FP32 if self.how.adapter_width < 4 else 0)
        )
        widened = rows * linear.in_features * FP32 if self.how.width < FP32 else 0
        x.ledger.scratch(weight + factors + widened + 3 * rows * adapter.rank * FP32, weights=weight)
        return Tensor(x.ledger, linear.out_features, FP32)

    def redirect(self, result: Tensor, linear: Linear) -> Tensor:
        """torch.addcmul(v, v, f - 1), and the bias around it."""
        trained = self.trained
        if linear.bias:
            result = unary(result)
        out = result.like()
        if not trained:
            return out if not result.requires_grad else record(out, (result,), lambda g: (g.like(),))

        def backward(g: Tensor, kept: Tensor = result):
            doubled = kept.like()
            of_factor = doubled.like()
            del doubled
            of_value = g.like()
            del of_factor
            return (of_value,)  # to which the engine adds `g`, in place

        out = record(out, (result,), backward)
        return record(out.like(), (out,), lambda g: (g,)) if linear.bias else out
