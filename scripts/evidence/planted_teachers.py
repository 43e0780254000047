"""Tiny LLaMAs, and teachers that differ from them by known ranks: for scripts/evidence/planted_ranks.py."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.layout import Layout
from qhybrid.architecture.spec import ModelSpec, spec_from_config
from qhybrid.recipe.load import parse_recipe, resolve
from qhybrid.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 128  # ASCII; other characters are read as "?"
PLANTS = ("increasing", "decreasing", "by_module", "uniform")
RATIO = 8.0  # the largest planted rank over the smallest, before rounding
TYPE_WEIGHTS = (8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0)  # by_module: which type has which is drawn for each seed

SIZE = 2.0  # of a planted term: its singular value over the root mean square of the weight's own
EFFECT = 5e-4  # nats: what a planted term moves the base by, where all move it by the same
LARGEST = 8.0  # ... but its singular value is at most that many times the root mean square
_EFFECT_WINDOWS = 32  # that it is measured on
_HELD_OUT = 0.1  # of each file: its end


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    layers: int = 6
    hidden: int = 64
    intermediate: int = 128
    heads: int = 4
    window_tokens: int = 32
    pretraining_steps: int = 400
    average_rank: int = 4
    lesson_windows: int = 2048
    held_out_windows: int = 256
    steps: int = 600
    batch: int = 8  # windows

    @property
    def config(self) -> LlamaConfig:
        """The model's."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=self.window_tokens,
            tie_word_embeddings=False,
        )

    @property
    def spec(self) -> ModelSpec:
        """What qhybrid knows of the model."""
        return spec_from_config(self.config.to_dict())

    @property
    def budget(self) -> int:
        """Σ r·(in + out) of every plant and every arm: what the average rank costs in all modules."""
        linears = sum(linear.in_features + linear.out_features for linear in self.spec.linears)
        return self.average_rank * self.layers * linears


@cache
def text(held_out: bool) -> Tensor:
    """The licence and the demo's data, byte by byte (bytes,) int64."""
    parts = []
    for file in (ROOT / "LICENSE", *sorted((ROOT / "recipes" / "data").glob("*.jsonl"))):
        content = file.read_text(encoding="utf-8").encode("ascii", "replace")
        cut = round(len(content) * (1 - _HELD_OUT))
        parts.append(content[cut:] if held_out else content[:cut])
    return torch.tensor(list(b"".join(parts)))


def windows(number: int, sizes: Sizes, seed: int, *, held_out: bool = False) -> Tensor:
    """Windows of the text, from anywhere (number, tokens)."""
    source = text(held_out)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - sizes.window_tokens, (number, 1), generator=generator)
    return source[starts + torch.arange(sizes.window_tokens)]


def pretrained(sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A base model: random weights, briefly trained on the text."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(sizes.config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, foreach=True)
    steps = sizes.pretraining_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        ids = windows(32, sizes, seed * steps + step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def recipe_of(adapters: Any, **training: Any) -> Recipe:
    """A recipe with these adapters; its model, data and output are not used."""
    sections = {
        "model": {"path": "unused", "dtype": "float32"},
        "adapters": adapters,
        "data": {"sources": "unused.jsonl"},
        "training": training,
        "output_dir": "unused",
    }
    return resolve(parse_recipe(json.dumps(sections), "planted ranks")[0])


def scheduled(sizes: Sizes, name: str, **settings: Any) -> Layout:
    """LoRA on all linears, by one of qhybrid's schedules at the common budget."""
    recipe = recipe_of({"schedule": {"name": name, "budget": sizes.budget, **settings}})
    return build_layout(recipe, sizes.spec)


def planted(sizes: Sizes, plant: str, seed: int) -> Layout:
    """The true ranks."""
    if plant == "by_module":
        weights = random.Random(seed).sample(TYPE_WEIGHTS, len(TYPE_WEIGHTS))
        types = [linear.target for linear in sizes.spec.linears]
        return scheduled(sizes, plant, weights=dict(zip(types, weights, strict=True)))
    return scheduled(sizes, plant, **({} if plant == "uniform" else {"ratio": RATIO}))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """What the model expects after each byte (windows, tokens, vocabulary) fp32."""
    parts = [model(input_ids=part, use_cache=False).logits for part in ids.split(64)]
    return torch.cat(parts).log_softmax(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, the mean over each window's tokens (windows,), from log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean(-1)


@torch.no_grad()
def teacher_of(
    base: LlamaForCausalLM, truth: Layout, sizes: Sizes, seed: int, *, equal_effect: bool
) -> LlamaForCausalLM:
    """The base with W + Σ c·u·vᵀ in each module: as many terms as its true rank, u and v orthonormal at random.

    c is SIZE times the root mean square of the module's singular values. Or, with `equal_effect`, what makes the
    term on its own move the base's predictions by EFFECT nats, by the square law from that size, up to LARGEST.
    """
    teacher, probe = copy.deepcopy(base), copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    ids = windows(_EFFECT_WINDOWS, sizes, seed)
    before = log_probabilities(base, ids)
    for row in truth:
        original = base.get_submodule(row.module).weight
        unit = original.norm() / math.sqrt(min(original.shape))
        u, v = (
            torch.linalg.qr(torch.randn(side, row.rank, generator=generator))[0]
            for side in (row.out_features, row.in_features)
        )
        for index in range(row.rank):
            term = SIZE * unit * torch.outer(u[:, index], v[:, index])
            factor = 1.0
            if equal_effect:
                probed = probe.get_submodule(row.module).weight
                probed.copy_(original + term)
                moved = float(divergence(before, log_probabilities(probe, ids)).mean())
                probed.copy_(original)
                factor = min(math.sqrt(EFFECT / max(moved, 1e-12)), LARGEST / SIZE)
            teacher.get_submodule(row.module).weight.add_(term, alpha=factor)
    return teacher


@torch.no_grad()
def functional_truth(
    base: LlamaForCausalLM, teacher: LlamaForCausalLM, truth: Layout, ids: Tensor
) -> dict[str, float]:
    """By module, how far the teacher without what was planted there is from the teacher, in nats."""
    whole, without = log_probabilities(teacher, ids), copy.deepcopy(teacher)
    found = {}
    for row in truth:
        weight = without.get_submodule(row.module).weight
        weight.copy_(base.get_submodule(row.module).weight)
        found[row.module] = float(divergence(whole, log_probabilities(without, ids)).mean())
        weight.copy_(teacher.get_submodule(row.module).weight)
    return found


class Lesson:
    """Windows of the text with what the teacher says to them."""

    def __init__(self, base: LlamaForCausalLM, teacher: LlamaForCausalLM, sizes: Sizes, seed: int) -> None:
        self.windows = windows(sizes.lesson_windows, sizes, seed)
        self.answers = log_probabilities(teacher, self.windows)
        # The same windows for every seed, as the bootstrap over seeds and windows supposes.
        self.held_out = windows(sizes.held_out_windows, sizes, 0, held_out=True)
        self.held_out_answers = log_probabilities(teacher, self.held_out)
        self.start = float(self.missed(base).mean())  # nats, of the base

    def missed(self, student: torch.nn.Module) -> Tensor:
        """KL(teacher ‖ student) on the held-out windows (windows,) in nats."""
        return divergence(self.held_out_answers, log_probabilities(student, self.held_out))


def settings_of_plants() -> dict[str, float]:
    """The constants above, for the record."""
    return {"ratio": RATIO, "size": SIZE, "effect_nats": EFFECT, "largest_size": LARGEST}
