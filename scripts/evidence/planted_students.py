"""Students that distil a teacher, by qhybrid's adapters: for scripts/evidence/planted_ranks.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from planted_teachers import Lesson, Sizes, divergence, log_probabilities, recipe_of, scheduled
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qhybrid.adapters.adalora import add_regularizer
from qhybrid.adapters.allocator import RankAllocator, Triplets
from qhybrid.adapters.attach import ADAPTER, adapted_modules, attach
from qhybrid.adapters.parameter_groups import parameter_groups
from qhybrid.adapters.schedule import plan_schedules
from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.data.tokenize import EncodedRow
from qhybrid.evaluation.forward import batches, padded
from qhybrid.ranks.decide import InitialValues, decide_ranks
from qhybrid.recipe.schema import Recipe

ARMS = ("uniform", "increasing", "decreasing", "random", "adalora", "gora", "eva", "oracle")
PROBED_WINDOWS = 512  # that GoRA and EVA look at
ADALORA = {"alpha": 32.0}  # what trains it here; `planted_ranks.py` tries others
_WARM_UP = 0.05  # of the steps
_CLIP = 1.0  # norm of the gradients, as in a run


@dataclass(frozen=True)
class Student:
    """What a student starts with."""

    recipe: Recipe
    layout: Layout
    initial: InitialValues = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)  # gora and eva: by module


@dataclass(frozen=True)
class Learnt:
    """What a student ends with."""

    missed: Tensor  # KL to the teacher on each held-out window, nats
    ranks: dict[str, int]  # by module; AdaLoRA's live ones
    scores: dict[str, float]  # AdaLoRA: by module, the sum of its triplets' scores at the final choice
    parameters: int  # Σ r·(in + out) of `ranks`


def adalora_student(sizes: Sizes, alpha: float | None = None, **settings: Any) -> Student:
    """AdaLoRA from twice the average rank to the average."""
    band = {"kind": "adalora", "rank": sizes.average_rank, **({} if alpha is None else {"alpha": alpha})}
    recipe = recipe_of([{**band, "adalora": {"init_rank": 2 * sizes.average_rank, **settings}}])
    return Student(recipe, build_layout(recipe, sizes.spec))


def student_of(
    arm: str,
    base: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    truth: Layout,
    lesson: Lesson,
    sizes: Sizes,
    seed: int,
) -> Student:
    """The student of one arm. All but AdaLoRA are plain LoRA and differ in ranks, GoRA and EVA also in A and B."""
    if arm == "adalora":
        return adalora_student(sizes, **ADALORA)
    if arm in ("gora", "eva"):
        return _by_data(arm, base, teacher, lesson, sizes, seed)
    layout = truth if arm == "oracle" else scheduled(sizes, arm, **({"seed": seed} if arm == "random" else {}))
    return Student(recipe_of([{}]), layout)


def _by_data(
    method: str, base: LlamaForCausalLM, teacher: LlamaForCausalLM, lesson: Lesson, sizes: Sizes, seed: int
) -> Student:
    section = {"method": method, "budget": sizes.budget, "rows": min(PROBED_WINDOWS, sizes.lesson_windows)}
    recipe = recipe_of({"ranks": section}, seed=seed, per_device_train_batch_size=64)
    rows = [{"input_ids": ids, "labels": ids} for ids in lesson.windows.tolist()]

    def losses(model: PreTrainedModel, chosen: Sequence[EncodedRow], batch_size: int) -> Iterator[Tensor]:
        for batch in batches(chosen, batch_size, model):
            ids, _, _ = padded(batch)
            said = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            yield divergence(log_probabilities(teacher, ids), said).sum() / len(chosen)

    decision = decide_ranks(
        copy.deepcopy(base), recipe, build_layout(recipe, sizes.spec), Dataset.from_list(rows), losses=losses
    )
    return Student(recipe, decision.layout, decision.initial, decision.importance)


def learn(
    student: Student, base: LlamaForCausalLM, lesson: Lesson, sizes: Sizes, *, learning_rate: float, seed: int
) -> Learnt:
    """Distil: AdamW on KL(teacher ‖ student), the rate falling to zero; AdaLoRA's steps in the trainer's order."""
    torch.manual_seed(seed)
    layout = student.layout
    model = attach(copy.deepcopy(base), layout, dtype=torch.float32, initial=student.initial)
    model.train()
    groups = parameter_groups(model, layout, learning_rate=learning_rate, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, foreach=True)
    trained = [parameter for group in groups for parameter in group["params"]]

    def rate(step: int) -> float:
        return min((step + 1) / (_WARM_UP * sizes.steps), 1 - step / sizes.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bands = [_AdaLora(model, student, band.band, sizes.steps) for band in student.recipe.adapters
             if band.kind == "adalora"]  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    batch_of_step: list[Tensor] = []
    for step in range(1, sizes.steps + 1):
        if not batch_of_step:
            batch_of_step = list(torch.randperm(len(lesson.windows), generator=order).split(sizes.batch))
        chosen = batch_of_step.pop()
        said = model(input_ids=lesson.windows[chosen], use_cache=False).logits.log_softmax(-1)
        divergence(lesson.answers[chosen], said).mean().backward()
        for band in bands:
            band.finish_gradients(step)
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for band in bands:
            band.allocator.allocate(step)
    model.eval()
    ranks = {row.module: row.rank for row in layout}
    scores: dict[str, float] = {}
    for band in bands:
        ranks |= band.allocator.live_ranks()
        scores |= {module: float(of.sum()) for module, of in band.allocator.scores().items()}
    parameters = sum(ranks[row.module] * (row.in_features + row.out_features) for row in layout)
    return Learnt(lesson.missed(model), ranks, scores, parameters)


class _AdaLora:
    """The allocator of a band, and what happens to its gradients."""

    def __init__(self, model: Any, student: Student, band: str, steps: int) -> None:
        (section,) = (each for each in student.recipe.adapters if each.band == band)
        self.settings = section.adalora_settings
        rows = {row.module for row in student.layout.of_band(band)}
        triplets = {
            row.module: Triplets(
                module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.lora_lambda[ADAPTER]
            )
            for row, module in adapted_modules(model, student.layout)
            if row.module in rows
        }
        self._pairs = [(each.p, each.q) for each in triplets.values()]
        schedule = plan_schedules(student.recipe.adapters, student.layout, steps)[band]
        self.allocator = RankAllocator(band, triplets, schedule, self.settings.beta1, self.settings.beta2)

    def finish_gradients(self, step: int) -> None:
        choosing = step <= self.allocator.schedule.last_allocation
        if choosing and not self.settings.regularizer_in_scores:
            self.allocator.observe()
        if self.settings.regularizer_weight > 0:
            add_regularizer(self._pairs, self.settings.regularizer_weight)
        if choosing and self.settings.regularizer_in_scores:
            self.allocator.observe()
