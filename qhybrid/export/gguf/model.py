"""Writes a merged Hugging Face folder as a GGUF file for llama.cpp, one tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qhybrid.architecture.spec import read_config
from qhybrid.base.locate import refuse_links_out, weight_files
from qhybrid.base.safetensors_reader import SafetensorsReader, TensorEntry
from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import ExportError, ModelError
from qhybrid.export.gguf.hyperparameters import add_hyperparameters, notes_on, rope_divisors
from qhybrid.export.gguf.names import GgufNames
from qhybrid.export.gguf.tokenizer import add_tokenizer
from qhybrid.recipe.schema import ModelSection

GgufDtype = Literal["f32", "f16", "bf16"]
_Kind = tuple[torch.dtype, gguf.GGMLQuantizationType, gguf.LlamaFileType]
KINDS: dict[str, _Kind] = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Part:
    """One tensor of the file: its name, its shape, and how its values are had when they are written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_gguf_model(
    folder: Path,
    file: Path,
    *,
    dtype: GgufDtype = "f16",
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write the model and the tokenizer of a Hugging Face folder as one GGUF file.

    Weights of two dimensions get `dtype`; norms and biases are fp32, as llama.cpp computes with them. Memory holds
    one tensor. On an exception no file is left.

    Args:
        folder: config.json, safetensors weights, tokenizer.
        file: in a folder that exists; a file of that name is replaced.
        name: of the model, for people; the file's without its ending when left out. No path gets into the file.

    Returns:
        Notes for the user: where llama.cpp will do otherwise than transformers.

    Raises:
        ExportError: a family, a setting, a tokenizer or values that llama.cpp is not known to take as they are.
        ModelError: the folder's files cannot be read, or do not belong together.
        OSError: the disk is full or fails.
    """
    refuse_links_out(folder)
    names = GgufNames(read_config(folder / "config.json"))
    tokenizer = load_tokenizer(ModelSection.model_validate({"path": str(folder)}))
    with ExitStack() as stack:
        readers = [stack.enter_context(SafetensorsReader(path)) for path in weight_files(folder)]
        parts = _parts(names, readers)
        with writing(file, names.family.name) as writer:
            writer.add_type(gguf.GGUFType.MODEL)
            add_name(writer, name or file.stem)
            writer.add_file_type(KINDS[dtype][2])
            notes = _add_metadata(writer, names, tokenizer, folder)
            for part in parts:
                announce(writer, part.name, part.shape, _kind(part, dtype))
            begin_tensors(writer)
            for done, part in enumerate(parts):
                writer.write_tensor_data(as_array(part.read(), _kind(part, dtype), part.name))
                progress(done + 1, len(parts))
    return notes


def require_known_to_llama_cpp(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[str]:
    """Refuse, before weights are merged, what `write_gguf_model` would: of the configuration and the tokenizer.

    Args:
        config: what config.json says.
        folder: of the base model; its generation_config.json may name further end tokens.

    Returns:
        The notes of `write_gguf_model`.

    Raises:
        ExportError, ModelError: as `write_gguf_model`.
    """
    names = GgufNames(config)
    return _add_metadata(gguf.GGUFWriter(None, names.family.name), names, tokenizer, folder)


def _add_metadata(
    writer: gguf.GGUFWriter, names: GgufNames, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[str]:
    add_hyperparameters(writer, names)
    return notes_on(names) + add_tokenizer(writer, tokenizer, folder=folder, num_rows=names.config.vocab_size)


def _kind(part: _Part, dtype: GgufDtype) -> _Kind:
    return KINDS["f32" if len(part.shape) == 1 else dtype]


def _parts(names: GgufNames, readers: list[SafetensorsReader]) -> list[_Part]:
    """Every tensor of the file, in the order of the safetensors files."""
    parts: dict[str, _Part] = {}
    for reader in readers:
        for entry in reader:
            if entry.name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints carry
                continue
            if entry.name == "lm_head.weight" and names.config.tie_word_embeddings:
                continue  # llama.cpp takes the embeddings where there is no output
            target = names.of(entry.name)
            if target is None or target in parts:
                raise ModelError(f"{reader.path} has {entry.name}, for which the model has no place")
            parts[target] = _Part(target, entry.shape, _reading(names, reader, entry))
    _require_whole(names, parts)
    divisors = rope_divisors(names)
    if divisors is not None:
        parts[_ROPE_DIVISORS] = _Part(_ROPE_DIVISORS, tuple(divisors.shape), lambda: divisors)
    return list(parts.values())


def _reading(names: GgufNames, reader: SafetensorsReader, entry: TensorEntry) -> Callable[[], Tensor]:
    def read() -> Tensor:
        value = names.reordered(entry.name, reader.read(entry.name))
        if names.family.norm_offset and entry.name.endswith("norm.weight"):
            return value.float() + names.family.norm_offset
        return value

    return read


def _require_whole(names: GgufNames, parts: dict[str, _Part]) -> None:
    wanted = {"token_embd.weight", "output_norm.weight"}
    if not names.config.tie_word_embeddings:
        wanted.add("output.weight")
    first = {part.split(".", 2)[2] for part in parts if part.startswith("blk.0.")}
    wanted |= {f"blk.{layer}.{part}" for layer in range(names.config.num_hidden_layers) for part in first}
    lacking = sorted(wanted - parts.keys())
    if lacking or not first:
        raise ModelError(
            f"the weights lack {lacking[0] if lacking else 'all layers'} (llama.cpp's name)",
            hint="copy or merge the model again: its files do not belong together",
        )
    rows, width = parts["token_embd.weight"].shape
    if (rows, width) != (names.config.vocab_size, names.config.hidden_size):
        raise ModelError(
            f"the embeddings are {rows}×{width}, config.json says "
            f"{names.config.vocab_size}×{names.config.hidden_size}",
            hint="copy or merge the model again: its files do not belong together",
        )


@contextlib.contextmanager
def writing(file: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer of `file`; if the block does not end normally, no file is left."""
    writer = gguf.GGUFWriter(file, architecture)
    try:
        yield writer
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):  # closing writes what is left, which fails again on a full disk
            writer.close()
        file.unlink(missing_ok=True)
        raise


