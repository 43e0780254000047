"""The GPU table: plausible figures, and a name gives one card or an error that says what to write."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qhybrid.errors import HardwareError
from qhybrid.planner import hardware
from qhybrid.planner.hardware import find_gpu, gpu_names


@pytest.mark.parametrize("row", hardware._ROWS, ids=lambda row: row[0])
def test_figures_are_plausible(row):
    name, sold_gb, *_ = row
    gpu = find_gpu(name)
    assert gpu.name == name
    # A driver keeps a few hundred MiB, a card with ECC a tenth; "GB" as sold is GiB but for H200 and B200.
    assert 0.9 * sold_gb * 2**30 < gpu.memory_bytes <= sold_gb * 2**30
    assert gpu.compute_capability in [(6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert 280 <= gpu.bandwidth_gb_s <= 8000
    assert (gpu.bf16_tflops is None) == (gpu.compute_capability < (8, 0))
    assert gpu.bf16_tflops is None or 25 <= gpu.bf16_tflops <= 2250


def test_names_are_unique_and_all_found_again():
    assert len(set(gpu_names())) == len(gpu_names()) == len(hardware._ROWS)
    for name in gpu_names():
        for written in (
            name,
            name.lower(),
            name.upper(),
            f"NVIDIA {name}",
            name.replace(" ", "-"),
            name.replace(" ", "_"),
        ):
            assert find_gpu(written).name == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("rtx 4090 24GB", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("4070tisuper", "RTX 4070 Ti Super"),
        ("3090ti", "RTX 3090 Ti"),
        ("3060", "RTX 3060 12GB"),
        ("3080-12gb", "RTX 3080 12GB"),
        ("rtx 3080 (10 GB)", "RTX 3080 10GB"),
        ("4060 Ti 16 GiB", "RTX 4060 Ti 16GB"),
        ("A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("Tesla T4", "T4"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("h100-sxm5-80gb", "H100 SXM 80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_forgiving_names(written, name):
    assert find_gpu(written).name == name


@pytest.mark.parametrize(
    ("written", "choices"),
    [
        ("a100", ["A100 40GB", "A100 80GB"]),
        ("v100", ["V100 16GB", "V100 32GB"]),
        ("h100", ["H100 PCIe 80GB", "H100 SXM 80GB"]),
        ("H100 80GB", ["H100 PCIe 80GB", "H100 SXM 80GB"]),
        ("RTX 3080", ["RTX 3080 10GB", "RTX 3080 12GB"]),
        ("4060 ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
    ],
)
def test_an_ambiguous_name_names_the_choices(written, choices):
    with pytest.raises(HardwareError) as caught:
        find_gpu(written)
    assert " or ".join(choices) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("RTX 4090 Laptop GPU", "RTX 4090"),  # another chip, with 16 GB
        ("RTX 4090 D", "RTX 4090"),
        ("RTX 4090 48GB", "RTX 4090"),
        ("RTX 3080 Ti", "RTX 3080 12GB"),
        ("RTX 6000", "RTX 6000 Ada"),
        ("NVIDIA H100 NVL", "H100 PCIe 80GB"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "A100 80GB"),  # an eighth of the card
        ("RTX 4091", "RTX 4090"),
        ("A100 60GB", "A100 80GB"),
    ],
)
def test_another_card_is_not_taken_for_this_one(written, near):
    with pytest.raises(HardwareError) as caught:
        find_gpu(written)
    assert caught.value.hint is not None
    assert near in caught.value.hint.removeprefix("the nearest are ").split(", ")


@pytest.mark.parametrize("written", ["", "   ", "nvidia", "80GB", "Radeon XYZ"])
def test_nothing_near_lists_all(written):
    with pytest.raises(HardwareError, match="not a GPU that the planner knows") as caught:
        find_gpu(written)
    assert caught.value.hint == f"known: {', '.join(gpu_names())}"


def test_no_torch_is_imported():
    code = "import sys, qhybrid.planner.hardware, qhybrid.architecture.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
