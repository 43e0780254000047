"""One shard of the merged model: threads read, dequantise and merge pieces of 1 MB, one writes and hashes.

In memory are those pieces and, onto "nf4", the one weight that is being quantised.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qhybrid.export.merged.base_tensors import BaseShard, BaseTensor
from qhybrid.export.merged.rows import Onto, Rows, chunks, merged_rows, require_finite, rows_of, widened
from qhybrid.export.merged.shard_writer import ShardWriter, TensorPlan
from qhybrid.recipe.schema import Dtype

_MOST_THREADS = 8  # beyond that the one that writes and hashes decides


@dataclass(frozen=True)
class MergeJob:
    """How the weights are merged.

    Attributes:
        dtype: of the training. out_dtype: of the result.
        device: where weights are quantised.
    """

    onto: Onto
    double_quant: bool
    dtype: Dtype
    out_dtype: Dtype
    device: torch.device

    def settings(self) -> dict[str, str | bool | None]:
        """All but the device, ready for JSON."""
        double_quant = self.double_quant if self.onto == "nf4" else None
        return {
            "onto": self.onto,
            "double_quant": double_quant,
            "training_dtype": self.dtype,
            "dtype": self.out_dtype,
        }


def plan_shard(shard: BaseShard, job: MergeJob) -> list[TensorPlan]:
    """What is to be written of a shard of the base."""
    dtype = getattr(torch, job.out_dtype)
    return [TensorPlan(tensor.name, dtype, tensor.entry.shape) for tensor in shard.tensors]


def write_shard(
    file: Path, shard: BaseShard, plan: list[TensorPlan], job: MergeJob, progress: Callable[[int], None]
) -> dict[str, int | str]:
    """Merge one shard of the base into `file`; its size, its hash, and what changed in it.

    Args:
        progress: told how many bytes of weights are written.

    Raises:
        ModelError, ExportError: as `require_finite`, or the base's file cannot be read.
        OSError: the disk is full or fails.
    """
    done, changed = 0, Counter[str]()
    with ShardWriter(file, plan) as writer, _pool() as (pool, ahead):
        for piece in _in_order(pool, _pieces(shard, job), ahead):
            writer.write(piece.values)
            done += piece.values.numel() * piece.values.element_size()
            changed[piece.name] += piece.changed
            progress(done)
    return {
        "bytes": writer.num_bytes,
        "sha256": writer.sha256,
        "changed_weights": len(+changed),
        "changed_values": changed.total(),
    }


class _Piece(NamedTuple):
    name: str  # of the weight
    values: Tensor
    changed: int  # how many of them are others than without the adapter


def _pieces(shard: BaseShard, job: MergeJob) -> Iterator[Callable[[], _Piece]]:
    """What gives each piece of a shard, in the order of the file. Weights are quantised on the way."""
    dtype = getattr(torch, job.out_dtype)
    for tensor in shard.tensors:
        rows = _rows(tensor, shard, job)
        module = None if tensor.module is None else widened(tensor.module)

        def piece(start: int, stop: int, tensor=tensor, rows=rows, module=module) -> _Piece:
            seen = rows(start, stop)
            merged = merged_rows(seen, start, module, dtype)
            require_finite(merged, seen, tensor.name)
            if tensor.module is not None and tensor.module.num_principal:  # `seen` is not the whole weight
                seen = shard.rows(tensor.entry, start, stop).to(getattr(torch, job.dtype))
            changed = 0 if module is None else int((merged != seen.to(dtype)).count_nonzero())
            return _Piece(tensor.name, merged, changed)

        for start, stop in chunks(tensor.entry.shape):
            yield partial(piece, start, stop)


def _rows(tensor: BaseTensor, shard: BaseShard, job: MergeJob) -> Rows:
    dtype = getattr(torch, job.dtype)
    without = None if tensor.module is None else tensor.module.principal
    if tensor.quantized:
        whole = shard.rows(tensor.entry, 0, tensor.entry.shape[0])
        return rows_of(
            whole,
            quantized=True,
            double_quant=job.double_quant,
            dtype=dtype,
            device=job.device,
            without=without,
        )

    def rows(start: int, stop: int) -> Tensor:
        seen = shard.rows(tensor.entry, start, stop).to(dtype)
        return seen if without is None else without.residual(seen, start)

    return rows


@contextlib.contextmanager
def _pool() -> Iterator[tuple[Executor, int]]:
    """Threads on which torch's operations run alone, and how many pieces are begun before the first is taken.

    torch's own threads would meet at the end of every short operation, as in `base.nf4`.
    """
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, _MOST_THREADS)
    try:
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, 2 * num_workers
    finally:
        torch.set_num_threads(num_threads)  # what the workers set counts for threads that start later


def _in_order(pool: Executor, jobs: Iterable[Callable[[], _Piece]], ahead: int) -> Iterator[_Piece]:
    """The results of `jobs` in their order; at most `ahead` are begun and not taken."""
    waiting: deque[Future[_Piece]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
