"""Riemannian preconditioning against a float64 reference from the Jacobian, against peft's, and its invariance.

Zhang and Pilanci, arXiv 2402.02347: the metric of a factor w of X(w) is JᵀJ with J = ∂X/∂w. The reference forms J
with autograd and solves with it in full; what it gives for A of X = B·A is the paper's (BᵀB + δI)⁻¹ g_A.
"""

from __future__ import annotations

import peft
import pytest
import torch
from helpers import randomize_adapters, tiny_layout, tiny_model
from peft.optimizers import create_riemannian_optimizer

from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.preconditioner import clip_gradients, precondition

BANDS = [
    {"band": "lora", "layers": "0", "kind": "lora", "rank": 4, "alpha": 12},
    {"band": "rslora", "layers": "1", "kind": "rslora", "rank": 4, "alpha": 3},
    {"band": "ada", "layers": "2", "kind": "adalora", "rank": 3, "adalora": {"init_rank": 5}},
    {"band": "dora", "layers": "3", "kind": "dora", "rank": 4},
]
BOTH = ["k_proj", "down_proj"]
SQUARE = {"band": "square", "layers": "4", "rank": 32, "target_modules": ["k_proj"]}  # B is (32, 32)
LAYOUT = tiny_layout([*({**band, "target_modules": BOTH} for band in BANDS), SQUARE])


def factors_of(row, module) -> dict[str, torch.nn.Parameter]:
    factors = {"a": module.lora_A[ADAPTER].weight, "b": module.lora_B[ADAPTER].weight}
    return factors | ({"lam": module.lora_lambda[ADAPTER]} if row.kind == "adalora" else {})


def product(row, values):
    """What the module adds to W (DoRA: inside the norm), in the dtype of the values."""
    if row.kind == "adalora":
        return row.alpha / row.rank * values["b"] @ torch.diag(values["lam"]) @ values["a"]
    return row.alpha / row.rank ** (0.5 if row.kind == "rslora" else 1) * values["b"] @ values["a"]


def reference(row, values, gradients, delta):
    """(JᵀJ + δI)⁻¹ g for every factor, with the whole Jacobian of the product, in float64."""
    values = {name: value.detach().double() for name, value in values.items()}
    expected = {}
    for name, value in values.items():
        jacobian = torch.autograd.functional.jacobian(
            lambda factor, name=name: product(row, {**values, name: factor}), value, vectorize=True
        ).reshape(-1, value.numel())
        damped = jacobian.T @ jacobian + delta * torch.eye(value.numel(), dtype=torch.float64)
        solved = torch.linalg.solve(damped, gradients[name].double().flatten())
        expected[name] = solved.view(value.shape)
    return expected


