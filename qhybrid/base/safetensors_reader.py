"""Reads single tensors from a .safetensors file without mapping it, after checking the whole header.

The pages of a mapped file count as memory of the process that touched them, so a loader that maps a
checkpoint holds all of it; one that reads holds one tensor.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qhybrid.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsReader:
    """An open .safetensors file. Use it in a `with` statement, or call `close`.

    Attributes:
        path: the file.
        entries: name to TensorEntry, in the order of the bytes in the file.

    Raises:
        ModelError: on opening, when the file is missing, truncated or not a valid .safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Unbuffered: reads go straight into the tensor's own memory.
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ModelError(f"cannot open {path}: {error.strerror or error}") from error
        try:
            self.entries = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def __iter__(self) -> Iterator[TensorEntry]:
        """The entries in the order of their bytes, so that reading them all moves forward only."""
        return iter(self.entries.values())

    def read(self, name: str, *, buffer: Tensor | None = None) -> Tensor:
        """Read one tensor in the dtype and shape that the file gives it.

        Args:
            name: a key of `entries`.
            buffer: uint8 memory to read into when it is large enough; the result then shares it, and lasts
                until the buffer is used again. Without one the result has memory of its own.

        Raises:
            ModelError: the file became shorter since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        num_bytes = entry.end - entry.begin
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        memory = memoryview(buffer.numpy())[:num_bytes]
        try:
            self._file.seek(entry.begin)
            filled = 0
            while filled < num_bytes:  # one call reads at most 2 GiB
                count = self._file.readinto(memory[filled:])
                if not count:
                    raise ModelError(f"{self.path} ends inside the tensor {name}", hint=_COPY_AGAIN)
                filled += count
        except OSError as error:
            raise ModelError(f"cannot read {name} from {self.path}: {error.strerror or error}") from error
        return buffer[:num_bytes].view(entry.dtype).view(entry.shape)


_COPY_AGAIN = "the file is damaged or was not copied completely; download or copy it again"


def _read_header(file: Any, path: Path) -> dict[str, TensorEntry]:
    """Every entry of the header, checked, in byte order."""

    def fault(what: str) -> ModelError:
        return ModelError(f"{path} is not a valid .safetensors file: {what}", hint=_COPY_AGAIN)

    file_bytes = file.seek(0, 2)
    file.seek(0)
    if file_bytes < 8:
        raise fault(f"it has only {file_bytes} bytes")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise fault(f"its header claims {header_bytes} bytes, above the limit of {MAX_HEADER_BYTES}")
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise fault(f"its header claims {header_bytes} bytes, but the file has only {file_bytes}")
    try:
        header = json.loads(file.read(header_bytes).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise fault(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise fault("its header is not a JSON object")
    header.pop("__metadata__", None)

    entries = [_parse_entry(name, value, data_start, fault) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = data_start
    for entry in entries:
        if entry.end > file_bytes:
            raise fault(f"it is truncated: {entry.name} ends at byte {entry.end} of {file_bytes}")
        if entry.begin < position:
            raise fault(f"{entry.name} overlaps the tensor before it")
        if entry.begin > position:
            raise fault(f"{entry.begin - position} bytes before {entry.name} belong to no tensor")
        position = entry.end
    if position != file_bytes:
        raise fault(f"{file_bytes - position} bytes at its end belong to no tensor")
    return {entry.name: entry for entry in entries}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; json itself would keep the last of two equal names in silence."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} appears twice")
        result[name] = value
    return result


def _parse_entry(name: str, value: Any, data_start: int, fault: Any) -> TensorEntry:
    """One entry of the header, with everything checked that does not depend on the other entries."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault(f"the entry of {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fault(f"{name} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise fault(f"{name} has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"{name} has the impossible offsets {offsets!r}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise fault(f"{name} with shape {shape} of {dtype} needs {needed} bytes, but has {end - begin}")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
