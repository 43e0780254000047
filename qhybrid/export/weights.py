"""Single weights of a base model, as training saw them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qhybrid.base.weights import ModuleWeights
from qhybrid.export.merged.rows import merged_weight
from qhybrid.recipe.schema import QuantizationSection


class BaseWeights(ModuleWeights):
    """The weights of linear modules by the modules' names. Use it in a `with` statement.

    Args:
        folder: the base model's folder.
        dtype: what they are cast to first. quantization: and what they go through then.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, quantization: QuantizationSection) -> None:
        super().__init__(folder)
        self._dtype, self._quantization = dtype, quantization

    def __call__(self, module: str) -> Tensor:
        """The weight (out, in) of `module`.

        Raises:
            ModelError: the model lacks it, or its file is damaged.
        """
        return merged_weight(
            super().__call__(module),
            None,
            quantized=self._quantization.method == "nf4",
            double_quant=self._quantization.double_quant,
            dtype=self._dtype,
            out_dtype=self._dtype,
        )