def add_name(writer: gguf.GGUFWriter, name: str) -> None:
    """The model's name. llama.cpp takes a name with "phi3" for a reason to treat special tokens as Phi-3's."""
    if not any(word in name.lower() for word in ("phi3", "phi-3", "modern-bert")):
        writer.add_name(name)


def announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: _Kind) -> None:
    """Tell of a tensor that is written later."""
    dtype, ggml_type, _ = kind
    # numpy has no bfloat16; the type that counts is the last argument.
    stand_in = np.dtype(np.float32 if dtype == torch.float32 else np.float16)
    writer.add_tensor_info(name, shape, stand_in, math.prod(shape) * dtype.itemsize, raw_dtype=ggml_type)


def begin_tensors(writer: gguf.GGUFWriter) -> None:
    """Write everything before the tensors' values."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def as_array(value: Tensor, kind: _Kind, name: str) -> np.ndarray:
    """`value` in the dtype of the file.

    Raises:
        ExportError: values that the dtype does not hold.
    """
    cast = value.to(kind[0]).contiguous()
    if not _is_finite(cast):
        was_finite = _is_finite(value)
        raise ExportError(
            f"{name} holds values that are {'too large for 16-bit floats' if was_finite else 'not finite'}",
            hint="write bf16 or f32" if was_finite else "what it was made from is damaged: make it again",
        )
    return cast.view(torch.int16).numpy() if cast.dtype == torch.bfloat16 else cast.numpy()


def _is_finite(value: Tensor) -> bool:
    # Unlike isfinite, this takes no memory; what is not a number comes through as such.
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(value))
