"""What data-parallel training takes of one process's memory: torch's DDP (stage 0) and DeepSpeed ZeRO 1 to 3.

From the sources of deepspeed 0.19.8 (file, name), torch 2.13, accelerate 1.15 and trl 1.16. "Seen" marks what gloo
processes on a CPU showed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import RecipeError
from qhybrid.planner.optimizers import rule_of, state_bytes
from qhybrid.planner.tape import FP32

# DeepSpeed hands the optimizer one flat tensor for all parameters of a group, cut where the shards end. These work
# value by value, so it makes no difference, and their states can be saved whole. Blocks of 8-bit states, factored
# moments and per-tensor norms would cross the borders of parameters; paged and averaging optimizers have hooks
# that DeepSpeed does not call.
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
_LARGEST_BUCKET = 2**24  # values: 64 MiB in fp32, which the buffers take whatever is trained


@dataclass(frozen=True)
class ZeroSetup:
    """How processes share the work. Names and defaults are DeepSpeed's (zero/config.py); sizes count values.

    Two names are missing. allgather_bucket_size has no effect: the step gathers weights in place (utils.py,
    all_gather_dp_groups). contiguous_gradients is taken to be true, its default: it allocates the reduce buckets,
    without which gradients wait where autograd put them, and reductions copy twice as much.

    Raises:
        RecipeError: an offload that the stage does not know.
    """

    stage: Literal[0, 1, 2, 3]
    processes: int
    offload: Literal["none", "optimizer", "all"] = "none"
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None  # None: in stage 3 alone, where it doubles nothing
    prefetch_bucket_size: int = 50_000_000  # in DeepSpeed's config this and the rest are called stage3_…
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.offload != "none" and self.stage == 0:
            raise RecipeError("without ZeRO nothing is offloaded", hint="set distributed.zero_stage to 1, 2 or 3")
        if self.offload == "all" and self.stage != 3:
            raise RecipeError(
                f"ZeRO stage {self.stage} does not offload weights",
                hint="set distributed.zero_stage to 3, or distributed.offload to optimizer",
            )

    @classmethod
    def derived(
        cls,
        stage: Literal[1, 2, 3],
        processes: int,
        offload: Literal["none", "optimizer", "all"],
        *,
        trained: Sequence[int],
        hidden_size: int,
    ) -> ZeroSetup:
        """The sizes that qhybrid trains with.

        Buckets for what is trained, not for the model. In stage 3 the trained tensors stay whole: the adapters'
        mathematics reads them outside of their modules' forward pass, and they are small. The prefetch bucket is
        what transformers writes for "auto" (integrations/deepspeed.py, trainer_config_finalize).

        Args:
            trained: the number of values of each trained tensor.
        """
        return cls(
            stage,
            processes,
            offload,
            reduce_bucket_size=max(max(trained), min(sum(trained), _LARGEST_BUCKET)),
            prefetch_bucket_size=int(0.9 * hidden_size**2),
            param_persistence_threshold=max(10 * hidden_size, *trained),
        )


@dataclass(frozen=True)
class Frozen:
    """Frozen parameters that are alike, `count` of them. NF4 packs two weights into one value of `width` 1."""

    numel: int
    width: int
    count: int = 1
    per_layer: int = 0  # how many of them a decoder layer has


@dataclass(frozen=True)
class ZeroCost:
    """Bytes of one process, the one that has most. All are on the device except what begins with "host"."""

    base_weights: int
    unquantised: int
    adapters: int
    optimizer_states: int
    gradients: int  # beside the buckets: the most in a backward pass, with the copies that reductions make
    kept_gradients: int  # what stays of them until the next micro-batch
    step: int  # gradients and copies in the optimizer's step
    master_weights: int = 0  # the fp32 copies of trained values on which DeepSpeed's optimizer steps
    buckets: int = 0  # communication buffers of the backward pass; stage 1 has them between micro-batches too
    resting_buckets: int = 0  # the part of them that is never freed
    gather: int = 0  # stage 3: parameters gathered for forward and backward, at most
    unified: int = 0  # paged optimizer states
    host_pinned: int = 0  # page-locked; torch may round every buffer up to a power of two
    host: int = 0  # other memory of the host
    notes: tuple[str, ...] = ()

    @property
    def resting(self) -> int:
        """Device bytes that are there from the first step to the last."""
        weights = self.base_weights + self.unquantised + self.adapters + self.master_weights
        return weights + self.optimizer_states + self.resting_buckets

    @property
    def device(self) -> int:
        """The larger of backward pass and step, without activations."""
        backward = self.buckets - self.resting_buckets + self.gradients + self.gather
        return self.resting + max(backward, self.step)


def frozen_tensors(spec: ModelSpec, *, nf4: bool, width: int) -> tuple[Frozen, ...]:
    """The frozen parameters of a model. NF4's scales are no parameters, so no stage shards them."""
    found = []
    for linear in spec.linears:
        size = linear.in_features * linear.out_features
        found.append(Frozen((size + 1) // 2 if nf4 else size, 1 if nf4 else width, spec.num_layers, 1))
        if linear.bias:
            found.append(Frozen(linear.out_features, width, spec.num_layers, 1))
    hidden, embedding = spec.hidden_size, spec.vocab_size * spec.hidden_size
    found.append(Frozen(embedding, width, spec.num_embedding_parameters // embedding))
    return (*found, Frozen(hidden, width, spec.num_norm_parameters // hidden))


def zero_cost(
    setup: ZeroSetup,
    *,
    tensors: Sequence[tuple[int, int]],
    frozen: Sequence[Frozen],
    base_weights: int,
    unquantised: int,
    optim: str,
    half: bool,
    kept_layers: int = 0,
    accumulates: bool = False,
    rounding: int = 512,
    on_cuda: bool = True,
) -> ZeroCost:
    """The memory of one process that ZeRO or DDP decides upon.

    Args:
        tensors: the trained tensors: (number of values, bytes of one).
        frozen: what `frozen_tensors` gives. base_weights, unquantised: what memory.base_weights gives.
        optim: training.optim. half: DeepSpeed's bf16.enabled or fp16.enabled.
        kept_layers: layers that are not checkpointed. accumulates: a step has several micro-batches.

    Raises:
        RecipeError: too few tensors for the processes, 16-bit tensors without `half`, or an optimizer that
            offloading would replace.
    """

    def rounded(num_bytes: int) -> int:
        return -(-num_bytes // rounding) * rounding

    assert tensors and setup.processes >= 1
    rule, sizes = rule_of(optim), [size for size, _ in tensors]
    if setup.stage == 0:
        both = [state_bytes(rule, size, width, rounding, on_cuda=on_cuda) for size, width in tensors]
        own = sum(rounded(size * width) for size, width in tensors)
        # torch copies gradients into buckets that stay (DistributedDataParallel, gradient_as_bucket_view=False).
        bucket = own if setup.processes > 1 else 0
        return ZeroCost(
            base_weights=base_weights,
            unquantised=unquantised,
            adapters=own,
            optimizer_states=sum(here for here, _ in both),
            gradients=own,
            kept_gradients=own if accumulates else 0,
            step=own * (1 + rule.copies_in_step),
            buckets=bucket,
            resting_buckets=bucket,
            unified=sum(there for _, there in both),
        )
    _check(setup, tensors, half)
    processes, third = setup.processes, setup.stage == 3
    offloaded, everything = setup.offload != "none", setup.offload == "all"
    # All trained tensors become 16-bit, DoRA's magnitudes too (engine.py, _cast_module_mixed_precision; seen).
    width, total, largest = 2 if half else FP32, sum(sizes), max(sizes)
    # One process's shard is the tensor itself (zero/partition_parameters.py, NoGatherHandle).
    sharded = third and (processes > 1 or everything)
    if third:  # each tensor by itself (zero/partition_parameters.py, _partition_param; seen)
        own = touched = sum(-(-size // processes) for size in sizes)
        small = [size for size in sizes if sharded and size <= setup.param_persistence_threshold]
        adapters = (0 if everything else rounded(own * width)) + sum(rounded(size * width) for size in small)
    else:  # one flat tensor, 2·N values aligned (zero/stage_1_and_2.py, flatten_dense_tensors_aligned; seen)
        own = -(-total // (2 * processes)) * 2
        touched = min(total, own + 2 * (largest - 1))  # gradients at a partition's two edges are kept whole
        adapters = rounded(own * processes * width)
    # The optimizer is given one flat fp32 tensor. Seen with bitsandbytes' 8-bit AdamW, torch's fused AdamW, and
    # Adafactor, which has no rows and columns to factor then.
    flat = replace(rule, factored=False)
    states, unified = state_bytes(flat, own, FP32, rounding, on_cuda=on_cuda)
    # Stages 1 and 2 clone fp32 weights too, stage 3 does not (zero/stage3.py, _create_fp32_partitions; seen).
    master = 0 if third and not half and not offloaded else rounded(own * FP32)

    # Allocated in full whatever is trained; stages 1 and 2 free it after reductions (setup_buckets there, and
    # _setup_for_real_optimizer in stage 3; seen).
    bucket = rounded(setup.reduce_bucket_size * width) * (2 if setup.overlap_comm and not third else 1)
    resting = bucket if third else 0
    gradients, kept = _gradients(setup, total, largest, own, touched, accumulates)
    # step(): the reduced gradients, a flat copy, and that in fp32 (seen); then what the optimizer needs.
    casting = touched * width + own * width + (own * FP32 if half else 0)
    stepping = own * FP32 * (1 + rule.copies_in_step) + (own * width if third else 0)
    step = rounded(max(casting, stepping))

    pinned = host = 0
    if offloaded:
        pinned = own * FP32 + (own * width if third else 0)  # gradients in fp32, and stage 3's flat ones
        host = state_bytes(flat, own, FP32, 1, on_cuda=False)[0]
        if third:
            host += master
        else:  # the weights, their 16-bit image, and the gradients that wait for the last micro-batch
            pinned += master + (own + largest + (touched if accumulates and setup.stage == 2 else 0)) * width
            resting = rounded(largest * width)  # temp_grad_buffer_for_gpu_offload
            bucket += resting
        states = unified = master = step = 0
    if everything:
        pinned += own * width
    quantised, plain, gather = base_weights, unquantised, 0
    if sharded:
        gather = _gathered(setup, [*frozen, *(Frozen(size, width) for size in sizes)], kept_layers)
        for each in frozen:
            # uint8 is sharded like any dtype (seen). What is small is gathered once, and stays beside its shard.
            shard = rounded(-(-each.numel // processes) * each.width) * each.count
            whole = rounded(each.numel * each.width) * each.count
            pinned += shard if everything else 0
            change = (0 if everything else shard) - whole
            change += whole if each.numel <= setup.param_persistence_threshold else 0
            quantised += change if each.width == 1 else 0
            plain += change if each.width != 1 else 0
    return ZeroCost(
        base_weights=max(quantised, 0),
        unquantised=max(plain, 0),
        adapters=adapters,
        optimizer_states=states,
        gradients=rounded(gradients * width),
        kept_gradients=rounded(kept * width),
        step=step,
        master_weights=master,
        buckets=bucket,
        resting_buckets=resting,
        gather=gather,
        unified=unified,
        host_pinned=pinned,
        host=host,
        notes=_notes(setup, tensors, frozen, half, kept_layers),
    )


def _check(setup: ZeroSetup, tensors: Sequence[tuple[int, int]], half: bool) -> None:
    if setup.processes > len(tensors):
        raise RecipeError(
            f"{setup.processes} processes have {len(tensors)} trained tensors to share in ZeRO {setup.stage}",
            hint="train more modules, use fewer processes, or set distributed.zero_stage to 0",
        )
    if not half and any(width < FP32 for _, width in tensors):
        # Gradients would change their dtype on the way; beside fp32 tensors it ends in an assertion (seen).
        raise RecipeError(
            "ZeRO does not train 16-bit adapters without 16-bit training",
            hint="set training.bf16 to true, or model.adapter_dtype to float32",
        )


def _gradients(
    setup: ZeroSetup, total: int, largest: int, own: int, touched: int, accumulates: bool
) -> tuple[int, int]:
    """Values of gradients outside the bucket: (the most in a backward pass, those kept between micro-batches)."""
    offloaded = setup.offload != "none"
    at_once = min(total, max(setup.reduce_bucket_size, largest))  # of one reduction; a large tensor goes alone
    if setup.stage == 3:  # grad_partitions_flat_buffer, and the copy that reduce_scatter_coalesced makes
        kept = 0 if offloaded else own
        return kept + at_once, kept
    copy = at_once if setup.processes > 1 else 0  # allreduce_bucket concatenates the slices of all ranks (seen)
    mine = 0 if offloaded else touched  # grads_in_partition
    if setup.stage == 1:  # gradients wait for the last micro-batch, then go through the bucket
        filled = max(setup.reduce_bucket_size - largest, 0)
        most = max(total, total - filled + mine) if total > setup.reduce_bucket_size else total
        return most, total if accumulates else 0
    kept = mine if accumulates else 0  # those of earlier micro-batches are added to after the reductions
    if total > setup.reduce_bucket_size:  # the next reduction finds the last one's results there (seen)
        return kept + mine + copy + largest, kept
    return kept + max(mine, copy), kept


def _gathered(setup: ZeroSetup, parameters: Sequence[Frozen], kept_layers: int) -> int:
    """Bytes of parameters that stage 3 has gathered at once, at most."""
    large = [each for each in parameters if each.numel > setup.param_persistence_threshold]
    large.sort(key=lambda each: -each.width)

    def most(values: int) -> int:
        """Bytes of that many values, the widest first."""
        found = 0
        for each in large:
            taken = min(values, each.numel * each.count)
            found, values = found + taken * each.width, values - taken
        return found

    everything = sum(each.numel * each.width * each.count for each in large)
    one = max((each.numel * each.width for each in large), default=0)
    layer = sum(each.numel * each.width * each.per_layer for each in large)
    packed = sum(each.numel * each.per_layer for each in large if each.width == 1)
    # zero/partitioned_param_coordinator.py: every module fetches a bucket more, up to max_live_parameters
    # (_fetch_sub_module_impl), and what recurs within max_reuse_distance stays whatever max_live_parameters says
    # (__params_to_release): half of that way is forward, half backward. Both seen.
    ahead = setup.max_live_parameters if setup.prefetch_bucket_size else 0
    # trl makes checkpointing reentrant in stage 3 (sft_trainer.py), and a layer is gathered through its backward
    # pass then (seen).
    live = most(max(ahead, setup.max_reuse_distance // 2)) + max(one, layer)
    # bitsandbytes' MatMul4Bit holds a gathered weight in its graph, outside save_for_backward, be it stored in
    # uint8 or in bfloat16. Reentrant checkpointing has no such graph until it computes a layer again (both seen).
    live = min(live + packed * kept_layers, everything)
    if setup.prefetch_bucket_size == 0 or setup.processes == 1:
        return live
    # What is fetched in one call comes in one tensor and is copied out of it (AllGatherCoalescedHandle.wait).
    return live + min(most(setup.prefetch_bucket_size) + one, everything)


def _notes(
    setup: ZeroSetup, tensors: Sequence[tuple[int, int]], frozen: Sequence[Frozen], half: bool, kept_layers: int
) -> tuple[str, ...]:
    found, total = [], sum(size for size, _ in tensors)
    if setup.processes == 1:
        found.append("ZeRO has nothing to share with one process: it is good for offloading and for a trial")
    if half and any(width == FP32 for _, width in tensors):
        found.append("DeepSpeed makes every trained tensor 16-bit and keeps fp32 values in its optimizer")
    if setup.reduce_bucket_size > total:
        found.append(f"reduce_bucket_size {setup.reduce_bucket_size:,} is more than the {total:,} trained values")
    if setup.stage == 3 and setup.processes > 1 and kept_layers and any(each.width == 1 for each in frozen):
        found.append("4-bit weights of layers that are not checkpointed stay gathered for the backward pass")
    return tuple(found)
