"""Writes a .safetensors file one piece after the other, and hashes it on the way: what is written is not held."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from qhybrid.base.safetensors_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """A new .safetensors file. Use it in a `with` statement; the file is whole and on the disk after it.

    Args:
        file: a file of that name is replaced, a link not followed.
        tensors: all that will be written, in this order.

    Raises:
        OSError: the disk is full or fails.
    """

    def __init__(self, file: Path, tensors: Sequence[TensorPlan]) -> None:
        self._header = _header(tensors)
        self.num_bytes = len(self._header) + sum(tensor.num_bytes for tensor in tensors)
        self._written = 0
        self._hash = hashlib.sha256()
        file.unlink(missing_ok=True)
        self._file = open(file, "wb")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        try:
            self._write(self._header)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error_type is None:
                assert self._written == self.num_bytes, (self._written, self.num_bytes)
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, values: Tensor) -> None:
        """Append values on the CPU, in the dtype that was planned."""
        self._write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._written += len(data)

    @property
    def sha256(self) -> str:
        """Of all that was written, in hex."""
        return self._hash.hexdigest()


def _header(tensors: Sequence[TensorPlan]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}  # older transformers refuse files without
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        content[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text
