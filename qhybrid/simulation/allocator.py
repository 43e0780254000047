"""Replays a run's allocations in a model of torch's CUDA caching allocator: the memory that they reserve.

Source: c10/cuda/CUDACachingAllocator.cpp (malloc, get_free_block, should_split, alloc_found_block, free_block,
try_merge_blocks, release_cached_blocks, try_allocate_expandable_block) and c10/core/AllocatorConfig.h of torch
2.13, with one stream, no graphs, and the default settings or expandable segments. Only where cudaMalloc puts a
segment is unknown: segments get rising addresses here, which decides between free blocks of the same size.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from qhybrid.simulation.tracker import Timeline

_MIB = 2**20
MIN_BLOCK = 512  # kMinBlockSize: sizes are rounded up to a multiple of it
SMALL_SIZE = _MIB  # kSmallSize: the largest request that the small pool serves
SMALL_SEGMENT = 2 * _MIB  # kSmallBuffer
MIN_LARGE = 10 * _MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
LARGE_SEGMENT = 20 * _MIB  # large_segment_size()
ROUND_LARGE = 2 * _MIB  # kRoundLarge: such a segment is rounded up to a multiple of it
_ADDRESS_SPACE = LARGE_SEGMENT * 2**30  # bytes, a multiple of every page: an expandable segment can always grow


@dataclass(frozen=True)
class Replay:
    """What became of a timeline, in bytes."""

    reserved_bytes: int  # torch.cuda.max_memory_reserved
    allocated_bytes: int  # torch.cuda.max_memory_allocated: it counts the rest of a block that was not split, too
    failed_at: int | None  # the event whose allocation did not fit within the limit, at which the replay ends


def replay(timeline: Timeline, *, limit: int | None = None, expandable_segments: bool = False) -> Replay:
    """Run the allocations and releases of `timeline` through the allocator, from the first event on.

    Args:
        limit: bytes that the allocator can get from the device; no limit when left out.
        expandable_segments: as in PYTORCH_CUDA_ALLOC_CONF.
    """
    allocator = CachingAllocator(limit=limit, expandable_segments=expandable_segments)
    blocks: dict[int, Block] = {}
    failed_at = None
    for index, (number, change) in enumerate(timeline.events):
        if change > 0:
            block = allocator.allocate(change)
            if block is None:
                failed_at = index
                break
            blocks[number] = block
        elif change < 0:
            allocator.free(blocks.pop(number))
    return Replay(allocator.peak_reserved, allocator.peak_allocated, failed_at)


class Block:
    """A range of addresses, with its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "is_free", "is_mapped", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int, *, is_mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.is_free = True
        self.is_mapped = is_mapped  # False: addresses of an expandable segment that no memory stands behind
        self.before: Block | None = None
        self.after: Block | None = None

    def split(self, size: int) -> Block:
        """Keep the first `size` bytes; returns the rest as a block of its own."""
        rest = Block(self.pool, self.address + size, self.size - size, is_mapped=self.is_mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def merge(self) -> None:
        """Take in the neighbours that are free and, like this one, have memory or have none."""
        for other in (self.before, self.after):
            if other is None or not other.is_free or other.is_mapped != self.is_mapped:
                continue
            self.pool.remove(other)
            if other is self.before:
                self.before, self.address = other.before, other.address
                if self.before is not None:
                    self.before.after = self
            else:
                self.after = other.after
                if self.after is not None:
                    self.after.before = self
            self.size += other.size


class _Pool:
    """The free blocks for small, or for large requests."""

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.page = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        self._smallest_rest = MIN_BLOCK if is_small or expandable else SMALL_SIZE + 1
        self._cached: list[tuple[int, int, Block]] = []  # by size, then address
        self._unmapped: list[tuple[int, int, Block]] = []  # by address
        if expandable:
            self.put(Block(self, 0 if is_small else _ADDRESS_SPACE, _ADDRESS_SPACE, is_mapped=False))

    def put(self, block: Block) -> None:
        insort(self._list_of(block), self._key(block))

    def remove(self, block: Block) -> None:
        blocks = self._list_of(block)
        del blocks[bisect_left(blocks, self._key(block))]

    def __iter__(self) -> Iterator[Block]:
        return iter([block for _, _, block in self._cached])

    def best_fit(self, size: int) -> Block | None:
        """Takes the smallest free block that is large enough. What can still grow counts as its full room."""
        blocks, index = self._cached, bisect_left(self._cached, (size,))
        if index == len(blocks):
            return None
        while index + 1 < len(blocks) and _room(blocks[index + 1][2]) < _room(blocks[index][2]):
            index += 1
        return blocks.pop(index)[2]

    def cut(self, block: Block, size: int) -> None:
        """Put back what the block has over `size`, if that is enough to be of use."""
        if block.size - size >= self._smallest_rest:
            self.put(block.split(size))

    def first_room(self, size: int) -> Block:
        """The free or unmapped block of the lowest address from which on `size` bytes can be had."""
        for _, _, block in self._unmapped:
            if block.before is not None and block.before.is_free:
                block = block.before
            room, last = block.size, block.after
            while room < size and last is not None and last.is_free:
                room, last = room + last.size, last.after
            if room >= size:
                return block
        raise AssertionError("an expandable segment ends in unmapped addresses")

    def _list_of(self, block: Block) -> list[tuple[int, int, Block]]:
        return self._cached if block.is_mapped else self._unmapped

    @staticmethod
    def _key(block: Block) -> tuple[int, int, Block]:
        return (block.size if block.is_mapped else 0, block.address, block)


def _room(block: Block) -> int:
    grows = block.after is not None and not block.after.is_mapped
    return block.size + (block.after.size if grows else 0)


class CachingAllocator:
    """torch's allocator on one device. Addresses are numbers; no memory is taken."""

    def __init__(self, *, limit: int | None = None, expandable_segments: bool = False) -> None:
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._limit = limit
        self._expandable = expandable_segments
        self._small = _Pool(is_small=True, expandable=expandable_segments)
        self._large = _Pool(is_small=False, expandable=expandable_segments)
        self._next_address = 0

    def allocate(self, num_bytes: int) -> Block | None:
        """A block of at least `num_bytes`, or None if it does not fit even after the cache was released."""
        size = _rounded(num_bytes, MIN_BLOCK)
        pool = self._small if size <= SMALL_SIZE else self._large
        block = pool.best_fit(size) or self._grow(pool, size)
        if block is None:
            self._release_cached()
            block = self._grow(pool, size)
            if block is None:
                return None
        pool.cut(block, size)
        block.is_free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Take a block back into the cache."""
        self.allocated -= block.size
        block.is_free = True
        block.merge()
        block.pool.put(block)

    def _grow(self, pool: _Pool, size: int) -> Block | None:
        if self._expandable:
            return self._expand(pool, size)
        segment = pool.page if size < MIN_LARGE else _rounded(size, ROUND_LARGE)
        if not self._reserve(segment):
            return None
        self._next_address += segment
        return Block(pool, self._next_address - segment, segment)

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """Map pages from the lowest address on at which `size` bytes can be had in a row."""
        block = pool.first_room(size)
        while not block.is_mapped or block.size < size:
            target = block.after if block.is_mapped else block
            assert target is not None, "there is enough room"
            wanted = size - block.size if block.is_mapped else size
            pages = _rounded(min(wanted, target.size), pool.page)
            if not self._reserve(pages):
                return None
            pool.remove(target)
            if pages < target.size:
                pool.put(target.split(pages))
            target.is_mapped = True
            target.merge()
            pool.put(target)
            block = target
        pool.remove(block)
        return block

    def _reserve(self, num_bytes: int) -> bool:
        if self._limit is not None and self.reserved + num_bytes > self._limit:
            return False
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _release_cached(self) -> None:
        """Give back to the device every segment, or every page, that is free as a whole."""
        for pool in (self._large, self._small):
            for block in pool:
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _unmap(self, block: Block) -> None:
        pool = block.pool
        first = _rounded(block.address, pool.page)
        last = (block.address + block.size) // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        if first > block.address:
            pages = block.split(first - block.address)
            pool.put(block)
            block = pages
        if block.address + block.size > last:
            pool.put(block.split(last - block.address))
        self.reserved -= block.size
        block.is_mapped = False
        block.merge()
        pool.put(block)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
