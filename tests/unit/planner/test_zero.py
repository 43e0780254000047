"""The cost of DDP and ZeRO: cases with their arithmetic, and what must hold for any set of trained tensors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qhybrid.architecture.spec import spec_from_config
from qhybrid.errors import RecipeError
from qhybrid.planner.holdings import base_weights
from qhybrid.planner.zero import Frozen, ZeroCost, ZeroSetup, frozen_tensors, zero_cost

GB = 10**9
LLAMA_2_7B = spec_from_config(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    }
)  # fmt: skip
# Three layers of width 64 with LoRA of rank 4 beside one linear each, an embedding and a head of 256 tokens.
TOY_TRAINED = [(256, 2)] * 6
TOY_FROZEN = [Frozen(4096, 2, 3, 1), Frozen(64, 2, 3, 1), Frozen(256 * 64, 2, 2)]
TOY_BASE = (3 * 4096 + 3 * 64 + 2 * 256 * 64) * 2  # 90,496


def cost(setup: ZeroSetup, tensors: list[tuple[int, int]] = TOY_TRAINED, **more: Any) -> ZeroCost:
    usual = {"frozen": TOY_FROZEN, "base_weights": 0, "unquantised": TOY_BASE, "optim": "sgd", "half": True}
    return zero_cost(setup, tensors=tensors, **{**usual, "rounding": 1, **more})


# ---- by hand ----


def test_one_process_without_zero_is_plain_training() -> None:
    found = cost(ZeroSetup(0, 1), optim="adamw_torch_fused")
    assert (found.adapters, found.gradients) == (1536 * 2, 1536 * 2)
    assert found.optimizer_states == 6 * (256 * 2 * 2 + 4)  # two states in bf16, and a step count for each tensor
    assert (found.buckets, found.master_weights, found.gather, found.kept_gradients) == (0, 0, 0, 0)
    assert found.unquantised == TOY_BASE


def test_ddp_copies_all_gradients_into_buckets_that_stay() -> None:
    found = cost(ZeroSetup(0, 2), [(1000, 2), (10, 4)], accumulates=True)
    assert found.gradients == found.kept_gradients == 1000 * 2 + 10 * 4
    assert found.buckets == found.resting_buckets == 2040


def test_paged_states_without_zero_are_unified_memory() -> None:
    found = cost(ZeroSetup(0, 2), [(200_000, 2)] * 2, optim="paged_adamw_32bit")
    assert (found.optimizer_states, found.unified) == (0, 2 * 2 * 200_000 * 4)
    with_zero = cost(ZeroSetup(1, 2), [(200_000, 2)] * 2, optim="paged_adamw_32bit")  # a flat part of 200,000
    assert (with_zero.optimizer_states, with_zero.unified) == (0, 2 * 200_000 * 4)


def test_stage_2_shares_states_and_fp32_weights() -> None:
    """What two gloo processes held: a flat bfloat16[1536], float32[768], two states of float32[768] and a step."""
    found = cost(ZeroSetup(2, 2, reduce_bucket_size=3000), optim="adamw_torch_fused")
    assert found.adapters == 1536 * 2
    assert found.master_weights == 768 * 4
    assert found.optimizer_states == 2 * 768 * 4 + 4
    assert (found.buckets, found.resting_buckets) == (3000 * 2, 0)
    # All gradients fit the bucket, whose slices for two ranks are concatenated: 1536. What is kept is at most
    # 768 and the rest of two tensors that a partition's edges cut, 2 · 255, and no more than that.
    assert found.gradients == 1536 * 2
    touched = 768 + 2 * 255
    assert found.step == touched * 2 + 768 * 2 + 768 * 4  # as reduced, flat, and in fp32
    assert (found.base_weights, found.unquantised) == (0, TOY_BASE)


def test_stage_2_measured_step() -> None:
    """16 tensors of 262,144: a profile of the step peaked at 16,777,216 bytes beside what was there before."""
    found = cost(ZeroSetup(2, 2, reduce_bucket_size=10**6), [(262_144, 2)] * 16, optim="adamw_torch_fused")
    own = 2_097_152
    exact = own * 2 + own * 2 + own * 4
    assert exact == 16_777_216
    assert found.step == exact + 2 * 262_143 * 2  # here no partition's edge cuts a tensor
    # The backward pass peaked at 8,274,300 with its activations. Bucket 2,000,000; kept 4,194,304; a reduction of
    # three tensors 1,572,864; the next gradient 524,288. The bound takes a full bucket, and cut tensors.
    assert 2_000_000 + 4_194_304 + 1_572_864 + 524_288 == 8_291_456
    assert found.buckets + found.gradients == 2_000_000 + (own + 2 * 262_143 + 10**6 + 262_144) * 2


def test_stage_1_keeps_all_gradients_for_the_last_micro_batch() -> None:
    one = cost(ZeroSetup(1, 2, reduce_bucket_size=3000), accumulates=True)
    two = cost(ZeroSetup(2, 2, reduce_bucket_size=3000), accumulates=True)
    assert one.gradients == one.kept_gradients == 1536 * 2
    assert two.kept_gradients == (768 + 2 * 255) * 2
    assert two.gradients == (768 + 2 * 255) * 2 + 1536 * 2  # those kept, and a reduction of the new ones
    assert (one.master_weights, one.optimizer_states) == (two.master_weights, two.optimizer_states)


def test_stage_1_with_a_small_bucket() -> None:
    # 1536 values through a bucket of 600: at least 600 - 256 have gone in when the partition's gradients appear.
    found = cost(ZeroSetup(1, 2, reduce_bucket_size=600))
    assert found.gradients == (1536 - (600 - 256) + (768 + 2 * 255)) * 2


def test_padding_to_twice_the_processes() -> None:
    # 21 values for 2 processes: 24 = 2 · 12, and 12 is the next even number above 10.5. 6 values: 8 = 2 · 4.
    assert cost(ZeroSetup(1, 2), [(7, 2)] * 3).adapters == 24 * 2
    assert cost(ZeroSetup(1, 2), [(3, 2)] * 2).adapters == 8 * 2
    assert cost(ZeroSetup(1, 2), [(7, 2)] * 3).master_weights == 12 * 4
    # Stage 3 pads each tensor by itself: three times 4.
    assert cost(ZeroSetup(3, 2), [(7, 2)] * 3).master_weights == 12 * 4
    # Three processes, as they ran: 60 values are 20 each; 400 frozen are 134, 10 are 4 and 100 are 34.
    tensors, frozen = [(30, 2)] * 3, [Frozen(400, 2, 2), Frozen(10, 2, 1, 1), Frozen(100, 2, 1, 1)]
    setup = ZeroSetup(3, 3, param_persistence_threshold=0)
    found = cost(setup, tensors, frozen=frozen, unquantised=1820)
    assert found.unquantised == (2 * 134 + 4 + 34) * 2
    assert found.master_weights == 3 * 10 * 4


def test_buckets_have_their_full_size_whatever_is_trained() -> None:
    assert cost(ZeroSetup(2, 2)).buckets == GB  # 5e8 values of 2 bytes
    assert cost(ZeroSetup(2, 2, overlap_comm=True)).buckets == 2 * GB
    assert cost(ZeroSetup(2, 2), [(256, 4)] * 6, half=False).buckets == 2 * GB
    third = cost(ZeroSetup(3, 2, overlap_comm=True))
    assert third.buckets == third.resting_buckets == GB


def test_buckets_follow_what_is_trained() -> None:
    few = ZeroSetup.derived(3, 2, "none", trained=[100, 300], hidden_size=4096)
    assert (few.reduce_bucket_size, few.prefetch_bucket_size) == (400, 15_099_494)
    assert few.param_persistence_threshold == 40_960
    many = ZeroSetup.derived(2, 2, "none", trained=[500_000] * 100, hidden_size=4096)
    assert many.reduce_bucket_size == 2**24
    assert many.param_persistence_threshold == 500_000  # what is trained stays whole
    large = ZeroSetup.derived(2, 2, "none", trained=[2**25, 5], hidden_size=4096)
    assert large.reduce_bucket_size == 2**25


def test_stage_3_shares_the_weights() -> None:
    """What two gloo processes held: bfloat16[768] twice (weights, gradients), float32[768], half of the base."""
    setup = ZeroSetup(
        3, 2, reduce_bucket_size=3000, param_persistence_threshold=0, prefetch_bucket_size=0, max_reuse_distance=0
    )
    found = cost(setup, optim="adamw_torch_fused")
    assert found.adapters == 768 * 2
    assert found.master_weights == 768 * 4
    assert found.unquantised == TOY_BASE // 2
    assert found.kept_gradients == 768 * 2
    assert found.gradients == 768 * 2 + 1536 * 2  # what stays, and a reduction's copy
    assert found.step == 768 * 2 + 768 * 2 + 768 * 4
    assert found.gather == 256 * 64 * 2  # the embedding is larger than a layer
    # What is small stays whole beside its shard: norms of 64 and the trained 256.
    found = cost(replace(setup, param_persistence_threshold=256))
    assert found.adapters == 768 * 2 + 1536 * 2
    assert found.unquantised == TOY_BASE // 2 + 3 * 64 * 2


def test_stage_3_steps_on_fp32_weights_themselves() -> None:
    tensors = [(256, 4)] * 6
    assert cost(ZeroSetup(3, 2), tensors, half=False).master_weights == 0
    assert cost(ZeroSetup(2, 2), tensors, half=False).master_weights == 768 * 4


def test_stage_3_with_one_process_is_no_second_copy() -> None:
    found = cost(ZeroSetup(3, 1))
    assert (found.adapters, found.unquantised, found.gather) == (1536 * 2, TOY_BASE, 0)


def test_gathered_at_once() -> None:
    setup = ZeroSetup(
        3,
        2,
        param_persistence_threshold=64,
        prefetch_bucket_size=1000,
        max_live_parameters=4000,
        max_reuse_distance=0,
    )
    # 4000 ahead, the head's 16,384 in use, and the tensor in which 1000 and another 16,384 came.
    assert cost(setup).gather == (4000 + 16384 + 1000 + 16384) * 2
    # A weight is kept where it recurs within 30,000 values there and back: 15,000 of them, whatever max_live says.
    reused = replace(setup, prefetch_bucket_size=0, max_reuse_distance=30_000)
    assert cost(reused).gather == (15_000 + 16384) * 2
    # Never more than there is: 2 · 16,384 + 3 · 4096 + 6 · 256 values.
    assert cost(replace(reused, max_reuse_distance=GB)).gather == (2 * 16384 + 3 * 4096 + 1536) * 2


def test_stage_3_shards_nf4_and_keeps_its_scales() -> None:
    """Two processes trained NF4 in uint8 with sharded weights, and with the same loss as in stage 2."""
    spec = LLAMA_2_7B
    frozen = frozen_tensors(spec, nf4=True, width=2)
    quantised, plain = base_weights(spec, nf4=True, nested=True, width=2, rounding=1)
    packed = spec.num_linear_parameters // 2
    assert packed == sum(each.numel * each.count for each in frozen if each.width == 1)
    setup = ZeroSetup(3, 4, prefetch_bucket_size=15_099_494, param_persistence_threshold=40_960)
    tensors = [(16 * 4096, 2)] * 128  # LoRA of rank 16 on q and v
    whole = {"frozen": frozen, "base_weights": quantised, "unquantised": plain, "rounding": 1}
    found = cost(setup, tensors, **whole)
    assert found.base_weights == packed // 4 + (quantised - packed)
    norms = 65 * 4096 * 2  # 4096 is below the threshold of 40,960
    angles = plain - sum(each.numel * each.count * 2 for each in frozen if each.width == 2)
    assert found.unquantised == 2 * 32000 * 4096 * 2 // 4 + norms // 4 + norms + angles
    # All layers kept: bitsandbytes holds each gathered weight, so all of it is there, and the shards.
    kept = cost(replace(setup, prefetch_bucket_size=0, max_reuse_distance=0), tensors, **whole, kept_layers=32)
    alone = cost(replace(setup, prefetch_bucket_size=0, max_reuse_distance=0), tensors, **whole)
    assert alone.gather == 32000 * 4096 * 2  # lm_head; a layer is 101 MB
    assert kept.gather == alone.gather + packed
    assert any("4-bit" in note for note in kept.notes) and not any("4-bit" in note for note in alone.notes)


def test_stages_below_3_leave_the_base_alone() -> None:
    for stage in (0, 1, 2):
        found = cost(ZeroSetup(stage, 4), base_weights=12345)
        assert (found.base_weights, found.unquantised, found.gather) == (12345, TOY_BASE, 0)


def test_optimizer_offload_of_stage_2() -> None:
    """What two gloo processes held on the host: float32[768] four times, bfloat16[768] and bfloat16[256]."""
    found = cost(ZeroSetup(2, 2, "optimizer", reduce_bucket_size=3000), optim="adamw_torch_fused")
    assert (found.optimizer_states, found.master_weights, found.step) == (0, 0, 0)
    assert found.host_pinned == 768 * 4 + 768 * 4 + (768 + 256) * 2
    assert found.host == 2 * 768 * 4 + 4  # torch's Adam counts its steps in a tensor
    assert found.buckets == (3000 + 256) * 2  # and a tensor on the device through which gradients go
    assert found.resting_buckets == 256 * 2
    more = cost(ZeroSetup(2, 2, "optimizer", reduce_bucket_size=3000), optim="adamw_torch", accumulates=True)
    assert more.host_pinned == found.host_pinned + (768 + 2 * 255) * 2
    assert more.kept_gradients == 0


def test_full_offload_of_stage_3() -> None:
    setup = ZeroSetup(3, 2, "all", reduce_bucket_size=3000, param_persistence_threshold=64)
    found = cost(setup, optim="adamw_torch_fused")
    assert (found.adapters, found.optimizer_states, found.master_weights, found.step) == (0, 0, 0, 0)
    assert found.unquantised == 3 * 64 * 2  # the norms
    # fp32 gradients, bf16 gradients, bf16 adapters, and the base's half.
    assert found.host_pinned == 768 * 4 + 768 * 2 + 768 * 2 + TOY_BASE // 2
    # The fp32 weights are not page-locked here, nor are the states and the step count.
    assert found.host == 768 * 4 + 2 * 768 * 4 + 4
    alone = cost(replace(setup, processes=1), optim="adamw_torch_fused")
    assert alone.unquantised == 3 * 64 * 2 and alone.gather > 0


def test_bitsandbytes_states_of_a_flat_part() -> None:
    """Two processes held uint8[32768] twice with float32[128] scales each for 65,536 trained values."""
    found = cost(ZeroSetup(2, 2), [(16384, 2)] * 4, optim="adamw_8bit")
    assert found.optimizer_states == 2 * 32768 + 2 * 128 * 4


def test_adafactor_does_not_factor_a_flat_part() -> None:
    """Two processes held exp_avg_sq as float32[768]."""
    assert cost(ZeroSetup(2, 2), optim="adafactor").optimizer_states == 768 * 4


def test_all_trained_tensors_become_16_bit() -> None:
    found = cost(ZeroSetup(2, 2), [(256, 2), (256, 4)])
    assert found.adapters == 512 * 2
    assert any("16-bit" in note for note in found.notes)


def test_frozen_tensors_are_all_of_the_model() -> None:
    spec = replace(LLAMA_2_7B, linears=tuple(replace(linear, bias=True) for linear in LLAMA_2_7B.linears))
    assert sum(each.numel * each.count for each in frozen_tensors(spec, nf4=False, width=2)) == spec.num_parameters


# ---- refused, or worth a note ----


@pytest.mark.parametrize(
    ("setup", "more", "words"),
    [
        ({"stage": 0, "processes": 2, "offload": "optimizer"}, {}, "without ZeRO"),
        ({"stage": 2, "processes": 2, "offload": "all"}, {}, "does not offload weights"),
        ({"stage": 1, "processes": 7}, {}, "6 trained tensors"),
        ({"stage": 3, "processes": 7}, {}, "6 trained tensors"),
        ({"stage": 2, "processes": 2}, {"half": False}, "16-bit"),
    ],
)
def test_refused_with_a_hint(setup: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        cost(ZeroSetup(**setup), **more)
    assert caught.value.hint


def test_ddp_takes_more_processes_than_tensors() -> None:
    assert cost(ZeroSetup(0, 64)).buckets == 1536 * 2


def test_one_process_is_allowed_and_said_to_share_nothing() -> None:
    for stage in (1, 2, 3):
        assert any("one process" in note for note in cost(ZeroSetup(stage, 1)).notes)
    assert cost(ZeroSetup(2, 2, reduce_bucket_size=1536)).notes == ()
    assert any("1,536 trained values" in note for note in cost(ZeroSetup(2, 2)).notes)


# ---- for any tensors ----

PARTS = [
    "base_weights", "unquantised", "optimizer_states", "gradients", "kept_gradients", "step", "master_weights",
    "buckets", "resting_buckets", "gather", "host_pinned", "host",
]  # fmt: skip
many = st.lists(st.integers(1, 50_000).map(lambda size: (size, 2)), min_size=16, max_size=40)
stages = st.sampled_from([1, 2, 3])
pairs = st.tuples(st.integers(2, 16), st.integers(2, 16)).map(sorted)
buckets = st.sampled_from([1, 1000, 100_000, 5 * 10**8])


@given(many, stages, pairs, buckets, st.booleans(), st.booleans())
def test_more_processes_raise_nothing(tensors, stage, counts, bucket, accumulates, overlap) -> None:
    few, more = (
        cost(
            ZeroSetup(stage, processes, reduce_bucket_size=bucket, overlap_comm=overlap), tensors,
            optim="adamw_torch", accumulates=accumulates, kept_layers=1,
        )
        for processes in counts
    )  # fmt: skip
    for name in PARTS:
        assert getattr(more, name) <= getattr(few, name), name
    # Stages 1 and 2 have the flat weights in full; their padding can grow, by less than 2 values a process.
    assert more.adapters < few.adapters + 2 * counts[1] * 2


@given(many, stages, st.integers(2, 16), buckets, st.booleans())
def test_the_first_division_shrinks_what_is_shared(tensors, stage, processes, bucket, accumulates) -> None:
    setup = ZeroSetup(stage, 1, reduce_bucket_size=bucket)
    alone = cost(setup, tensors, optim="adamw_torch", accumulates=accumulates)
    shared = cost(replace(setup, processes=processes), tensors, optim="adamw_torch", accumulates=accumulates)
    for name in ("optimizer_states", "kept_gradients", "step", "master_weights", "buckets"):
        assert getattr(shared, name) <= getattr(alone, name), name


@given(st.lists(st.integers(20_000, 50_000), min_size=64, max_size=80), stages, st.integers(1, 16), buckets)
def test_offload_never_raises_device_bytes(sizes, stage, processes, bucket) -> None:
    # A process's share is larger than any tensor: DeepSpeed keeps one on the device to pass gradients on.
    tensors = [(size, 2) for size in sizes]
    setup = ZeroSetup(stage, processes, reduce_bucket_size=bucket)
    costs = [cost(setup, tensors, optim="adamw_torch"), *(
        cost(replace(setup, offload=offload), tensors, optim="adamw_torch")
        for offload in (("optimizer", "all") if stage == 3 else ("optimizer",))
    )]  # fmt: skip
    for before, after in pairwise(costs):
        assert after.resting <= before.resting
        assert after.device <= before.device
        assert after.host_pinned + after.host > before.host_pinned + before.host


@given(many, st.integers(2, 16), st.booleans())
def test_states_shrink_with_the_stage(tensors, processes, in_fp32) -> None:
    tensors = [(size, 4 if in_fp32 else 2) for size, _ in tensors]
    none, first, second, third = (
        cost(ZeroSetup(stage, processes), tensors, optim="adamw_torch", half=not in_fp32).optimizer_states
        for stage in (0, 1, 2, 3)
    )
    # States are fp32 under ZeRO and in the tensors' dtype without it: with two processes and bf16 it is the same.
    padding = 2 * 2 * 4
    assert second <= first <= none + padding
    assert second - padding <= third <= second + len(tensors) * 2 * 4  # stage 3 rounds each tensor up by itself


@given(many, st.integers(1, 16), stages, st.booleans())
def test_rounding_only_adds(tensors, processes, stage, accumulates) -> None:
    plain = cost(ZeroSetup(stage, processes), tensors, optim="adamw_torch", accumulates=accumulates)
    rounded = cost(
        ZeroSetup(stage, processes), tensors, optim="adamw_torch", accumulates=accumulates, rounding=512
    )
    for name in (
        "adapters",
        "optimizer_states",
        "gradients",
        "kept_gradients",
        "step",
        "master_weights",
        "buckets",
    ):
        assert getattr(rounded, name) >= getattr(plain, name)
        assert getattr(rounded, name) % 512 == 0
