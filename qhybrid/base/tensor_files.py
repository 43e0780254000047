"""Files of tensors, written so that a full disk is an OSError, and read whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qhybrid.disk import write_bytes
from qhybrid.errors import QhybridError, RunFolderError


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, of any device and layout, as a .safetensors file; equal content gives equal bytes.

    safetensors' own save_file hides a full disk in an error of another kind, makes files that only their owner
    may read, and writes the metadata in an order of chance. For a moment there are three copies in memory.

    Raises:
        OSError: as `write_bytes`.
        RuntimeError: two of the tensors share memory.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    num_header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + num_header_bytes])
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to 8 bytes
    write_bytes(file, len(text).to_bytes(8, "little"), text, memoryview(content)[8 + num_header_bytes :])


def read_tensors(file: Path, error_class: type[QhybridError] = RunFolderError) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU, in memory of their own.

    Raises:
        error_class: the file cannot be read, or is not a .safetensors file.
    """
    try:
        return load(file.read_bytes())
    except OSError as error:
        raise error_class(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise error_class(f"{file} is not a whole .safetensors file ({error})") from error
