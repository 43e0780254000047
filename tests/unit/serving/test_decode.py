"""The batch: every row gets the tokens that transformers' generate gives it alone, whoever comes and goes."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import TINY, build_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from qhybrid.serving import decode
from qhybrid.serving.decode import Batch, Completion
from qhybrid.serving.engine import BASE, Engine, ServedModel
from qhybrid.serving.prompts import Prompter
from qhybrid.serving.sampling import Sampler, Sampling
from qhybrid.serving.text import TextStream

TOKENIZER = build_tokenizer()
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "phi3": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "smollm3": {},
}


def family(name: str):
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        **{**TINY, "model_type": name, "num_hidden_layers": 4, "vocab_size": len(TOKENIZER), **FAMILIES[name]}
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def engine_of(model) -> Engine:
    served = ServedModel("m", BASE, Prompter(TOKENIZER), frozenset(), 256, len(TOKENIZER), torch.device("cpu"))
    return Engine(model, [served])


@pytest.fixture(scope="module")
def engine():
    return engine_of(tiny_model(vocab_size=len(TOKENIZER)))


def completion(ids: list[int], max_tokens: int, *, ends=(), stop=(), sampling: Sampling | None = None):
    sampler = Sampler(sampling, torch.device("cpu")) if sampling else None
    return Completion(BASE, list(ids), max_tokens, frozenset(ends), TextStream(TOKENIZER, stop), sampler)


def prompt(chooser: random.Random, most: int = 40) -> list[int]:
    return [chooser.randrange(4, len(TOKENIZER)) for _ in range(chooser.randint(1, most))]


def greedy(model, ids: list[int], max_tokens: int, ends=()) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0,
    )  # fmt: skip
    return output[0].tolist()


def run(engine: Engine, rows: list[Completion], seed: int | None = None) -> list[Completion]:
    """Decode rows; with a seed, they come in one by one or in groups, between steps."""
    batch, waiting, chooser = engine.new_batch(), list(rows), random.Random(seed)
    with engine.inference():
        while waiting or len(batch):
            count = len(waiting) if seed is None else chooser.randint(0, 3)
            if waiting[:count]:
                batch.add(waiting[:count])
                waiting = waiting[count:]
            if len(batch):
                batch.step()
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_generate(name):
    """In every order of coming and going; prompts are longer and shorter than a sliding window."""
    model = family(name)
    chooser = random.Random(1)
    prompts = [prompt(chooser) for _ in range(8)]
    lengths = [chooser.randint(1, 25) for _ in prompts]
    wanted = [greedy(model, ids, n) for ids, n in zip(prompts, lengths, strict=True)]
    assert len({tuple(ids[-5:]) for ids in wanted}) > 4  # not one answer for all
    engine = engine_of(model)
    for seed in (None, 0, 1):
        rows = run(engine, [completion(ids, n) for ids, n in zip(prompts, lengths, strict=True)], seed)
        assert [row.ids for row in rows] == wanted
        assert {row.finish_reason for row in rows} == {"length"}


def test_an_end_token_ends_the_answer_and_is_not_shown(engine):
    ids = prompt(random.Random(2))
    free = greedy(engine._model, ids, 20)
    end = free[len(ids) + 6]
    first = free.index(end, len(ids))
    [row] = run(engine, [completion(ids, 20, ends=[end])])
    assert row.ids == free[: first + 1] and row.finish_reason == "stop"
    assert row.ids == greedy(engine._model, ids, 20, [end])
    assert row.read() == TOKENIZER.decode(free[len(ids) : first], skip_special_tokens=True)
    assert row.num_tokens == first + 1 - len(ids)


def test_a_stop_string_ends_the_answer(engine):
    ids = prompt(random.Random(2))
    text = TOKENIZER.decode(greedy(engine._model, ids, 20)[len(ids) :], skip_special_tokens=True)
    stop = text[len(text) // 2 :][:3]
    [row] = run(engine, [completion(ids, 20, stop=[stop])])
    assert row.finish_reason == "stop" and row.read() == text.partition(stop)[0]


def test_seeded_answers_do_not_depend_on_the_batch(engine):
    chooser = random.Random(4)
    prompts = [prompt(chooser) for _ in range(6)]

    def rows():
        return [
            completion(ids, 15, sampling=Sampling(1.0, top_p=0.9, seed=i) if i % 2 else None)
            for i, ids in enumerate(prompts)
        ]

    alone = [run(engine, [row])[0].ids for row in rows()]
    assert [row.ids for row in run(engine, rows())] == alone
    assert [row.ids for row in run(engine, rows(), seed=7)] == alone


def test_a_row_that_was_taken_out_goes_on_where_it_was(engine):
    chooser = random.Random(5)
    prompts = [prompt(chooser) for _ in range(3)]
    wanted = [row.ids for row in run(engine, [completion(p, 12, sampling=Sampling(1.0, seed=1)) for p in prompts])]
    rows = [completion(p, 12, sampling=Sampling(1.0, seed=1)) for p in prompts]
    batch = engine.new_batch()
    with engine.inference():
        batch.add(rows)
        for _ in range(3):
            batch.step()
        batch.drop(rows[:2])
        for _ in range(3):
            batch.step()
    assert [row.num_tokens for row in rows] == [4, 4, 7]
    assert [row.ids for row in run(engine, rows)] == wanted


def test_the_cache_holds_no_more_than_the_longest_row(engine):
    long, short = completion([5] * 60, 3), completion([6] * 4, 30)
    batch = engine.new_batch()
    with engine.inference():
        batch.add([long, short])
        assert batch._state.mask.shape == (2, 60)
        while long.finish_reason is None:
            batch.step()
        assert batch._state.mask.shape == (1, len(short.ids) - 1)  # the last token is not in it yet
        assert batch._state.cache.get_seq_length() == len(short.ids) - 1
        batch.drop([short])
    assert len(batch) == 0 and batch._state is None


def test_long_prompts_are_prefilled_one_after_the_other(engine, monkeypatch):
    prefilled = []

    def forward(adapters, ids, mask, cache: DynamicCache):
        if ids.shape[1] > 1:
            prefilled.append(tuple(ids.shape))
        return engine.forward(adapters, ids, mask, cache)

    monkeypatch.setattr(decode, "_PREFILL_TOKENS", 100)
    batch = Batch(forward, 0, torch.device("cpu"))
    rows = [completion([5 + i] * n, 4) for i, n in enumerate((30, 40, 20, 45, 150, 10))]
    wanted = [greedy(engine._model, row.ids, 4) for row in rows]
    with engine.inference():
        batch.add(rows)
        while len(batch):
            batch.step()
    assert prefilled == [(2, 40), (2, 45), (1, 150), (1, 10)]
    assert [row.ids for row in rows] == wanted


def test_a_row_that_is_not_finite_ends_alone(engine):
    def forward(adapters, ids, mask, cache):
        logits = engine.forward(adapters, ids, mask, cache)
        if len(logits) == 2:
            logits[0] = torch.nan
        return logits

    batch = Batch(forward, 0, torch.device("cpu"))
    rows = [completion([5, 6], 5), completion([7, 8], 5, sampling=Sampling(1.0, seed=0))]
    with engine.inference():
        batch.add(rows)
        while len(batch):
            batch.step()
    assert rows[0].finish_reason == "error" and rows[0].num_tokens == 0
    assert rows[1].finish_reason == "length" and rows[1].num_tokens == 5
