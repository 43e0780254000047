"""What passes between a sweep and its processes, and the names of the files that a run leaves. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qhybrid.architecture.spec import ModelSpec
from qhybrid.recipe.load import LoadedRecipe
from qhybrid.recipe.sweep import MeasuresSection
from qhybrid.training.planning import Hardware

RUN = "run"  # the run folder of `qhybrid sft`, in that of the sweep's run
LOG = "output.log"


@dataclass(frozen=True)
class Probe:
    """What a sweep must know before its first run."""

    spec: ModelSpec
    hardware: Hardware
    free_bytes: int  # of the memory that runs share: the GPU's, or the host's
    longest: int  # tokens of the longest row
    data_fingerprint: str
    num_rows: int  # held out, and measured on


@dataclass(frozen=True)
class Order:
    """One run: what to train, where, and what to measure."""

    folder: Path
    loaded: LoadedRecipe
    measure: MeasuresSection
    date: str
    threads: int
    began: float  # when the process was started, in seconds since 1970
