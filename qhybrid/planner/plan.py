"""Plan: what a recipe will cost on given hardware, by component, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec
from qhybrid.planner import constants
from qhybrid.planner.hardware import Gpu
from qhybrid.planner.holdings import base_weights, principal_bytes, unsplit_remainders
from qhybrid.planner.memory import Prediction, predict_largest
from qhybrid.planner.workload import WIDTHS, Device
from qhybrid.recipe.schema import Recipe


@dataclass(frozen=True)
class Budget:
    """What there is: bytes of VRAM, and whose."""

    vram: int | None  # None: nobody said, so there is no verdict
    gpu: Gpu | None = None
    context: int = constants.CUDA_CONTEXT_BYTES
    source: str = ""  # "--vram", "memory.vram", "RTX 4090"


BUDGET = "(budget)"  # in the place of a band's name, which has no such signs, where one budget is spread over all


@dataclass(frozen=True)
class RankCap:
    """What a band asked for, and what it got; or the budget that is spread over all bands."""

    band: str  # or BUDGET; of a task, after its name and a dot
    asked: int
    got: int

    @property
    def is_budget(self) -> bool:
        """Whether it is of all bands, of the recipe or of a task."""
        return self.band.rpartition(".")[2] == BUDGET

    @property
    def told(self) -> str:
        """The change in words."""
        if self.is_budget:
            task = self.band.rpartition(".")[0]
            whose = f" of task {task}" if task else ""
            return f"the ranks{whose} get a budget of {self.got:,} parameters instead of {self.asked:,}"
        return f"band {self.band} gets rank {self.got} instead of {self.asked}"


@dataclass(frozen=True)
class Plan:
    """The memory of one process. All sizes are bytes."""

    model: str
    device: Device
    budget: Budget
    prediction: Prediction  # of torch's allocator
    workspace: int  # of cuBLAS, from the same allocator
    remainders: int  # what the allocator counts as allocated beyond the sizes of large tensors
    margin: int  # what the allocator reserves beyond what is allocated
    load_peak: int  # while the model is loaded
    host: int  # resident memory of the process on the host
    download: int  # of the model, in 16 bits
    checkpoint: int  # one on disk: adapters, as PiSSA began too, optimizer states, AdaLoRA's scores
    layout: Layout
    largest: Layout  # what the recipe's stages may make of it: what everything above is for
    caps: tuple[RankCap, ...] = ()
    largest_task: str | None = None  # of several, the one whose activations count

    @property
    def allocated(self) -> int:
        """The peak of what tensors take."""
        return max(self.prediction.peak + self.workspace, self.load_peak) + self.remainders

    @property
    def moment(self) -> str:
        """The part of a run in which most is allocated."""
        loading = self.load_peak > self.prediction.peak + self.workspace
        return "loading" if loading else self.prediction.moment

    @property
    def reserved(self) -> int:
        """The peak of what torch takes from the driver."""
        return self.allocated + self.margin

    @property
    def needed(self) -> int:
        """The peak of what the process takes of the device: on a CPU of the host's memory."""
        return self.host if self.device == "cpu" else self.reserved + self.budget.context

    @property
    def fits(self) -> bool | None:
        """None where no limit is known."""
        return None if self.budget.vram is None else self.needed <= self.budget.vram

    def components(self) -> dict[str, int]:
        """What makes up `needed`, the largest first; with zeros left out."""
        parts = dict(self.prediction.components)
        adapters = parts.pop("adapters", 0)
        if adapters:
            parts |= {f"adapters: {band}": size for band, size in self.prediction.bands.items()}
        if self.load_peak > self.prediction.peak + self.workspace:
            parts["while loading"] = self.load_peak - self.prediction.peak - self.workspace
        if self.device == "cuda":
            parts["cuBLAS workspace"] = self.workspace
            parts["allocator's remainders"] = self.remainders
            parts["allocator margin"] = self.margin
            parts["CUDA context"] = self.budget.context
        else:
            parts["Python and libraries"] = self.host - self.allocated
        return {name: size for name, size in sorted(parts.items(), key=lambda item: -item[1]) if size > 0}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "format_version": 1,
            "model": self.model,
            "device": self.device,
            "budget_bytes": self.budget.vram,
            "budget_source": self.budget.source,
            "fits": self.fits,
            "needed_bytes": self.needed,
            "allocated_bytes": self.allocated,
            "reserved_bytes": self.reserved,
            "host_bytes": self.host,
            "load_peak_bytes": self.load_peak,
            "unified_bytes": self.prediction.unified,
            "download_bytes": self.download,
            "checkpoint_bytes": self.checkpoint,
            "peak_moment": self.moment,
            "components": self.components(),
            "moments": self.prediction.moments,
            "adapters_by_band": self.prediction.bands,
            "num_trained_parameters": self.layout.num_parameters,
            "num_trained_parameters_at_most": self.largest.num_parameters,
            **({"largest_task": self.largest_task} if self.largest_task is not None else {}),
            "rank_caps": [dataclasses.asdict(cap) for cap in self.caps],
            "assumptions": list(self.prediction.assumptions),
        }


