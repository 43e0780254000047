"""PiSSA against float64 references from the paper (arXiv 2404.02948)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from pissa_cases import (
    NF4,
    NONE,
    RANK,
    SCALINGS,
    TOKENS,
    best,
    layout_of,
    parts_of,
    pissa_model,
    relative,
    section,
    weights_of,
)
from safetensors.torch import load_file

from qhybrid.adapters.attach import adapted_modules
from qhybrid.adapters.pissa import principal_part
from qhybrid.base.load import keep_exact_on_cpu, load_base


def test_pissa_trains_the_principal_part_and_freezes_the_residual(base):
    """An article has it the other way round: it trains the residual, and the principal part stays as it is."""
    model, layout = pissa_model(base)
    whole = weights_of(base)
    for row, module in adapted_modules(model, layout):
        frozen, trained = (
            module.get_base_layer().weight,
            (module.lora_A["default"].weight, module.lora_B["default"].weight),
        )
        assert not frozen.requires_grad and all(factor.requires_grad for factor in trained)
        product = row.scaling * (trained[1].detach().double() @ trained[0].detach().double()).numpy()
        if row.band == "d":
            assert not product.any() and relative(frozen.double().numpy(), whole[row.module]) == 0
            continue
        assert row.scaling == pytest.approx(SCALINGS[row.layer])
        principal = best(whole[row.module], RANK)
        assert relative(product, principal) < 1e-4
        assert relative(frozen.double().numpy(), whole[row.module] - principal) < 1e-4
        # As in the paper, both factors have an equal share: B0ᵀ·B0 = A0·A0ᵀ = S_r / s.
        shares = [(trained[1].T @ trained[1]).detach(), (trained[0] @ trained[0].T).detach()]
        sigma = np.linalg.svd(whole[row.module], compute_uv=False)[:RANK] / row.scaling
        for share in shares:
            assert relative(share.double().numpy(), np.diag(sigma)) < 1e-4
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    pissa = [row.module for row in layout if row.init == "pissa"]
    for module in pissa:
        assert {f"base_model.model.{module}.lora_{part}.default.weight" for part in "AB"} <= changed
    assert not any("base_layer" in name for name in changed)


def test_at_the_start_the_function_is_that_of_the_whole_model(base):
    model, _ = pissa_model(base)
    with torch.no_grad():
        whole = load_base(section(base), NONE)(TOKENS).logits
        assert (model(TOKENS).logits - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_on_nf4_the_start_is_the_quantised_residual_and_the_principal_part(base):
    """A model whose weights are put together here, with bitsandbytes' own NF4, computes the same."""
    model, layout = pissa_model(base, NF4)
    reference = load_base(section(base), NONE)
    rows = {row.module: row for row in layout}
    for name, linear in reference.named_modules():
        if not name.endswith("_proj"):
            continue
        weight, part = linear.weight.data, np.zeros(())
        if rows[name].init == "pissa":
            layer = model.get_base_model().get_submodule(name)
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            part = (rows[name].scaling * b @ a).detach()
            weight = (weight.double() - part).float()
        packed = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        linear.weight.data = (dequantize_4bit(*packed).double() + part).float()
    with torch.no_grad():
        ours, theirs = model(TOKENS).logits, reference(TOKENS).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_start_is_nearer_to_the_16_bit_model_than_nf4_is(base):
    """The paper's point for 4 bits: what is quantised is smaller."""
    model, layout = pissa_model(base, NF4, bands=[{"rank": RANK, "init": "pissa"}])
    with torch.no_grad():
        whole = load_base(section(base), NONE)(TOKENS).logits
        qlora = load_base(section(base), NF4)
        keep_exact_on_cpu(qlora)
        errors = [float((logits - whole).norm()) for logits in (model(TOKENS).logits, qlora(TOKENS).logits)]
    assert errors[0] < 0.75 * errors[1]
    for row, module in adapted_modules(model, layout):
        layer, weight = module.get_base_layer().weight, weights_of(base)[row.module]
        start = dequantize_4bit(layer.data, layer.quant_state) + row.scaling * (
            module.lora_B["default"].weight @ module.lora_A["default"].weight
        )
        own = qlora.get_submodule(row.module).weight
        plain = dequantize_4bit(own.data, own.quant_state)
        assert relative(start.detach().numpy(), weight) < relative(plain.numpy(), weight)


