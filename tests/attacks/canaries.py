"""Canaries: what an attacker leaves behind, made so that running it creates a file and does nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
    "scheduler.pt",
)


class OpensAFile:
    """Unpickling one calls `open(file, "w")`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return open, (str(self._file), "w")


def write_pickles(folder: Path, ran: Path, names: tuple[str, ...] = PICKLES) -> None:
    """Write each name as a plain pickle or as torch's archive, in turn; loading one creates the file `ran`."""
    for number, name in enumerate(names):
        if number % 2:
            (folder / name).write_bytes(pickle.dumps(OpensAFile(ran)))
        else:
            torch.save({"weight": OpensAFile(ran)}, folder / name)


def write_code(folder: Path, ran: Path) -> None:
    """Put Python code into a model folder wherever a library looks for some; running it creates the file `ran`."""
    code = f"open({str(ran)!r}, 'w').close()\n\n\n"
    classes = "".join(
        f"class {name}:\n    pass\n\n\n" for name in ("Config", "Model", "Slow", "Fast", "Processor")
    )
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "setup.py", "x.py"):
        (folder / name).write_text(code + classes)
    for name in ("custom_generate/generate.py", "custom_generate/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "def generate(model, **kwargs):\n    return None\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.Config",
        "AutoModel": "modeling_x.Model",
        "AutoModelForCausalLM": "modeling_x.Model",
        "AutoTokenizer": ["tokenization_x.Slow", "tokenization_x.Fast"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["auto_map"] = {
        "AutoTokenizer": ["tokenization_x.Slow", "tokenization_x.Fast"],
        "AutoProcessor": "x.Processor",
    }
    file.write_text(json.dumps(tokenizer))
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["custom_generate"] = str(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
