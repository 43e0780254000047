"""What a checkpoint holds beside the adapter: optimizer, scheduler, random numbers. Whole, and never pickled.

optimizer.safetensors   one tensor for each state of each trained parameter, "NAME:STATE"
rng.safetensors         the random state of each process, "RANK.torch" and so on
state.json              numbers: parameter groups, scheduler, loss scaler
trainer_state.json      transformers' own

Parameters go by name and sharded states are gathered, so a run goes on with another number of processes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qhybrid.base.tensor_files import read_tensors, write_tensors
from qhybrid.disk import write_bytes
from qhybrid.errors import RunFolderError
from qhybrid.training.run import STATE
from qhybrid.training.zero import ZeroAccess

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
_FORMAT_VERSION = 1

Named = Mapping[str, nn.Parameter]


def optimizer_content(
    optimizer: torch.optim.Optimizer, named: Named, zero: ZeroAccess | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the numbers of an optimizer; with ZeRO, every process must call it.

    Args:
        named: the trained parameters by name.
        zero: how sharded states are gathered; None without ZeRO.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    if zero:
        zero.link_states()
    for name, parameter in named.items():
        state = zero.states(parameter) if zero else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if torch.is_tensor(value):
                tensors[f"{name}:{key}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars.setdefault(name, {})[key] = value
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Named,
    zero: ZeroAccess | None,
    tensors: Mapping[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Undo `optimizer_content`, which gave `tensors` and `numbers`."""
    states: dict[str, dict[str, Any]] = {name: dict(numbers["scalars"].get(name, {})) for name in named}
    for key, value in tensors.items():
        name, _, state = key.rpartition(":")
        states[name][state] = value
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    if zero:
        if any(states.values()):
            zero.assign_states({named[name]: state for name, state in states.items()})
        return
    names = {id(parameter): name for name, parameter in named.items()}
    content = optimizer.state_dict()
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content["state"] = {
        index: states[names[id(parameter)]]
        for index, parameter in enumerate(members)
        if states[names[id(parameter)]]
    }
    optimizer.load_state_dict(content)  # it knows each state's device
    # torch casts all states to the parameter's dtype; Adafactor's moments are fp32 beside bf16 parameters.
    for name, state in states.items():
        own = optimizer.state[named[name]]
        for key, value in state.items():
            if torch.is_tensor(value) and torch.is_tensor(own.get(key)) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)


def write_state(
    folder: Path, *, tensors: dict[str, Tensor], rng: list[dict[str, Tensor]], numbers: dict[str, Any]
) -> None:
    """Write the three files. `rng` is what `random_state` gave in each process."""
    write_tensors(folder / OPTIMIZER, tensors)
    write_tensors(
        folder / RNG, {f"{rank}.{key}": value for rank, one in enumerate(rng) for key, value in one.items()}
    )
    content = {"format_version": _FORMAT_VERSION, **numbers}
    write_bytes(folder / STATE, (json.dumps(content, indent=1, default=_as_number) + "\n").encode())


def read_numbers(folder: Path) -> dict[str, Any]:
    """What `write_state` was given as `numbers`.

    Raises:
        RunFolderError: another version of qhybrid wrote it.
    """
    numbers = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if numbers.get("format_version") != _FORMAT_VERSION:
        raise RunFolderError(
            f"{folder / STATE} is of format {numbers.get('format_version')}, not {_FORMAT_VERSION}",
            hint="resume with the version of qhybrid that wrote it",
        )
    return numbers


def random_state() -> dict[str, Tensor]:
    """The state of Python's, numpy's and torch's random numbers in this process, as tensors."""
    version, words, gauss = random.getstate()
    assert version == 3
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(folder: Path, rank: int) -> bool:
    """Undo `random_state` for process `rank`; False where the checkpoint has none of that number."""
    prefix = f"{rank}."
    state = {k.removeprefix(prefix): v for k, v in read_tensors(folder / RNG).items() if k.startswith(prefix)}
    if not state:
        return False
    assign_random_state(state)
    return True


def assign_random_state(state: dict[str, Tensor]) -> None:
    """Put the random numbers of this process where they were when `random_state` gave `state`."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else _as_number(value)


def _as_number(value: Any) -> Any:
    if torch.is_tensor(value) or isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written to a checkpoint")