def make_plan(
    recipe: Recipe,
    spec: ModelSpec,
    budget: Budget,
    *,
    device: Device = "cuda",
    longest: int | None = None,
    padded: bool | None = None,
    caps: tuple[RankCap, ...] = (),
    process_bytes: int = constants.PROCESS_BYTES,
) -> Plan:
    """Plan `recipe` on this model.

    Args:
        longest, padded: as for `predict`, where the data is known.
        caps: what was changed in the recipe before, to be told with the plan.
        process_bytes: what the process takes on the host before the model is loaded.

    Raises:
        LayoutError: the bands do not fit the model.
    """
    layout = build_layout(recipe, spec)
    largest, prediction = predict_largest(recipe, spec, layout, device=device, longest=longest, padded=padded)
    return assemble(
        recipe, spec, budget, layout, largest, prediction, device=device, caps=caps, process_bytes=process_bytes
    )


def assemble(
    recipe: Recipe,
    spec: ModelSpec,
    budget: Budget,
    layout: Layout,
    largest: Layout,
    prediction: Prediction,
    *,
    device: Device,
    caps: tuple[RankCap, ...],
    process_bytes: int,
    threads: int = 2,
) -> Plan:
    """The plan around a prediction: what else the process takes.

    Args:
        largest: what stages may make of `layout`, which `prediction` is for.
        threads: those that call cuBLAS; of one training loop the forward pass and the autograd engine.
    """
    workspace = constants.cublas_workspace(budget.gpu, threads) if device == "cuda" else 0
    load = _load_peak(recipe, spec, device)
    remainders = 0
    if device == "cuda":
        nf4 = recipe.quantization.method == "nf4"
        remainders = unsplit_remainders(spec, nf4=nf4, width=WIDTHS[recipe.model.dtype])
    allocated = max(prediction.peak + workspace, load) + remainders
    margin = int(constants.reserved_margin() * allocated) if device == "cuda" else 0
    process_bytes += constants.PROCESS_GROWTH_BYTES
    host = (
        process_bytes + _largest_linear(spec) * WIDTHS[recipe.model.dtype] + prediction.unified + prediction.host
    )
    if device == "cpu":
        host = process_bytes + allocated
    principal = principal_bytes(layout, WIDTHS[recipe.adapter_dtype])
    host += principal
    states = sum(prediction.bands.values()) + prediction.unified + principal
    states += sum(prediction.components.get(name, 0) for name in ("optimizer states", "AdaLoRA scores"))
    return Plan(
        model=recipe.model.path,
        device=device,
        budget=budget,
        prediction=prediction,
        workspace=workspace,
        remainders=remainders,
        margin=margin,
        load_peak=load,
        host=host,
        download=spec.num_parameters * 2,
        checkpoint=states,
        layout=layout,
        largest=largest,
        caps=caps,
    )


def _largest_linear(spec: ModelSpec) -> int:
    return max(linear.in_features * linear.out_features for linear in spec.linears)


def _load_peak(recipe: Recipe, spec: ModelSpec, device: Device) -> int:
    """The finished model and the largest weight before it is quantised (base/load.py streams them one by one)."""
    width = WIDTHS[recipe.model.dtype]
    nf4 = recipe.quantization.method == "nf4"
    model = base_weights(
        spec,
        nf4=nf4,
        nested=recipe.quantization.double_quant,
        width=width,
        rounding=512 if device == "cuda" else 1,
    )
    return sum(model) + (_largest_linear(spec) * width if nf4 else 0)
