"""A base model's files, open: every tensor matched to the model and to the adapter before any is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qhybrid.adapters.plain import PlainAdapter, PlainModule
from qhybrid.architecture.spec import read_config
from qhybrid.base.load import build_shell, match_tensors, read_model_config
from qhybrid.base.locate import model_folder, weight_files
from qhybrid.base.safetensors_reader import SafetensorsReader, TensorEntry
from qhybrid.errors import AdapterError, ModelError
from qhybrid.export.merged.rows import Onto
from qhybrid.recipe.schema import ModelSection, QuantizationSection

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of a base model.

    Attributes:
        name: in the model.
        entry: where it lies in its file.
        module: the adapter of this weight, if it has one.
        quantized: whether the weight is to be seen through NF4.
    """

    name: str
    entry: TensorEntry
    module: PlainModule | None
    quantized: bool


@dataclass(frozen=True)
class BaseShard:
    """One open file of a base model. It may be read by several threads at a time."""

    path: Path
    tensors: tuple[BaseTensor, ...]  # in the order of their bytes
    descriptor: int

    def rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, in the file's dtype and memory of their own.

        Raises:
            ModelError: the file became shorter since it was opened, or cannot be read.
        """
        row_bytes = (entry.end - entry.begin) // entry.shape[0]
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        memory, position = memoryview(buffer.numpy()), entry.begin + start * row_bytes
        try:
            while memory:  # one call reads at most 2 GiB
                count = os.preadv(self.descriptor, [memory], position)
                if not count:
                    raise ModelError(f"{self.path} ends inside the tensor {entry.name}", hint="copy it again")
                memory, position = memory[count:], position + count
        except OSError as error:
            raise ModelError(f"cannot read {entry.name} from {self.path}: {error.strerror or error}") from error
        return buffer.view(entry.dtype).view(stop - start, *entry.shape[1:])


@dataclass(frozen=True)
class BaseFiles:
    """An open base model.

    Attributes:
        raw_config: its config.json. architecture: the class that stock transformers loads the result with.
    """

    folder: Path
    raw_config: dict[str, Any]
    architecture: str
    shards: tuple[BaseShard, ...]


@contextlib.contextmanager
def open_base(
    section: ModelSection, quantization: QuantizationSection, adapter: PlainAdapter, onto: Onto
) -> Iterator[BaseFiles]:
    """Open all weight files of a base model, and check them and the adapter against its config.json.

    Raises:
        ModelError: as `load_base`; or the model is stored quantised.
        AdapterError: the adapter changes modules that the model lacks, or that have another shape or are tied.
    """
    folder = model_folder(section)
    config = read_model_config(folder, section)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{section.path} is stored quantised, so there are no weights to merge into",
            hint="--base names the 16-bit model that it was made from",
        )
    shell = _shell(config, section, quantization, onto)
    modules = modules_by_weight(shell, adapter)
    quantized = quantized_weights(shell)
    with contextlib.ExitStack() as stack:
        files = weight_files(folder)
        readers = [stack.enter_context(SafetensorsReader(file)) for file in files]
        targets, _ = match_tensors(shell, readers, folder)
        shards = []
        for reader in readers:
            tensors = [
                BaseTensor(name, entry, modules.get(name), name in quantized)
                for entry in reader
                if (name := targets.get(entry.name)) is not None
            ]
            descriptor = os.open(reader.path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            shards.append(BaseShard(reader.path, tuple(tensors), descriptor))
        yield BaseFiles(folder, read_config(folder / "config.json"), type(shell).__name__, tuple(shards))


def shell_like(
    model: PreTrainedModel, section: ModelSection, quantization: QuantizationSection, onto: Onto
) -> PreTrainedModel:
    """The model that training had, without values, of a model that was loaded without quantisation."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = getattr(torch, section.dtype)
    return _shell(config, section, quantization, onto)


def _shell(
    config: PreTrainedConfig, section: ModelSection, quantization: QuantizationSection, onto: Onto
) -> PreTrainedModel:
    method = "nf4" if onto == "nf4" else "none"
    config._attn_implementation = "eager"  # merging needs no attention, so none has to be installed for it
    shell, _ = build_shell(
        config, section, quantization.model_copy(update={"method": method}), torch.device("cpu")
    )
    return shell


def quantized_weights(shell: nn.Module) -> frozenset[str]:
    """The names of the weights that are NF4 in `shell`."""
    return frozenset(f"{name}.weight" for name, module in shell.named_modules() if isinstance(module, Linear4bit))


def modules_by_weight(shell: PreTrainedModel, adapter: PlainAdapter) -> dict[str, PlainModule]:
    """The adapter's modules by the name of the weight that each changes.

    Raises:
        AdapterError: `shell` lacks some of them, or has them in another shape, or shares their weight.
    """
    linears = {name: module for name, module in shell.named_modules() if isinstance(module, nn.Linear)}
    lacking = [module.module for module in adapter if module.module not in linears]
    if lacking:
        raise AdapterError(
            f"the base model has no linear module {_some(lacking)} ({len(lacking)} of the adapter's "
            f"{len(adapter.modules)} are missing)",
            where=str(adapter.source),
            hint="the adapter belongs to another base model, which --base can name",
        )
    tied = {*shell.all_tied_weights_keys, *shell.all_tied_weights_keys.values()}
    for module in adapter:
        linear = linears[module.module]
        own = (linear.out_features, linear.in_features)
        if own != module.shape:
            raise AdapterError(
                f"{module.module} is {own[0]}×{own[1]} in the base model and {module.shape[0]}×{module.shape[1]} "
                "in the adapter",
                where=str(adapter.source),
                hint="the adapter belongs to another base model, which --base can name",
            )
        if f"{module.module}.weight" in tied:
            raise AdapterError(
                f"{module.module} shares its weight with the embedding, which the adapter does not change",
                where=str(adapter.source),
                hint="this adapter cannot be merged; use it beside the model",
            )
    return {f"{module.module}.weight": module for module in adapter}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, …" if len(names) > _NAMES_SHOWN else shown