def with_gradients(dtype=torch.float32, scale=0.3, seed=3):
    """A model with random adapters, and random gradients of everything that is trained."""
    model = attach(tiny_model(), LAYOUT, dtype=dtype)
    randomize_adapters(model, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("delta", [1e-2, 1e-6])
def test_every_kind_matches_the_jacobians_metric(dtype, tolerance, delta):
    """bf16's last rounding alone is 2⁻⁸."""
    model = with_gradients(dtype)
    rows = [(row, factors_of(row, module)) for row, module in adapted_modules(model, LAYOUT)]
    before = [{name: factor.grad.clone() for name, factor in factors.items()} for _, factors in rows]
    precondition(model, LAYOUT, delta)
    for (row, factors), gradients in zip(rows, before, strict=True):
        expected = reference(row, factors, gradients, delta)
        for name, factor in factors.items():
            assert factor.grad.dtype == factor.dtype
            error = (factor.grad.double() - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, (row.module, row.kind, name)


def test_plain_lora_is_the_papers_formula():
    model = with_gradients()
    row, module = next(adapted_modules(model, LAYOUT))
    a, b = (part.detach().double() for part in factors_of(row, module).values())
    g_a, g_b = (part.grad.double() for part in factors_of(row, module).values())
    precondition(model, LAYOUT, 0.01)
    identity, s = torch.eye(4, dtype=torch.float64), 3.0
    assert row.scaling == s
    new_a = torch.linalg.inv(s**2 * b.T @ b + 0.01 * identity) @ g_a
    new_b = g_b @ torch.linalg.inv(s**2 * a @ a.T + 0.01 * identity)
    for new, factor in zip((new_a, new_b), factors_of(row, module).values(), strict=True):
        torch.testing.assert_close(factor.grad.double(), new, rtol=1e-5, atol=1e-7)


def test_magnitudes_keep_their_gradient():
    model = with_gradients()
    magnitudes = [
        module.lora_magnitude_vector[ADAPTER].weight
        for row, module in adapted_modules(model, LAYOUT)
        if row.kind == "dora"
    ]
    before = [magnitude.grad.clone() for magnitude in magnitudes]
    precondition(model, LAYOUT, 0.01)
    assert magnitudes and all(torch.equal(m.grad, old) for m, old in zip(magnitudes, before, strict=True))


def test_a_loss_scalers_factor_stays_in_the_gradients():
    model, scaled = with_gradients(), with_gradients()
    for parameter in scaled.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(2**16)
    precondition(model, LAYOUT, 0.01)
    precondition(scaled, LAYOUT, 0.01)
    for one, other in zip(model.parameters(), scaled.parameters(), strict=True):
        if one.grad is not None:
            assert torch.equal(one.grad * 2**16, other.grad)


@pytest.mark.parametrize("delta", [1e-2, 1e-8])
def test_nothing_blows_up_where_a_product_starts_at_zero(delta):
    """B = 0 and Λ = 0: the task's gradient of A, P and Q is zero, and stays so; a dropped triplet's too."""
    model = attach(tiny_model(), LAYOUT, dtype=torch.float32)
    ids = torch.arange(20)[None] % 100
    model(input_ids=ids, labels=ids).loss.backward()
    for row, module in adapted_modules(model, LAYOUT):
        assert any(factor.grad.any() for factor in factors_of(row, module).values())
    precondition(model, LAYOUT, delta)
    for row, module in adapted_modules(model, LAYOUT):
        factors = factors_of(row, module)
        assert all(factor.grad.isfinite().all() for factor in factors.values())
        assert not factors["a"].grad.any()
        if row.kind == "adalora":
            assert not factors["b"].grad.any() and factors["lam"].grad.any()
        else:
            assert factors["b"].grad.any()


@pytest.mark.parametrize(("max_norm", "scale"), [(0.5, 1.0), (0.5, 1024.0), (1e9, 1.0), (0.0, 8.0)])
def test_clipping_is_torchs(max_norm, scale):
    one, other = with_gradients(), with_gradients()
    trained = [p for p in one.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad.mul_(scale)
    norm = clip_gradients(trained, max_norm, scale)
    theirs = [p for p in other.parameters() if p.requires_grad]
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm or float("inf")).item(), rel=1e-5)
    for mine, stock in zip(trained, theirs, strict=True):
        torch.testing.assert_close(mine.grad / scale, stock.grad, rtol=1e-5, atol=1e-9)


def test_what_is_not_finite_is_left_for_the_loss_scaler_to_find():
    model = with_gradients()
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[3].grad[0, 0] = float("inf")
    before = [p.grad.clone() for p in trained]
    assert clip_gradients(trained, 0.5) == float("inf")
    assert all(torch.equal(p.grad, old) for p, old in zip(trained, before, strict=True))
    precondition(model, LAYOUT, 0.01)
    assert not all(p.grad.isfinite().all() for p in trained)


# ---- invariance ----


def change_of_product(row, values, outer, delta):
    """The first-order change of the product by one step of plain SGD at rate 1, with ∂L/∂X = `outer`."""
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    (product(row, values) * outer).sum().backward()
    model = attach(tiny_model(dtype=torch.float64), LAYOUT, dtype=torch.float64)
    (module,) = (module for other, module in adapted_modules(model, LAYOUT) if other == row)
    module.to(torch.float64)  # Λ, too
    for name, factor in factors_of(row, module).items():
        factor.data, factor.grad = values[name].detach().clone(), values[name].grad.clone()
    if delta is not None:
        precondition(model, LAYOUT, delta)
    steps = {name: -factor.grad for name, factor in factors_of(row, module).items()}
    names = list(values)
    _, change = torch.func.jvp(
        lambda *parts: product(row, dict(zip(names, parts, strict=True))),
        tuple(values[name].detach() for name in names),
        tuple(steps[name] for name in names),
    )
    return change


def random_values(row, generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {"a": draw(row.rank, row.in_features), "b": draw(row.out_features, row.rank)}
    return values | ({"lam": draw(row.rank)} if row.kind == "adalora" else {})


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("form", ["scale", "any invertible matrix"])
def test_the_step_is_the_same_for_all_factors_of_one_product(kind, form):
    row = next(row for row in LAYOUT if row.kind == kind and row.target == "down_proj")
    generator = torch.Generator().manual_seed(7)
    values = random_values(row, generator)
    outer = torch.randn(row.out_features, row.in_features, generator=generator, dtype=torch.float64)
    matrix = 50.0 * torch.eye(row.rank, dtype=torch.float64)
    if form != "scale":
        matrix = torch.randn(row.rank, row.rank, generator=generator, dtype=torch.float64)
    others = {"a": matrix @ values["a"], "b": values["b"] @ torch.linalg.inv(matrix)}
    one, other = (change_of_product(row, each, outer, 0.0) for each in (values, others))
    assert (one - other).norm() < 1e-6 * one.norm()
    # It is G projected onto B's columns and onto A's rows, whatever alpha.
    on_b, on_a = values["b"] @ torch.linalg.pinv(values["b"]), torch.linalg.pinv(values["a"]) @ values["a"]
    assert (one + on_b @ outer + outer @ on_a).norm() < 1e-8 * one.norm()
    plain = [change_of_product(row, each, outer, None) for each in (values, others)]
    assert (plain[0] - plain[1]).norm() > 0.1 * plain[0].norm()


def test_adaloras_step_is_the_same_for_all_scales_and_orders_of_its_triplets():
    """The form P·Λ·Q with a diagonal Λ allows no other changes."""
    row = next(row for row in LAYOUT if row.kind == "adalora" and row.target == "down_proj")
    generator = torch.Generator().manual_seed(8)
    values = random_values(row, generator)
    outer = torch.randn(row.out_features, row.in_features, generator=generator, dtype=torch.float64)
    by, to = (torch.randn(row.rank, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.tensor([3, 0, 4, 2, 1])
    others = {
        "a": (by[:, None] * values["a"])[order],
        "b": (values["b"] * to)[:, order],
        "lam": (values["lam"] / by / to)[order],
    }
    assert torch.allclose(product(row, values), product(row, others))
    one, other = (change_of_product(row, each, outer, 0.0) for each in (values, others))
    assert (one - other).norm() < 1e-7 * one.norm()
    plain = [change_of_product(row, each, outer, None) for each in (values, others)]
    assert (plain[0] - plain[1]).norm() > 0.1 * plain[0].norm()


# ---- beside other code ----


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_plain_lora_with_a_scaling_of_one_is_pefts_riemannian_optimizer(optimizer):
    """peft leaves s out of the metric; with s = 1 there is no difference."""
    layout = tiny_layout([{"rank": 4, "alpha": 4}])
    ours, theirs = (attach(tiny_model(), layout, dtype=torch.float32) for _ in range(2))
    for model in (ours, theirs):
        randomize_adapters(model)
    mine = optimizer([p for p in ours.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    stock = create_riemannian_optimizer(theirs, optimizer, lr=1e-2, reg=1e-2, weight_decay=0.0)
    ids = (torch.arange(60) * 7 % 128).view(3, 20)
    for _ in range(5):
        losses = []
        for model, step in ((ours, mine), (theirs, stock)):
            step.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            trained = [p for p in model.parameters() if p.requires_grad]
            if model is ours:
                clip_gradients(trained, 0.3)
                precondition(ours, layout, 1e-2)
            else:  # the order of transformers' trainer
                torch.nn.utils.clip_grad_norm_(trained, 0.3)
            step.step()
        assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() < 2e-5


def test_s_in_the_metric_is_pefts_with_another_delta_and_rate():
    """(s²·BᵀB + δI)⁻¹ = (BᵀB + δ/s²·I)⁻¹ / s²."""
    layout = tiny_layout([{"rank": 4, "alpha": 8}])
    ours, theirs = (attach(tiny_model(), layout, dtype=torch.float32) for _ in range(2))
    for model in (ours, theirs):
        randomize_adapters(model)
        ids = (torch.arange(60) * 7 % 128).view(3, 20)
        model(input_ids=ids, labels=ids).loss.backward()
    precondition(ours, layout, 1e-2)
    stock = create_riemannian_optimizer(theirs, torch.optim.SGD, lr=0.0, reg=1e-2 / 4)
    stock.step()  # which leaves the preconditioned gradients behind
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad / 4, rtol=1e-4, atol=1e-7)
    assert isinstance(theirs, peft.PeftModel)


def test_two_sided_projection_of_the_article_has_no_shape():
    """U·Uᵀ·g·U·Uᵀ with U from the SVD of A (r, in): U is (r, r), and g is (r, in) as A is."""
    a, gradient = torch.randn(4, 64), torch.randn(4, 64)
    u, _, _ = torch.linalg.svd(a, full_matrices=False)
    projection = u @ u.T
    assert projection.shape == (4, 4)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        projection @ gradient @ projection
    # And where it has a shape, with all of U, it does nothing: U is orthogonal.
    torch.testing.assert_close(projection @ gradient, gradient, rtol=1e-4, atol=1e-5)
    # The sound form acts from the side that has r, for every shape of W.
    layout = tiny_layout([{"rank": 4, "target_modules": ["down_proj", "up_proj", "k_proj", "q_proj"]}])
    model = attach(tiny_model(), layout, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    precondition(model, layout, 0.01)
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
