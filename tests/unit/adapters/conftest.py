"""The base model of PiSSA's tests."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import tiny_folder
from pissa_cases import RANK
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny model in bf16 whose weights have a few large singular values, as trained ones do."""
    folder = tiny_folder(tmp_path_factory.mktemp("planted") / "base", intermediate_size=128)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "_proj" in name:
            left, right = (torch.randn(n, RANK, generator=generator) for n in value.shape)
            value += 0.04 * left @ right.T / RANK**0.5
    shutil.copytree(folder, folder.with_name("bf16"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    half = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(half, folder.with_name("bf16") / "model.safetensors", {"format": "pt"})
    return folder
