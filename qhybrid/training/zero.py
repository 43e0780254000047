"""DeepSpeed ZeRO: its configuration, derived from the plan; whole values of what it shards; its step, watched.

Adapters train in fp32 under ZeRO, and DeepSpeed's own bf16 and fp16 stay off: with them it casts every trained
tensor, DoRA's magnitudes and AdaLoRA's Λ included, to 16 bits. The forward pass runs under torch's autocast, as it
does without ZeRO.

What is leant on beside public API (deepspeed.utils.safe_get_… and safe_set_…) is named in tests/integration/
test_contracts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qhybrid.planner.zero import ZeroSetup
from qhybrid.recipe.schema import Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def deepspeed_config(recipe: Recipe, setup: ZeroSetup) -> dict[str, Any]:
    """What DeepSpeed is told: the recipe's settings, the plan's sizes, and distributed.deepspeed over them."""
    training = recipe.training
    device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": setup.stage,
        "reduce_bucket_size": setup.reduce_bucket_size,
        "contiguous_gradients": True,
    }
    if setup.overlap_comm is not None:
        zero["overlap_comm"] = setup.overlap_comm
    if setup.offload != "none":
        zero["offload_optimizer"] = dict(device)
    if setup.offload == "all":
        zero["offload_param"] = dict(device)
    if setup.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": setup.prefetch_bucket_size,
            "stage3_param_persistence_threshold": setup.param_persistence_threshold,
            "stage3_max_live_parameters": setup.max_live_parameters,
            "stage3_max_reuse_distance": setup.max_reuse_distance,
        }
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch * accumulation * setup.processes,
        "gradient_clipping": 0.0 if training.preconditioner is not None else training.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offloaded states are stepped on by torch's own optimizer: DeepSpeed's CPU Adam would be put in the place
        # of any other, is compiled on first use, and has not the parameter groups' own weight decay.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return _laid_over(config, recipe.distributed.deepspeed)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


class ZeroAccess:
    """Values, gradients and optimizer states of sharded parameters, whole. Every process must call it alike."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._sharded = engine.zero_optimization_stage() == 3
        self._gradients: dict[nn.Parameter, Tensor | None] = {}
        self._gather()

    def _gather(self) -> None:
        """Make whole what is trained. In stage 3 it stays so from the first step on, and may be read before."""
        trained = [parameter for _, members in self._flats() for parameter in members]
        missing = [parameter for parameter in trained if parameter.shape != _shape(parameter)]
        if missing:
            missing[0].all_gather(missing)

    def values(self, parameter: nn.Parameter) -> Tensor:
        """As `Access`. What is trained is fp32."""
        if parameter.shape != _shape(parameter):
            self._gather()
        return parameter.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As `Access`. It is there between DeepSpeed's backward pass and its step."""
        if parameter not in self._gradients:
            from deepspeed.utils import safe_get_full_grad

            whole = safe_get_full_grad(parameter)
            self._gradients[parameter] = None if whole is None else whole.view(_shape(parameter))
        return self._gradients[parameter]

    def add_to_gradient(self, parameter: nn.Parameter, addition: Tensor) -> None:
        """As `Access`."""
        gradient = self.gradient(parameter)
        assert gradient is not None
        self.set_gradient(parameter, gradient + addition)

    def set_gradient(self, parameter: nn.Parameter, values: Tensor) -> None:
        """As `Access`."""
        from deepspeed.utils import safe_set_full_grad

        self._gradients[parameter] = values
        safe_set_full_grad(parameter, values)

    def forget_gradients(self) -> None:
        """They were gathered for one step."""
        self._gradients.clear()

    def assign(self, parameter: nn.Parameter, values: Tensor) -> None:
        """As `Access`: the fp32 copy, and what the forward pass sees."""
        from deepspeed.utils import safe_set_full_fp32_param

        values = values.to(parameter.device, torch.float32)
        safe_set_full_fp32_param(parameter, values)
        if not self._sharded:
            parameter.data.copy_(values)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values)
        parameter.all_gather([parameter])  # what is trained stays whole

    # ---- optimizer states ----

    def link_states(self) -> None:
        """Have DeepSpeed find the states of all groups; call it before `states`.

        Stages 1 and 2 link them once, after the step of the first group, when the others have none yet.
        """
        if self._sharded:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        base = self._engine.optimizer.optimizer
        for flat, members in self._flats():
            lazy_init_hp_params_optimizer_state(members, flat, base.state)

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of one parameter: tensors of its shape, and scalars as they are."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for key, value in self._base_state(parameter).items():
            if not torch.is_tensor(value) or value.numel() == 1:
                found[key] = torch.as_tensor(value, dtype=torch.float32).detach().cpu().reshape(())
            else:
                whole = safe_get_full_optimizer_state(parameter, key)
                assert whole is not None
                found[key] = whole.detach().cpu().view(_shape(parameter)).clone()
        return found

    def assign_states(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Give every parameter its state back, as `states` told it; before the first step."""
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer = self._engine.optimizer
        flats = self._flats()
        for flat, members in flats:
            first = states[members[0]]
            optimizer.optimizer.state[flat] = {
                key: value.clone() if value.dim() == 0 else torch.zeros_like(flat) for key, value in first.items()
            }
        self.link_states()
        for _, members in flats:
            for parameter in members:
                for key, value in states[parameter].items():
                    if value.dim():
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """Each flat tensor that the optimizer steps on, with the parameters in it."""
        optimizer = self._engine.optimizer
        if self._sharded:
            return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
        return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))

    def _base_state(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        for flat, members in self._flats():
            if any(member is parameter for member in members):
                return self._engine.optimizer.optimizer.state.get(flat, {})
        raise AssertionError("a parameter that is not trained")


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def watch_step(engine: DeepSpeedEngine, before_step: Callable[[], None]) -> None:
    """Have `before_step` called when DeepSpeed's gradients are complete, reduced and not yet clipped.

    accelerate goes on to the optimizer's step within its backward, and the gradients are gone after it.
    """
    step = engine.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        before_step()
        return step(*args, **kwargs)

    engine.step = watched
