"""The processes that train together: which one this is, what all of them must agree on, who writes.

The environment says it, in torchrun's names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). accelerate
launch sets the same; for a Slurm step they are derived from Slurm's own. Process 0 alone writes files and prints.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from qhybrid.errors import QhybridError, RecipeError
from qhybrid.recipe.schema import Recipe

T = TypeVar("T")
# What accelerate launch passes on from its user's configuration; here the recipe says it.
_ACCELERATE_SETTINGS = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DYNAMO_BACKEND",
)
_met: list[Place] = []  # this process, once `join` has made the group


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this one is. `local` counts on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun, accelerate launch or Slurm say about this process; alone where none of them started it.

    Raises:
        RecipeError: values that are no numbers, or that contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # Slurm sets SLURM_PROCID in a batch script too; SLURM_STEP_NUM_TASKS is there inside srun alone.
    if "WORLD_SIZE" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    try:
        rank, world, local = (
            int(environment.get(name) or number) for name, number in zip(names, (0, 1, 0), strict=False)
        )
        local_world = int((environment.get(names[3]) or str(world)).partition("(")[0].partition(",")[0])
    except ValueError:
        given = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise RecipeError(f"the launcher's variables are no numbers: {given}") from None
    if not 0 <= rank < world or not 0 <= local <= rank:
        raise RecipeError(f"the launcher says process {rank} of {world}, number {local} on this machine")
    return Place(rank, world, local, local_world)


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several, or as the only one of torchrun's."""
    return "TORCHELASTIC_RUN_ID" in environment or place(environment).world > 1


def with_processes(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Recipe:
    """The recipe with the number of processes that a launcher started, where one did.

    Raises:
        RecipeError: the recipe asks for another number, which would be another batch size.
    """
    if not is_launched(environment):
        return recipe
    world, asked = place(environment).world, recipe.distributed.processes
    if asked == world:
        return recipe
    if asked != 1:
        raise RecipeError(
            f"distributed.processes is {asked}, but the launcher started {world}",
            hint=f"start qhybrid without a launcher, which starts {asked} itself; or set "
            f"distributed.processes={world}, and mind the batch size",
        )
    changed = recipe.distributed.model_copy(update={"processes": world})
    return recipe.model_copy(update={"distributed": changed})


def join(recipe: Recipe) -> Place:
    """Meet the other processes, if there are any or DeepSpeed is to run; to be called once, before training.

    Returns:
        Which one this is.
    """
    here = place()
    for name in _ACCELERATE_SETTINGS:
        os.environ.pop(name, None)
    if here.world == 1 and recipe.distributed.zero_stage == 0:
        return here
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and not recipe.training.use_cpu
    # For what reads the environment: accelerate, DeepSpeed and torch.
    os.environ |= {"RANK": str(here.rank), "WORLD_SIZE": str(here.world), "LOCAL_RANK": str(here.local)}
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(here.local_world))
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    if "MASTER_PORT" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID")
        os.environ["MASTER_PORT"] = str(20_000 + int(job) % 12_000) if job and here.world > 1 else str(free_port())
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if on_gpu:
        if here.local >= torch.cuda.device_count():
            raise RecipeError(
                f"process {here.local} of this machine has no GPU: there are {torch.cuda.device_count()}",
                hint=f"set distributed.processes={torch.cuda.device_count()}",
            )
        torch.cuda.set_device(here.local)
    if not dist.is_initialized():
        _met.append(here)
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=recipe.training.ddp_timeout)
        )
    return here


def leave() -> None:
    """Part from the other processes at the end, if it was `join` that met them."""
    if _met and "deepspeed" not in sys.modules:  # which keeps the group for its next engine
        import torch.distributed as dist

        dist.destroy_process_group()
        _met.clear()
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or another run in this process would be taken for one with ZeRO


class StoppedElsewhere(QhybridError):
    """Another process failed, and tells of it."""

    exit_code = 1
    told_elsewhere = True


def agree(make: Callable[[], T]) -> T:
    """What process 0 makes, for all of them. What it raises, all raise; only process 0 prints it.

    Raises:
        BaseException: what `make` raised, in process 0; StoppedElsewhere in the others.
    """
    if not is_several():
        return make()
    import torch.distributed as dist

    made, error = None, None
    if dist.get_rank() == 0:
        try:
            made = make()
        except BaseException as raised:  # the others wait, whatever it is
            error = raised
    message: list[Any] = [(made, None if error is None else (str(error), getattr(error, "exit_code", 1)))]
    dist.broadcast_object_list(message, src=0)
    made, failure = message[0]
    if error is not None:
        raise error
    if failure is not None:
        stopped = StoppedElsewhere(failure[0])
        stopped.exit_code = failure[1]
        raise stopped
    return made


def together(do: Callable[[], T]) -> T:
    """What every process makes for itself; if one fails, all stop, and none waits for the failed one.

    Raises:
        BaseException: what `do` raised here; StoppedElsewhere when only another process failed.
    """
    if not is_several():
        return do()
    made, error = None, None
    try:
        made = do()
    except BaseException as raised:
        error = raised
    codes = gather(None if error is None else getattr(error, "exit_code", 1))
    failed = [(rank, code) for rank, code in enumerate(codes) if code is not None]
    if error is not None:
        # One message is enough: that of the first process that failed.
        if failed[0][0] != place().rank and isinstance(error, QhybridError):
            stopped = StoppedElsewhere(str(error))
            stopped.exit_code = failed[0][1]
            raise stopped from error
        if isinstance(error, QhybridError):
            error.told_elsewhere = False
        raise error
    if failed:
        stopped = StoppedElsewhere(f"process {failed[0][0]} failed")
        stopped.exit_code = failed[0][1]
        raise stopped
    return made  # pyright: ignore


def gather(value: T) -> list[T]:
    """The value of every process, in the order of their numbers."""
    if not is_several():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error of torch says that another process is no longer there."""
    words = str(error).lower()
    return any(word in words for word in ("gloo", "nccl", "connection closed", "connection reset", "timed out"))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if not is_several() else any(gather(flag))


def is_several() -> bool:
    """Whether several processes have met."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """The first process of each machine goes first: downloads and conversions are then there for the others."""
    if not is_several():
        yield
        return
    import torch.distributed as dist

    first = place().local == 0
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        if first:
            dist.barrier()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: "gpu[03-05,9],big1" begins with gpu03."""
    found = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\])?", nodes)
    return nodes if found is None else found[1] + (found[2] or "")
