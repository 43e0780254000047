"""The decoding thread: who waits, who joins, what a failed batch does, and how it ends."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from helpers import build_tokenizer, tiny_model
from serving_helpers import wait_until

from qhybrid.serving.batcher import Batcher, ClosingError, DeadError, Job, QueueFullError, Update
from qhybrid.serving.engine import BASE, Engine, ServedModel
from qhybrid.serving.prompts import Prompter
from qhybrid.serving.sampling import Sampling

TOKENIZER = build_tokenizer()


class Watched(Engine):
    """An engine that writes down how many rows it computes, and does what a test says before it does."""

    def __init__(self, model, models) -> None:
        super().__init__(model, models)
        self.sizes: list[int] = []
        self.before = lambda adapters, ids: None

    def forward(self, adapters, ids, mask, cache):
        self.before(adapters, ids)
        self.sizes.append(len(adapters))
        return super().forward(adapters, ids, mask, cache)


@pytest.fixture
def engine():
    served = ServedModel("m", BASE, Prompter(TOKENIZER), frozenset(), 256, len(TOKENIZER), torch.device("cpu"))
    return Watched(tiny_model(vocab_size=len(TOKENIZER)), [served])


@pytest.fixture
def batcher(engine):
    """Not started."""
    made = Batcher(engine, max_batch=4, wait_seconds=0.2, max_queue=8)
    yield made
    if made._thread.is_alive():
        made.close()


class Asked:
    """A job, and what it was told."""

    def __init__(self, engine: Engine, first: int, max_tokens: int = 6, sampling: Sampling = Sampling()) -> None:  # noqa: B008
        self.updates: list[Update] = []
        completion = engine.models["m"].completion([first, 9, 10], max_tokens=max_tokens, sampling=sampling)
        self.job = Job(completion, self.updates.append)

    @property
    def is_done(self) -> bool:
        return bool(self.updates) and (self.updates[-1].finish_reason or self.updates[-1].fault) is not None

    @property
    def text(self) -> str:
        assert self.updates[-1].finish_reason == "length", self.updates
        return "".join(update.text for update in self.updates)


def answered(batcher: Batcher, asked: list[Asked]) -> list[str]:
    batcher.submit([one.job for one in asked])
    wait_until(lambda: all(one.is_done for one in asked))
    return [one.text for one in asked]


def test_those_that_come_within_the_wait_share_a_batch(engine, batcher):
    batcher.start()
    asked = [Asked(engine, 5 + i) for i in range(3)]
    for one in asked:
        batcher.submit([one.job])
        time.sleep(0.01)
    wait_until(lambda: all(one.is_done for one in asked))
    assert engine.sizes == [3] * 6


def test_a_full_batch_does_not_wait_and_the_rest_joins_as_rows_leave(engine, batcher):
    batcher._wait_seconds = 3600.0
    asked = [Asked(engine, 5 + i, max_tokens=2 + i) for i in range(4)] + [Asked(engine, 20 + i) for i in range(4)]
    batcher.submit([one.job for one in asked])
    batcher.start()
    wait_until(lambda: all(one.is_done for one in asked))
    assert max(engine.sizes) == 4 and engine.sizes[0] == 4
    order = sorted(asked, key=lambda one: one.job.arrived)
    assert order == asked


def test_nobody_waits_longer_than_the_target_for_company(engine, batcher):
    batcher.start()
    began = time.monotonic()
    answered(batcher, [Asked(engine, 5)])
    assert 0.2 <= time.monotonic() - began < 5


def test_a_full_queue_takes_none_of_a_request(engine, batcher):
    batcher.submit([Asked(engine, 5).job for _ in range(7)])
    with pytest.raises(QueueFullError):
        batcher.submit([Asked(engine, 5).job for _ in range(2)])
    assert batcher.counts == (7, 0)
    batcher.submit([Asked(engine, 5).job])
    batcher.start()


def test_a_failed_batch_is_told_and_the_next_one_works(engine, batcher, caplog):
    batcher.start()

    def fail(adapters, ids):
        raise RuntimeError("a broken kernel")

    engine.before = fail
    asked = [Asked(engine, 5 + i) for i in range(2)]
    batcher.submit([one.job for one in asked])
    wait_until(lambda: all(one.is_done for one in asked))
    assert [one.updates for one in asked] == [[Update(fault="internal")]] * 2
    assert "a broken kernel" in caplog.text
    engine.before = lambda adapters, ids: None
    answered(batcher, [Asked(engine, 5)])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError()],
    ids=["python", "torch", "cuda"],
)
def test_out_of_memory_is_met_with_fewer_rows_and_loses_nothing(engine, batcher, error):
    """In the prefill as well as between tokens: the answers are those of each row alone, drawn ones too."""

    def asked():
        return [Asked(engine, 5 + i, 12, Sampling(1.0, seed=i) if i % 2 else Sampling()) for i in range(4)]

    batcher.start()
    alone = [answered(batcher, [one])[0] for one in asked()]

    def fail(adapters, ids):
        if len(adapters) > 3 or (len(adapters) > 1 and ids.shape[1] == 1 and len(engine.sizes) == 5):
            engine.sizes.append(0)
            raise error

    engine.sizes.clear()
    engine.before = fail
    assert answered(batcher, asked()) == alone
    assert engine.sizes[0] == 0 and engine.sizes[1] == 2 and engine.sizes[5] == 0 and engine.sizes[6] == 1
    engine.before = lambda adapters, ids: None
    engine.sizes.clear()
    answered(batcher, asked())
    assert max(engine.sizes) == 4  # it is tried with all again


def test_out_of_memory_with_one_row_is_its_fault(engine, batcher):
    def fail(adapters, ids):
        if ids.shape[1] > 1 and 7 in ids[:, 0]:
            raise MemoryError

    engine.before = fail
    batcher.start()
    asked = [Asked(engine, 5), Asked(engine, 7)]
    batcher.submit([one.job for one in asked])
    wait_until(lambda: all(one.is_done for one in asked))
    assert asked[0].text and asked[1].updates == [Update(fault="memory")]


def test_cancelled_jobs_leave_at_once(engine, batcher):
    running, waiting = Asked(engine, 5, max_tokens=200), [Asked(engine, 6 + i, max_tokens=200) for i in range(4)]
    batcher.start()
    batcher.submit([running.job])
    wait_until(lambda: running.updates)
    batcher.submit([one.job for one in waiting])
    for one in (running, *waiting):
        one.job.cancelled = True
    wait_until(lambda: batcher.counts == (0, 0))
    assert not any(one.is_done for one in (running, *waiting))


def test_closing_finishes_what_was_taken_and_takes_no_more(engine, batcher):
    batcher._wait_seconds = 3600.0
    batcher.start()
    asked = [Asked(engine, 5 + i, max_tokens=40) for i in range(6)]
    batcher.submit([one.job for one in asked])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_until(lambda: batcher.state == "closing")
    with pytest.raises(ClosingError):
        batcher.submit([Asked(engine, 5).job])
    closing.join(20)
    assert all(one.is_done for one in asked) and len({one.text for one in asked}) > 1


def test_when_the_thread_ends_by_a_fault_all_are_told_and_no_more_is_taken(engine, batcher, monkeypatch, caplog):
    """A GPU that is lost fails the forward pass, and what should recover from that."""
    asked = [Asked(engine, 5 + i) for i in range(6)]

    def fail(*_):
        raise RuntimeError("the device is gone")

    engine.before = fail
    monkeypatch.setattr(engine, "new_batch", fail)
    batcher.submit([one.job for one in asked])
    batcher.start()
    wait_until(lambda: batcher.state == "failed")
    wait_until(lambda: all(one.is_done for one in asked))
    assert [one.updates for one in asked] == [[Update(fault="internal")]] * 6
    assert batcher.counts == (0, 0) and "the device is gone" in caplog.text
    with pytest.raises(DeadError):
        batcher.submit([Asked(engine, 5).job])
