"""Modules in groups whose statistics fit into memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def in_groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names of `sizes` (bytes) in order, in groups of at most `limit` bytes; one that is larger is a group."""
    group: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if group and taken + size > limit:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group
