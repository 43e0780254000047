"""An adapter as plain LoRA and DoRA factors, without a model: what every kind of band comes down to.

LoRA: W + s·B·A. DoRA: m ⊙ (W + s·B·A) / ||W + s·B·A||, with the norm along each output row. W is the whole weight
of the base: PiSSA, trained on W − s·B0·A0, is here A' = [A; A0] and B' = [B, −B0], and s·B'·A' the same change. So
whoever knows nothing of PiSSA is right; loaders that know it take s·B0·A0 out of the base again, and use `native`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qhybrid.adapters.adalora import lora_factors
from qhybrid.adapters.info import AdapterInfo
from qhybrid.architecture.layout import Layout
from qhybrid.base.principal import PrincipalPart
from qhybrid.errors import AdapterError
from qhybrid.recipe.band import PISSA

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class PlainModule:
    """The adapter of one module, as peft stores it.

    Attributes:
        num_principal: of PiSSA the number of last terms, which are −s·B0·A0: what training had taken out of the
            base weight. Else 0.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float
    magnitude: Tensor | None = None  # (out,), DoRA only
    num_principal: int = 0

    @property
    def principal(self) -> PrincipalPart | None:
        """What training had taken out of the base weight."""
        k = self.num_principal
        return PrincipalPart(self.a[-k:], -self.b[:, -k:], self.scaling) if k else None

    @property
    def native(self) -> PlainModule:
        """A and B as they were trained: of PiSSA for the base weight without its principal part."""
        k = self.num_principal
        return dataclasses.replace(self, a=self.a[:-k], b=self.b[:, :-k], num_principal=0) if k else self

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as the weight's."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """s·B·A (out, in) in fp32; of DoRA what is inside the norm."""
        return self.scaling * (self.b.float() @ self.a.float())


@dataclasses.dataclass(frozen=True)
class PlainAdapter:
    """The modules that an adapter changes, and the base model that it belongs to.

    Attributes:
        base_minus: for PiSSA of peft, whose base is what is left of the model without its principal part: the
            settings with which that part is computed again. None for all others; qhybrid's own knows the part.
    """

    modules: tuple[PlainModule, ...]
    info: AdapterInfo
    source: Path
    base_minus: str | None = None

    def __iter__(self) -> Iterator[PlainModule]:
        return iter(self.modules)

    @property
    def lora(self) -> tuple[PlainModule, ...]:
        """The modules without magnitudes."""
        return tuple(module for module in self.modules if module.magnitude is None)

    @property
    def dora(self) -> tuple[PlainModule, ...]:
        """The modules with magnitudes."""
        return tuple(module for module in self.modules if module.magnitude is not None)

    @property
    def principal_parts(self) -> dict[str, PrincipalPart]:
        """What training had taken out of the base, by the modules' names; empty where nothing is PiSSA."""
        return principal_parts_of(self.modules)

    @property
    def on_whole_base(self) -> PlainAdapter:
        """The same adapter for the whole base, PiSSA too."""
        return dataclasses.replace(self, modules=on_whole_base(self.modules))

    @property
    def num_bytes(self) -> int:
        """Of all factors and magnitudes."""
        parts = (part for m in self.modules for part in (m.a, m.b, m.magnitude) if part is not None)
        return sum(part.numel() * part.element_size() for part in parts)


def plain_modules(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[PlainModule, ...]:
    """Every module in plain form: LoRA as it is, AdaLoRA folded into LoRA exactly, DoRA with its magnitudes.

    AdaLoRA modules whose rank became 0 are left out: they add nothing.

    Args:
        tensors: by the names of `adapters.folder.trained_tensors` and `principal_tensors`, all there.
    """
    found = []
    for row in layout:
        a, b = (tensors[f"{row.module}.lora_{part}"].detach() for part in "AB")
        if row.kind == "adalora":
            a, b = lora_factors(a, b, tensors[f"{row.module}.lora_lambda"].detach(), row.scaling)
            if a.shape[0]:
                found.append(PlainModule(row.module, a, b, 1.0))
        else:
            magnitude = tensors[f"{row.module}.lora_magnitude"].detach() if row.kind == "dora" else None
            num_principal = 0
            if row.init == PISSA:
                a0, b0 = (tensors[f"{row.module}.lora_{part}0"].to(a.device) for part in "AB")
                a, b, num_principal = torch.cat([a, a0]), torch.cat([b, -b0], dim=1), len(a0)
            found.append(PlainModule(row.module, a, b, row.scaling, magnitude, num_principal))
    return tuple(found)


def principal_parts_of(modules: Iterable[PlainModule]) -> dict[str, PrincipalPart]:
    """What training had taken out of the base, by the modules' names."""
    return {module.module: part for module in modules if (part := module.principal) is not None}


def on_whole_base(modules: Iterable[PlainModule]) -> tuple[PlainModule, ...]:
    """The same modules for the whole base, PiSSA too: nothing says any more what training had taken out."""
    return tuple(dataclasses.replace(module, num_principal=0) for module in modules)


def require_finite(modules: tuple[PlainModule, ...], where: str) -> None:
    """Refuse an adapter with values that are not finite, or not floats of at least 16 bits.

    Raises:
        AdapterError: with the module and the matrix.
    """
    for module in modules:
        for name, part in (("A", module.a), ("B", module.b), ("the magnitudes", module.magnitude)):
            if part is None:
                continue
            if part.dtype not in _FLOATS:
                raise AdapterError(
                    f"{name} of {module.module} is stored as {str(part.dtype).removeprefix('torch.')}",
                    where=where,
                    hint="float32, float16 and bfloat16 are read",
                )
            if not torch.isfinite(part).all():
                raise AdapterError(
                    f"{name} of {module.module} holds values that are not finite",
                    where=where,
                    hint="take an earlier checkpoint, or train again with a lower learning rate",
                )


def require_untouched_base(adapter: PlainAdapter) -> None:
    """Refuse PiSSA of peft, which runs on what is left of the base model and does not say what was taken out.

    Raises:
        AdapterError: with what to do.
    """
    if adapter.base_minus is not None:
        raise AdapterError(
            f"{adapter.source} is PiSSA, whose base is not the model as it is",
            hint="make LoRA of it first: qhybrid export ADAPTER OUT --to peft --base MODEL",
        )
