"""Single weights of a model folder by their modules' names, read one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from torch import Tensor

from qhybrid.base.locate import weight_files
from qhybrid.base.safetensors_reader import SafetensorsReader
from qhybrid.errors import ModelError


class ModuleWeights:
    """The weights of linear modules, as the files have them. Use it in a `with` statement.

    Args:
        folder: the base model's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            readers = [stack.enter_context(SafetensorsReader(file)) for file in weight_files(self._folder)]
            self._places = {entry.name: reader for reader in readers for entry in reader}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, module: str) -> Tensor:
        """The weight (out, in) of `module`, in memory of its own.

        Raises:
            ModelError: the model lacks it, or its file is damaged.
        """
        names = (f"{module}.weight", f"{module}.weight".removeprefix("model."))  # of the bare decoder
        name = next((name for name in names if name in self._places), None)
        if name is None:
            raise ModelError(f"the base model in {self._folder} has no weight of {module}", hint="check --base")
        return self._places[name].read(name)
