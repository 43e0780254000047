"""What PiSSA's bands of a run take out of the base model: computed once, then always what the checkpoint holds."""

from __future__ import annotations

import torch
from rich.console import Console

from qhybrid.adapters.folder import read_principal_parts
from qhybrid.adapters.pissa import principal_parts
from qhybrid.architecture.layout import Layout
from qhybrid.base.locate import model_folder
from qhybrid.base.principal import Parts
from qhybrid.recipe.band import PISSA
from qhybrid.recipe.schema import Recipe
from qhybrid.training.run import Run


def parts_of_run(recipe: Recipe, layout: Layout, run: Run, device: torch.device, console: Console) -> Parts:
    """The principal parts, by the names of their modules; empty where no band is PiSSA.

    Args:
        device: where to decompose the weights.

    Raises:
        AdapterError: the checkpoint is damaged.
        ModelError: as `principal_parts`.
    """
    if not any(row.init == PISSA for row in layout):
        return {}
    if run.resume_from is not None:
        return read_principal_parts(run.resume_from, layout)
    with console.status("computing PiSSA's principal parts"):
        return principal_parts(
            layout,
            model_folder(recipe.model),
            dtype=getattr(torch, recipe.model.dtype),
            adapter_dtype=getattr(torch, recipe.adapter_dtype),
            device=device,
        )
