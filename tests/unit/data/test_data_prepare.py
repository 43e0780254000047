"""Preparation: mixing and holding out, the same result from the same seed, and nothing on disk."""

from __future__ import annotations

from collections import Counter

import pytest
from trl import pack_dataset

from qhybrid.data.prepare import prepare_held_out
from qhybrid.errors import DataError


@pytest.fixture
def two_sources(write_jsonl):
    """40 rows that say base, and 200 that say domain."""
    base = write_jsonl([{"text": f"base row {i}"} for i in range(40)], "base.jsonl")
    domain = write_jsonl([{"text": f"domain row {i}"} for i in range(200)], "domain.jsonl")
    return base, domain


def texts(dataset, tokenizer):
    return [tokenizer.decode(row["input_ids"]).removesuffix("<|im_end|>") for row in dataset]


def weighted(two_sources, **settings):
    base, domain = two_sources
    return {"sources": [{"path": base, "weight": 30}, {"path": domain, "weight": 70}], **settings}


def test_sources_without_weights_are_joined(prepare, two_sources, tokenizer):
    prepared = prepare({"sources": list(two_sources)})
    expected = [f"base row {i}" for i in range(40)] + [f"domain row {i}" for i in range(200)]
    assert texts(prepared.train, tokenizer) == expected
    assert prepared.eval is None
    assert [source.share for source in prepared.audit.train] == [40 / 240, 200 / 240]


def test_first_exhausted(prepare, two_sources, tokenizer):
    prepared = prepare(weighted(two_sources))
    rows = texts(prepared.train, tokenizer)
    assert len(rows) == len(set(rows)) == 134  # 135 rows would need 40.5 and 94.5: 41 and 94
    assert Counter(row.split()[0] for row in rows) == {"base": 40, "domain": 94}
    assert rows != sorted(rows)
    assert [source.used_rows for source in prepared.audit.train] == [40, 94]
    assert prepared.audit.train[0].share == pytest.approx(0.3, abs=0.002)


def test_all_exhausted(prepare, two_sources, tokenizer):
    prepared = prepare(weighted(two_sources, mixture="all_exhausted"))
    uses = Counter(texts(prepared.train, tokenizer))
    assert len(uses) == 240
    assert {count for row, count in uses.items() if row.startswith("base")} == {2, 3}
    assert {count for row, count in uses.items() if row.startswith("domain")} == {1}


def test_the_seed_decides(prepare, two_sources):
    data = weighted(two_sources, eval_fraction=0.1)
    first, again, other = prepare(data, seed=1), prepare(data, seed=1), prepare(data, seed=2)
    assert first.train.to_dict() == again.train.to_dict()
    assert first.train._fingerprint == again.train._fingerprint != other.train._fingerprint
    assert first.eval.to_dict() == again.eval.to_dict() != other.eval.to_dict()


def test_hold_out(prepare, two_sources, tokenizer):
    prepared = prepare({"sources": list(two_sources), "eval_fraction": 0.1})
    train, held_out = texts(prepared.train, tokenizer), texts(prepared.eval, tokenizer)
    assert len(held_out) == 24 and len(train) == 216 and not set(train) & set(held_out)
    assert Counter(row.split()[0] for row in held_out) == {"base": 4, "domain": 20}
    assert [source.held_out for source in prepared.audit.train] == [4, 20]


def test_hold_out_must_leave_something(prepare, write_jsonl):
    path = write_jsonl([{"text": "only row"}])
    with pytest.raises(DataError, match="none to train on") as caught:
        prepare({"sources": path, "eval_fraction": 0.1})
    assert "eval_sources" in caught.value.hint


def test_weights_that_cannot_work(prepare, write_jsonl):
    one = write_jsonl([{"text": "one row"}], "one.jsonl")
    two = write_jsonl([{"text": "two rows"}, {"text": "row two"}], "two.jsonl")

    def sources(weight):
        return [{"path": one, "weight": 1}, {"path": two, "weight": weight}]

    with pytest.raises(DataError, match="no row of this source") as caught:
        prepare(sources(100))
    assert caught.value.where == one and "all_exhausted" in caught.value.hint
    with pytest.raises(DataError, match="the weights make a mixture of 5,001 rows out of 3"):
        prepare({"sources": sources(10_000), "mixture": "all_exhausted"})


def test_eval_sources(prepare, two_sources, tokenizer):
    base, domain = two_sources
    prepared = prepare({"sources": base, "eval_sources": domain})
    assert (len(prepared.train), len(prepared.eval)) == (40, 200)
    assert prepared.audit.eval[0].used_rows == 200


def test_data_sets_live_in_memory(prepare, two_sources):
    prepared = prepare({"sources": list(two_sources), "eval_fraction": 0.1})
    assert prepared.train.cache_files == prepared.eval.cache_files == []
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert pack_dataset(prepared.train, 64).cache_files == []


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packing_that_splits_gets_whole_texts(prepare, write_jsonl, strategy):
    rows = write_jsonl([{"text": "The river runs to the sea. " * 40}] * 3)
    prepared = prepare(rows, max_length=32, packing=True, packing_strategy=strategy)
    tokens = prepared.audit.train[0].tokens
    assert prepared.audit.train[0].truncated_rows == 0 and tokens > 3 * 32
    packed = pack_dataset(prepared.train, 32, strategy)
    assert sum(map(len, packed["input_ids"])) == tokens
    assert prepare(rows, max_length=32, packing=True).audit.train[0].tokens == 3 * 32


def test_rows_held_out_are_the_same_whole(make_recipe, prepare, tokenizer, write_jsonl, tmp_path):
    """Rows that truncation leaves nothing of are no rows in training, so they must not move the choice."""
    rows = [
        {"prompt": "the question " * (30 if i % 4 == 0 else 1), "completion": f"answer number {i} " * 20}
        for i in range(40)
    ]
    data = {"sources": write_jsonl(rows), "eval_fraction": 0.25, "max_dropped_fraction": 1.0}
    prepared = prepare(data, max_length=24)
    assert prepared.audit.train[0].dropped == 10
    whole = prepare_held_out(make_recipe(data, max_length=24), tokenizer, base_folder=tmp_path)
    assert len(whole) == len(prepared.eval) and {len(row.input_ids) > 24 for row in whole} == {True}
    for row, cut in zip(whole, prepared.eval, strict=True):
        assert row.input_ids[:24].tolist() == cut["input_ids"]
    assert {row.number for row in whole}.isdisjoint(number for _, number in prepared.origins)
