"""The replayed caching allocator: cases worked out by hand from torch's constants, and what must always hold."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhybrid.simulation.allocator import Block, CachingAllocator, replay
from qhybrid.simulation.tracker import Timeline

MIB = 2**20


def timeline_of(*changes: int) -> Timeline:
    """n > 0 allocates n bytes; -i releases the i-th allocation, counted from 1."""
    sizes: list[int] = []
    timeline = Timeline()
    for change in changes:
        if change > 0:
            timeline.events.append((len(sizes), change))
            sizes.append(change)
        else:
            timeline.events.append((-change - 1, -sizes[-change - 1]))
    return timeline


# (requests, reserved, allocated), each worked out from kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc,
# kLargeBuffer and kRoundLarge.
FRESH = {
    "one byte is a block of 512 in a segment of 2 MiB": ([1], 2 * MIB, 512),
    "1 MiB is small: two share a segment": ([MIB, MIB], 2 * MIB, 2 * MIB),
    "the third needs a segment of its own": ([MIB, MIB, MIB], 4 * MIB, 3 * MIB),
    "a byte more than 1 MiB is large": ([MIB + 1], 20 * MIB, MIB + 512),
    "three of 6 MiB share 20 MiB": ([6 * MIB] * 3, 20 * MIB, 18 * MIB),
    "from 10 MiB on a segment of its own size": ([10 * MIB], 10 * MIB, 10 * MIB),
    "rounded up to 2 MiB, the rest of more than 1 MiB split off": ([10 * MIB + 1], 12 * MIB, 10 * MIB + 512),
    "a rest of 1 MiB stays with the block": ([11 * MIB], 12 * MIB, 12 * MIB),
    "so it does in a shared segment": ([19 * MIB // 2, 19 * MIB // 2], 20 * MIB, 20 * MIB),
}


@pytest.mark.parametrize(("requests", "reserved", "allocated"), FRESH.values(), ids=FRESH)
def test_fresh_allocations(requests: list[int], reserved: int, allocated: int) -> None:
    found = replay(timeline_of(*requests))
    assert (found.reserved_bytes, found.allocated_bytes, found.failed_at) == (reserved, allocated, None)


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    """Of 32, 14 and 12 MiB, all free, 12 MiB get the last one: nothing more is reserved, and the 14 stay whole."""
    before = [32 * MIB, 14 * MIB, 12 * MIB, -1, -2, -3]
    assert replay(timeline_of(*before, 12 * MIB, 14 * MIB, 32 * MIB)).reserved_bytes == 58 * MIB
    assert replay(timeline_of(*before, 32 * MIB, 12 * MIB, 14 * MIB, 12 * MIB)).reserved_bytes == 70 * MIB


def test_of_two_free_blocks_of_one_size_the_lower_address_is_taken() -> None:
    allocator = CachingAllocator()
    low, high = (allocator.allocate(16 * MIB) for _ in range(2))
    assert low and high and low.address < high.address
    allocator.free(high)
    allocator.free(low)
    again = allocator.allocate(16 * MIB)
    assert again and again.address == low.address


def test_free_neighbours_become_one_block() -> None:
    """Four of 5 MiB fill a segment; two neighbours that were released make room for 10 MiB."""
    assert replay(timeline_of(*[5 * MIB] * 4, -2, -3, 9 * MIB)).reserved_bytes == 20 * MIB


def test_fragments_cost_a_new_segment() -> None:
    """As before, but the two are no neighbours: 10 MiB are free, and 9 MiB fit nowhere."""
    found = replay(timeline_of(*[5 * MIB] * 4, -1, -3, 9 * MIB))
    assert found.reserved_bytes == 40 * MIB
    assert found.allocated_bytes == 20 * MIB


def test_small_and_large_requests_do_not_share_segments() -> None:
    assert replay(timeline_of(12 * MIB, -1, 4096)).reserved_bytes == 14 * MIB


def test_expandable_segments_grow_by_pages_and_split_every_rest() -> None:
    """11 MiB take one page of 20 MiB and 11 MiB of it; 12 MiB more need the second page."""
    one = replay(timeline_of(11 * MIB), expandable_segments=True)
    assert (one.reserved_bytes, one.allocated_bytes) == (20 * MIB, 11 * MIB)
    both = replay(timeline_of(11 * MIB, 12 * MIB), expandable_segments=True)
    assert (both.reserved_bytes, both.allocated_bytes) == (40 * MIB, 23 * MIB)
    small = replay(timeline_of(4096), expandable_segments=True)
    assert (small.reserved_bytes, small.allocated_bytes) == (2 * MIB, 4096)


def test_expandable_segments_have_no_gaps_between_them() -> None:
    """Where 16 + 16 MiB were, 32 MiB find room, which two segments of 16 MiB do not give."""
    changes = 16 * MIB, 16 * MIB, -1, -2, 32 * MIB
    assert replay(timeline_of(*changes)).reserved_bytes == 64 * MIB
    assert replay(timeline_of(*changes), expandable_segments=True).reserved_bytes == 40 * MIB


def test_a_limit_releases_what_is_cached_whole() -> None:
    """16 MiB are cached and 24 are asked for: within 32 MiB that works only if the 16 go back first."""
    found = replay(timeline_of(16 * MIB, -1, 24 * MIB), limit=32 * MIB)
    assert (found.reserved_bytes, found.failed_at) == (24 * MIB, None)


def test_out_of_memory_names_the_event() -> None:
    """The segment of 16 MiB is in part in use, so that it cannot go back."""
    found = replay(timeline_of(8 * MIB, 8 * MIB, -1, 24 * MIB, -2), limit=32 * MIB)
    assert (found.reserved_bytes, found.allocated_bytes, found.failed_at) == (20 * MIB, 16 * MIB, 3)


def test_expandable_segments_give_back_single_pages() -> None:
    """Of three pages the middle one is free: within 60 MiB it makes way for the small pool, and comes back."""
    allocator = CachingAllocator(limit=60 * MIB, expandable_segments=True)
    pages = [allocator.allocate(20 * MIB) for _ in range(3)]
    assert all(pages)
    middle = pages[1]
    assert middle
    allocator.free(middle)
    assert allocator.reserved == 60 * MIB
    small = allocator.allocate(MIB)
    assert small and allocator.reserved == 42 * MIB
    allocator.free(small)
    again = allocator.allocate(20 * MIB)
    assert again and again.address == middle.address and allocator.reserved == 60 * MIB


steps = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from([1, 511, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB, 10 * MIB - 1, 10 * MIB, 11 * MIB, 25 * MIB])
        | st.integers(1, 40 * MIB),
    ),
    max_size=120,
)


@given(steps, st.booleans(), st.none() | st.integers(20 * MIB, 400 * MIB))
@settings(deadline=None)
def test_what_always_holds(steps: list[tuple[bool, int]], expandable: bool, limit: int | None) -> None:
    allocator = CachingAllocator(limit=limit, expandable_segments=expandable)
    alive: list[tuple[Block, int]] = []
    for releases, number in steps:
        if releases and alive:
            allocator.free(alive.pop(number % len(alive))[0])
        else:
            block = allocator.allocate(number)
            if block is not None:
                alive.append((block, number))
        assert allocator.reserved >= allocator.allocated == sum(block.size for block, _ in alive)
        assert limit is None or allocator.reserved <= limit
        assert all(block.size >= size and block.size % 512 == 0 for block, size in alive)
        places = sorted((block.address, block.size) for block, _ in alive)
        assert all(low + size <= high for (low, size), (high, _) in itertools.pairwise(places))
    for block, _ in alive:
        allocator.free(block)
    assert allocator.allocated == 0
    if alive and limit is None:
        reserved = allocator.reserved
        for size in sorted({size for _, size in alive}):
            again = allocator.allocate(size)
            assert again is not None
            allocator.free(again)
        assert allocator.reserved == reserved, "one block at a time fits where all of them had been"


def test_a_long_timeline_takes_seconds() -> None:
    rng = random.Random(0)
    timeline = Timeline()
    alive: list[tuple[int, int]] = []
    sizes = [512 * rng.randint(1, 60_000) for _ in range(200)]
    for number in range(50_000):
        size = rng.choice(sizes)
        timeline.events.append((number, size))
        alive.append((number, size))
        while len(alive) > 400 or (number == 49_999 and alive):
            gone, size = alive.pop(rng.randrange(len(alive)))
            timeline.events.append((gone, -size))
    start = time.perf_counter()
    found = replay(timeline)
    assert time.perf_counter() - start < 20  # about one second on a quiet machine
    assert len(timeline.events) == 100_000
    assert found.reserved_bytes >= timeline.peak()[0]