def test_magnitudes_start_at_the_norms_of_what_the_layer_multiplies_with(base):
    """W + s·B0·A0 of the rounded residual, not of the residual alone, which would scale the layer down."""
    for quantization in (NONE, NF4):
        model, layout = pissa_model(base, quantization)
        for row, module in adapted_modules(model, layout):
            if row.kind != "dora":
                continue
            layer = module.get_base_layer().weight
            frozen = layer if quantization is NONE else dequantize_4bit(layer.data, layer.quant_state)
            product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            norms = (frozen.double() + row.scaling * product).norm(dim=1)
            magnitude = module.lora_magnitude_vector["default"].weight.double()
            assert (magnitude / norms - 1).abs().max() < 1e-5
            assert (magnitude / frozen.double().norm(dim=1) - 1).abs().max() > 0.1


# ---- the decomposition ----


@pytest.mark.parametrize("shape", [(576, 192), (192, 576), (640, 640)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])  # of the singular values: σ_i = i^-decay
def test_the_fast_decomposition_is_nearly_the_best(shape, decay):
    """‖W − s·B0·A0‖ against the least there is (Eckart and Young), also where the spectrum is flat."""
    generator = torch.Generator().manual_seed(1)
    side = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=generator).double()).Q for n in shape)
    sigma = torch.arange(1, side + 1).double() ** -decay
    weight = ((u * sigma) @ v.T).float()
    for rank in (4, 16, 64):  # the last is decomposed in full
        part = principal_part(weight, rank, 2.0, dtype=torch.float32)
        assert part.a.shape == (rank, shape[1]) and part.b.shape == (shape[0], rank)
        error = float((weight.double() - 2.0 * part.b.double() @ part.a.double()).norm())
        assert error <= 1.003 * float(sigma[rank:].norm())


def test_the_start_depends_on_nothing_but_the_weight(base):
    """Not on torch's generator, the order of the modules, or what came before; and it moves no generator."""
    layout = layout_of()
    torch.manual_seed(1)
    first = parts_of(base, layout)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    backwards = dataclasses.replace(layout, rows=tuple(reversed(layout.rows)))
    second = parts_of(base, backwards)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys() and len(first) == 5 * 7
    for name, part in first.items():
        assert torch.equal(part.a, second[name].a) and torch.equal(part.b, second[name].b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_loads_give_the_same_bytes_on_any_number_of_threads(base, dtype):
    folder = base.with_name("bf16") if dtype == "bfloat16" else base
    bytes_of = []
    parts = parts_of(folder, dtype=getattr(torch, dtype))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            loaded = load_base(section(folder, dtype), NF4, without=parts)
        finally:
            torch.set_num_threads(before)
        weights = {name: module.weight for name, module in loaded.named_modules() if name.endswith("_proj")}
        bytes_of.append(
            {
                name: (weight.data.numpy().tobytes(), weight.quant_state.absmax.numpy().tobytes())
                for name, weight in weights.items()
            }
        )
    assert bytes_of[0] == bytes_of[1] and len(bytes_of[0]) == 42


def test_rows_of_the_residual_are_those_of_the_whole(base):
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    part = principal_part(weight, RANK, 3.0, dtype=torch.bfloat16)
    whole = part.residual(weight)
    exact = weight.double() - 3.0 * part.b.double() @ part.a.double()
    assert torch.equal(whole, exact.bfloat16()) and whole.dtype == torch.bfloat16
    pieces = torch.cat([part.residual(weight[start : start + 17], start) for start in range(0, 128, 17)])
    assert torch.equal(pieces, whole)
    part.take_out_of(weight)
    assert torch.equal(weight, whole)
