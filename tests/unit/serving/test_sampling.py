"""Which token is drawn: greedily, or as transformers' own sampling would."""

from __future__ import annotations

import pytest
import torch

from qhybrid.serving.sampling import Sampler, Sampling, next_tokens

CPU = torch.device("cpu")


def drawn(count: int, **settings) -> list[int]:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -8.0]])
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 1, **settings}), CPU)
    return [sampler.draw(logits).item() for _ in range(count)]


def test_draws_follow_the_probabilities():
    """5000 draws: the standard error of a share is below 0.0071, and four of them are allowed."""
    for temperature in (0.5, 1.0, 2.0):
        tokens = torch.tensor(drawn(5000, temperature=temperature))
        shares = torch.bincount(tokens, minlength=5) / 5000
        wanted = (torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0]) / temperature).softmax(-1)
        assert (shares - wanted).abs().max() < 0.03


def test_top_k_and_top_p_leave_only_the_likeliest():
    assert set(drawn(500, top_k=2)) == {0, 1}
    assert set(drawn(500, top_p=0.5)) == {0}  # its probability is 0.64
    assert set(drawn(500, top_p=0.8)) == {0, 1}
    assert set(drawn(500, top_p=0.99, top_k=3)) == {0, 1, 2}


def test_equal_seeds_draw_equal_tokens_and_others_do_not():
    assert drawn(50) == drawn(50) != drawn(50, seed=2)
    assert drawn(50, seed=None) != drawn(50, seed=None)


def test_rows_are_chosen_each_by_its_own_settings():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[2, 7] = torch.nan
    alone = next_tokens(logits[1:2], [Sampler(Sampling(1.0, seed=5), CPU)])
    others = [Sampler(Sampling(1.0, seed=seed), CPU) for seed in (5, 6)]
    together = next_tokens(logits, [None, others[0], others[1], None])
    assert together[0] == logits[0].argmax() and together[3] == logits[3].argmax()
    assert together[1] == alone[0]  # the neighbours change nothing
    assert together[2] is None


def test_temperatures_near_zero_are_greedy_and_the_least_other_draws_the_likeliest():
    assert Sampling(0.0).is_greedy and Sampling(1e-39).is_greedy and Sampling(9e-6).is_greedy
    assert not Sampling(1e-5).is_greedy
    logits = torch.tensor([[3e38, -3e38, 2.9e38], [1e4, 0.0, 9.9e3]])  # divided by 1e-5 they overflow
    samplers = [Sampler(Sampling(1e-5, top_p=0.9, top_k=2, seed=0), CPU) for _ in range(2)]
    assert next_tokens(logits, samplers) == [0, 0]


def test_a_draw_that_fails_is_the_fault_of_its_row_alone(monkeypatch, caplog):
    samplers = [Sampler(Sampling(1.0, seed=seed), CPU) for seed in range(3)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = next_tokens(logits[2:], [Sampler(Sampling(1.0, seed=2), CPU)])

    def fail(logits):
        raise error

    monkeypatch.setattr(samplers[1], "draw", fail)
    error = RuntimeError("probability tensor contains either inf or nan")
    tokens = next_tokens(logits, samplers)
    assert tokens[0] is not None and tokens[1] is None and tokens[2] == expected[0]
    assert "probability tensor" in caplog.text
    error = torch.OutOfMemoryError()  # is for the batch, which goes on with fewer rows
    with pytest.raises(torch.OutOfMemoryError):
        next_tokens(logits, samplers)
