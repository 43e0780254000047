"""The order of rows: the same for every split of a step, each row once an epoch."""

from __future__ import annotations

from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from qhybrid.training.order import EpochOrder, WithBlankRow


def steps_of(num_rows: int, processes: int, batch: int, accumulation: int, epoch: int, **more) -> list[list[int]]:
    """The rows of every optimizer step of an epoch, as the processes together take them; blank rows left out."""
    order = EpochOrder(num_rows, seed=7, fill_to=processes * batch, **{"strategy": "random", **more})
    order.set_epoch(epoch)
    rows = list(order)
    assert len(rows) == len(order)
    order.set_epoch(epoch)
    sampler = BatchSampler(order, batch, drop_last=False)
    shards = []
    for process in range(processes):
        order.set_epoch(epoch)
        shards.append(list(BatchSamplerShard(sampler, processes, process)))
    assert len({len(shard) for shard in shards}) == 1
    steps = []
    for begin in range(0, len(shards[0]), accumulation):
        taken = [row for shard in shards for micro in shard[begin : begin + accumulation] for row in micro]
        steps.append(sorted(row for row in taken if row < num_rows))
    return steps


@given(
    num_rows=st.integers(1, 60),
    epoch=st.integers(0, 3),
    split=st.sampled_from([(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 1, 8), (8, 1, 1)]),
    strategy=st.sampled_from(["random", "sequential", "group_by_length"]),
)
def test_every_split_of_a_step_takes_the_same_rows(num_rows, epoch, split, strategy):
    more = {"strategy": strategy, "step_rows": 8, "lengths": [(i * 37) % 11 for i in range(num_rows)]}
    expected = steps_of(num_rows, 1, 8, 1, epoch, **more)
    assert steps_of(num_rows, *split, epoch, **more) == expected
    assert sorted(row for step in expected for row in step) == list(range(num_rows))


def test_the_order_is_that_of_accelerates_sampler():
    """So runs of one process are what they would be in plain trl."""
    theirs = SeedableRandomSampler(range(50), data_seed=3)
    ours = EpochOrder(50, strategy="random", seed=3, fill_to=1)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_the_blank_row_has_no_label():
    rows = Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8]], "labels": [[-100, 6, 7], [8]], "seq_lengths": [[3], [1]]}
    )
    filled = WithBlankRow(rows)
    assert len(filled) == 3 and filled[1] == rows[1]
    assert filled[2] == {"input_ids": [5], "labels": [-100], "seq_lengths": [1]}
    assert filled.__getitems__([1, 2, 2]) == [rows[1], filled[2], filled[2]]
    assert filled.__getitems__([2]) == [filled[2]]
