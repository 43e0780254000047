"""AdaLoRA's scores, schedule and masks over 50 steps against a float64 reference written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from qhybrid.adapters.adalora import add_regularizer, lora_factors
from qhybrid.adapters.allocator import RankAllocator, Triplets
from qhybrid.adapters.schedule import BudgetSchedule
from qhybrid.errors import RecipeError
from qhybrid.recipe.band import AdaLoraSection

SHAPES = {"a": (10, 6, 4), "b": (8, 12, 4), "c": (5, 5, 4)}  # name: (out, in, rank)
BETA1, BETA2 = 0.85, 0.8


class PaperReference:
    """arXiv 2303.10512: algorithm 1 with eq. 8 to 10, in float64 and plain loops."""

    def __init__(self, shapes, total, warmup, final, interval, start, target):
        self.avg = {(n, k): 0.0 for n in shapes for k in "pql"}
        self.unc = dict(self.avg)
        self.total, self.warmup, self.final, self.interval = total, warmup, final, interval
        self.start, self.target = start, target
        self.fixed = None

    def budget(self, t):
        if t <= self.warmup:
            return self.start
        if t >= self.total - self.final:
            return self.target
        cube = (1 - (t - self.warmup) / (self.total - self.final - self.warmup)) ** 3
        return int(np.floor(self.target + (self.start - self.target) * cube + 0.5))

    def observe(self, weights, gradients):
        for key in self.avg:
            sensitivity = np.abs(weights[key] * gradients[key])
            self.avg[key] = BETA1 * self.avg[key] + (1 - BETA1) * sensitivity
            self.unc[key] = BETA2 * self.unc[key] + (1 - BETA2) * np.abs(sensitivity - self.avg[key])

    def choose(self, t):
        """The kept (module, triplet) pairs, or None when nothing is due."""
        last = self.total - self.final
        if t > last:
            return self.fixed
        if not (t == last or (self.warmup < t < last and (t - self.warmup) % self.interval == 0)):
            return None
        scored = []
        for name, (_, _, rank) in SHAPES.items():
            s = {k: self.avg[name, k] * self.unc[name, k] for k in "pql"}
            for i in range(rank):
                scored.append((s["l"][i] + s["p"][:, i].mean() + s["q"][i, :].mean(), name, i))
        order = sorted(range(len(scored)), key=lambda j: -scored[j][0])
        kept = {(scored[j][1], scored[j][2]) for j in order[: self.budget(t)]}
        if t == last:
            self.fixed = kept
        return kept


def build(total=50, warmup=5, final=15, interval=3, target=5):
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: Triplets(
            q=nn.Parameter(torch.randn(r, i, generator=generator)),
            p=nn.Parameter(torch.randn(o, r, generator=generator)),
            lam=nn.Parameter(torch.randn(r, generator=generator)),
        )
        for name, (o, i, r) in SHAPES.items()
    }
    schedule = BudgetSchedule(total, warmup, final, interval, 12, target)
    return modules, RankAllocator("band", modules, schedule, BETA1, BETA2), schedule


def test_fifty_steps_match_the_reference():
    modules, allocator, schedule = build()
    reference = PaperReference(SHAPES, 50, 5, 15, 3, 12, 5)
    generator = torch.Generator().manual_seed(1)
    allocations = []
    for step in range(1, 51):
        weights, gradients = {}, {}
        for name, t in modules.items():
            for key, parameter in (("p", t.p), ("q", t.q), ("l", t.lam)):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                weights[name, key] = parameter.detach().double().numpy().copy()
                gradients[name, key] = parameter.grad.double().numpy()
        if step <= schedule.last_allocation:
            allocator.observe()
            reference.observe(weights, gradients)
        with torch.no_grad():  # the optimizer's update
            for t in modules.values():
                for parameter in (t.p, t.q, t.lam):
                    parameter.sub_(0.01 * parameter.grad)
        if allocator.allocate(step):
            allocations.append(step)
        expected = reference.choose(step)
        if expected is None:
            continue
        live = {(n, i) for n, t in modules.items() for i in range(4) if t.lam[i] != 0}
        assert live == expected, f"step {step}"
        assert len(live) == reference.budget(step)
        for name, t in modules.items():
            scores = allocator.scores()[name].double().numpy()
            wanted = reference.avg[name, "l"] * reference.unc[name, "l"]
            wanted = wanted + (reference.avg[name, "p"] * reference.unc[name, "p"]).mean(0)
            wanted = wanted + (reference.avg[name, "q"] * reference.unc[name, "q"]).mean(1)
            np.testing.assert_allclose(scores, wanted, rtol=1e-5)
            assert t.q.shape == (4, SHAPES[name][1])  # matrices stay at full rank
    assert allocations == [8, 11, 14, 17, 20, 23, 26, 29, 32, 35]
    assert sum(allocator.live_ranks().values()) == 5


def test_ties_keep_exactly_the_budget():
    """kthvalue with >= prunes too many or too few on ties; here every score is equal (zero)."""
    modules, allocator, _ = build(target=5)
    assert allocator.allocate(35)
    assert sum(allocator.live_ranks().values()) == 5
    assert sum(int((t.lam != 0).sum()) for t in modules.values()) == 5


def test_a_dropped_triplet_can_grow_back_before_the_final_choice():
    modules, allocator, _ = build()
    allocator.allocate(32)
    dropped = next((n, i) for n, t in modules.items() for i in range(4) if t.lam[i] == 0)
    with torch.no_grad():
        modules[dropped[0]].lam[dropped[1]] = 1.0
    assert not allocator.allocate(33)
    assert modules[dropped[0]].lam[dropped[1]] == 1.0
    allocator.allocate(35)
    kept = allocator.live_ranks()
    with torch.no_grad():
        for t in modules.values():
            t.lam.fill_(1.0)
    assert not allocator.allocate(36)  # fixed: masked again, without a new choice
    assert {n: int((t.lam != 0).sum()) for n, t in modules.items()} == kept


def test_state_restores_the_next_choice_exactly():
    modules, allocator, schedule = build()
    generator = torch.Generator().manual_seed(2)
    for _ in range(7):
        for t in modules.values():
            for parameter in (t.p, t.q, t.lam):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        allocator.observe()
    allocator.allocate(8)
    copy = RankAllocator("band", modules, schedule, BETA1, BETA2)
    copy.load_state_dict({k: v.clone() for k, v in allocator.state_dict().items()})
    assert copy.live_ranks() == allocator.live_ranks() and copy.num_allocations == 1
    for name, score in allocator.scores().items():
        assert torch.equal(copy.scores()[name], score)
    with pytest.raises(KeyError):
        copy.load_state_dict({"num_allocations": torch.tensor(1)})


def test_gradient_scale_is_taken_out():
    modules, allocator, schedule = build()
    scaled = RankAllocator("band", modules, schedule, BETA1, BETA2)
    for t in modules.values():
        for parameter in (t.p, t.q, t.lam):
            parameter.grad = torch.ones_like(parameter)
    allocator.observe()
    for t in modules.values():
        for parameter in (t.p, t.q, t.lam):
            parameter.grad.mul_(1024)
    scaled.observe(gradient_scale=1024)
    for name, score in allocator.scores().items():
        assert torch.allclose(scaled.scores()[name], score)


@given(
    total=st.integers(1, 2000),
    warmup=st.floats(0, 1, exclude_max=True),
    final=st.floats(0, 1, exclude_max=True),
    start=st.integers(1, 500),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_schedule_falls_from_start_to_target(total, warmup, final, start, data):
    assume(warmup + final < 1)  # or the recipe refuses it
    target = data.draw(st.integers(1, start))
    section = AdaLoraSection(warmup=warmup, final=final)
    try:
        plan = BudgetSchedule.plan(section, band="b", total_steps=total, init_budget=start, target_budget=target)
    except RecipeError as error:
        assert "'b'" in str(error) and error.hint
        return
    budgets = [plan.budget(step) for step in range(1, total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == target
    # tfinal is a length: its last phase holds the target, and the final choice comes before it.
    assert all(budget == target for budget in budgets[total - plan.final_steps - 1 :])
    due = [step for step in range(1, total + 1) if plan.is_due(step)]
    assert due and due[-1] == plan.last_allocation == total - plan.final_steps
    assert all(step > plan.warmup_steps for step in due)


def test_tfinal_is_a_length_and_not_an_end_step():
    plan = BudgetSchedule.plan(
        AdaLoraSection(warmup=10, final=30), band="b", total_steps=100, init_budget=20, target_budget=10
    )
    assert plan.last_allocation == 70
    assert plan.budget(10) == 20 and plan.budget(69) >= 10 and plan.budget(70) == 10
    assert plan.budget(40) == 11  # 10 + 10·(1 - 30/60)³ = 11.25


def test_the_regulariser_and_its_gradient_match_autograd():
    generator = torch.Generator().manual_seed(0)
    pairs = []
    expected = 0.0
    wide = []
    for out, inner, rank in ((12, 9, 4), (7, 20, 3)):
        p = nn.Parameter(torch.randn(out, rank, generator=generator) * 0.3)
        q = nn.Parameter(torch.randn(rank, inner, generator=generator) * 0.3)
        p.grad, q.grad = torch.randn(p.shape, generator=generator), torch.randn(q.shape, generator=generator)
        pairs.append((p, q))
        one, other = p.detach().double().requires_grad_(), q.detach().double().requires_grad_()
        wide += [(p, one), (q, other)]
        identity = torch.eye(rank, dtype=torch.float64)
        expected = expected + (one.T @ one - identity).norm() + (other @ other.T - identity).norm()
    expected = 0.1 * expected / 4  # the mean over two P and two Q
    expected.backward()
    before = [parameter.grad.clone() for parameter, _ in wide]
    value = add_regularizer(pairs, 0.1, scale=8.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for (parameter, reference), old in zip(wide, before, strict=True):
        assert torch.allclose((parameter.grad - old).double() / 8, reference.grad, atol=1e-6)


def test_the_regulariser_of_orthonormal_factors_has_no_gradient():
    p, q = nn.Parameter(torch.eye(8)[:, :3].contiguous()), nn.Parameter(torch.eye(9)[:3].contiguous())
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    assert add_regularizer([(p, q)], 0.1).item() == 0
    assert not p.grad.any() and not q.grad.any()


def test_the_regulariser_stays_below_the_usual_clipping_norm_on_a_7b_model():
    """Else clipping would scale down the other bands, as with the squares of eq. 4 and the same weight."""
    generator = torch.Generator().manual_seed(0)
    layer = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)]  # Llama-2-7B; its middle third is 10 layers
    pairs = []
    for out, inner in layer * 10:
        p = nn.Parameter(torch.randn(out, 24, generator=generator) * 0.02)
        q = nn.Parameter(torch.randn(24, inner, generator=generator) * 0.02)
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        pairs.append((p, q))
    add_regularizer(pairs, 0.1)
    max_grad_norm = 1.0  # trl's default
    norm = torch.stack([one.grad.norm() for pair in pairs for one in pair]).norm()
    assert norm < 0.1 * max_grad_norm
    squared = torch.stack(
        [
            0.1 * 4 * (one @ (one.T @ one - torch.eye(24))).norm() / len(pairs)
            for p, q in pairs
            for one in (p.detach(), q.detach().T)
        ]
    ).norm()  # the mean over modules, where the paper even has the sum
    assert squared > max_grad_norm


def test_folding_into_lora_is_exact():
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(6, 20, generator=generator), torch.randn(30, 6, generator=generator)
    lam = torch.tensor([0.5, -0.2, 0.0, 1e-4, 0.0, -3.0])
    a, b = lora_factors(q, p, lam, scaling=1.7)
    assert a.shape == (4, 20) and b.shape == (30, 4)
    expected = 1.7 * p.double() @ torch.diag(lam.double()) @ q.double()
    assert (b.double() @ a.double() - expected).abs().max() < 1e-6 * expected.abs().max()
    a, b = lora_factors(q, p, torch.zeros(6), scaling=1.0)
    assert a.shape == (0, 20) and b.shape == (30, 0)
