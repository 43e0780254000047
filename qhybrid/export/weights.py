"""Single weights of a base model, as training saw them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from qhybrid.base.locate import weight_files
from qhybrid.base.safetensors_reader import SafetensorsReader
from qhybrid.errors import AdapterError
from qhybrid.export.merged.rows import merged_weight
from qhybrid.recipe.schema import QuantizationSection


class BaseWeights:
    """The weights of linear modules by the modules' names. Use it in a `with` statement.

    Args:
        folder: the base model's folder.
        dtype: what they are cast to first. quantization: and what they go through then.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, quantization: QuantizationSection) -> None:
        self._folder, self._dtype, self._quantization = folder, dtype, quantization

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            readers = [stack.enter_context(SafetensorsReader(file)) for file in weight_files(self._folder)]
            self._places = {entry.name: reader for reader in readers for entry in reader}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, module: str) -> Tensor:
        """The weight (out, in) of `module`.

        Raises:
            AdapterError: the model lacks it.
            ModelError: its file is damaged.
        """
        names = (f"{module}.weight", f"{module}.weight".removeprefix("model."))  # of the bare decoder
        name = next((name for name in names if name in self._places), None)
        if name is None:
            raise AdapterError(f"the base model in {self._folder} has no weight of {module}", hint="check --base")
        return merged_weight(
            self._places[name].read(name),
            None,
            quantized=self._quantization.method == "nf4",
            double_quant=self._quantization.double_quant,
            dtype=self._dtype,
            out_dtype=self._dtype,
        )
