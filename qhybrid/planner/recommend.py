"""A starting recipe from task, data and model, with a reason and a source for each number.

It is a wish: nothing here looks at memory. Every band may be cut down to MIN_RANK in steps of MULTIPLE.
docs/recommend.md has the rule, its evidence, and what nobody has measured.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from qhybrid.architecture.spec import ModelSpec
from qhybrid.errors import RecipeError
from qhybrid.planner.recommendation import ADALORA_RATE, Choice, Recommendation
from qhybrid.recipe.band import AdaLoraSection, BandSection
from qhybrid.units import format_count

Task = Literal[
    "classification", "extraction", "rewriting", "instruction", "generation", "reasoning", "code", "seq2seq"
]

MIN_RANK = 4  # no band goes below it, whatever the memory
MULTIPLE = 4  # every rank is a multiple of it
MAX_RANK = 256  # the highest that the sources recommend
RSLORA_RANK = 64  # from this middle rank on, plain bands divide by the root of the rank
MIN_ADALORA_STEPS = 100

# Rows for one optimizer step are the product, as in QLoRA's runs.
_MICRO_BATCH, _ACCUMULATION = 4, 4
_ALPHA = 32.0
# rsLoRA with this alpha has the scale of LoRA with alpha 32 at rank 16: 8/√16 = 32/16.
_RSLORA_ALPHA = 8.0
_ADALORA_SCALE = 4.0  # on SmolLM2 AdaLoRA was best at four times LoRA's, beside the higher rate
# Of the decoder's linears: QLoRA's 13B models lie below the second and its 33B models above it.
_SMALL_MODEL, _LARGE_MODEL = 5e9, 20e9

_WITHOUT_REGRET = "LoRA Without Regret, Thinking Machines 2025"
_TINKER = "Tinker's LoRA primer, Thinking Machines 2025: at least as many parameters as trained tokens"
_QLORA = "QLoRA, arXiv 2305.14314"
_ADALORA = "AdaLoRA, arXiv 2303.10512"
_RSLORA = "rsLoRA, arXiv 2312.03732"
_BIDERMAN = "LoRA Learns Less and Forgets Less, arXiv 2405.09673"
_PEFT = "peft's MetaMathQA benchmark, one seed"
_SMOLLM2 = "docs/evidence.md: SmolLM2-135M on GSM8K, 40 steps, three seeds"
_PLANTED = "docs/evidence.md: planted ranks on a tiny LLaMA, five seeds"
_THUMB = "rule of thumb, not measured"

_Told = tuple[Any, str, str]  # a value, the reason and the source


@dataclass(frozen=True)
class _Profile:
    """What a task says before its rows are seen."""

    floor: int  # the rank where the data would do with less
    tokens_per_row: int  # that the loss is taken on: an assumption, for rows that nobody has counted


_PROFILES = {
    "classification": _Profile(8, 8),  # a label and the end token
    "extraction": _Profile(8, 64),
    "rewriting": _Profile(16, 128),  # translations, summaries, changes of style
    "instruction": _Profile(16, 256),
    "generation": _Profile(16, 256),
    "reasoning": _Profile(32, 512),
    "code": _Profile(32, 256),
}
_ALIASES = {"seq2seq": "rewriting"}
_FLOOR_REASONS = {
    8: ("a short answer needs little, and the rank hardly matters with all linears adapted", _QLORA),
    16: ("a common start; the rank hardly matters with all linears adapted", _QLORA),
    32: ("long derivations are where low ranks fell behind: 16 to 64 in code", _BIDERMAN),
}


def recommend(spec: ModelSpec, *, task: str, rows: int, tokens_per_row: int | None = None) -> Recommendation:
    """Propose bands and training settings for `rows` rows of `task` on the model `spec`.

    The rank starts at a floor that depends on the task and doubles until the adapter has as many parameters as
    there are trained tokens. It falls as models grow, since each rank has more parameters there. It is the same in
    all bands, at least MIN_RANK and a multiple of MULTIPLE. With too few steps for AdaLoRA, or fewer than three
    layers, there is one band. Memory is not looked at.

    Args:
        task: one of the words of `Task`.
        rows: training rows.
        tokens_per_row: the average number of tokens in a row that the loss is taken on: for most data those of the
            answer. Left out, an average of the task is assumed, and a note says so.

    Raises:
        RecipeError: an unknown task, a count below 1, or a module that is too narrow for MIN_RANK.
    """
    name = _find_task(task)
    if rows < 1:
        raise RecipeError(f"rows is {rows}: a recommendation needs at least 1 row")
    if tokens_per_row is not None and tokens_per_row < 1:
        raise RecipeError(
            f"tokens_per_row is {tokens_per_row}: it must be at least 1",
            hint="leave it out to assume an average of the task",
        )
    per_row = tokens_per_row or _PROFILES[name].tokens_per_row
    epochs = 3 if rows < 10_000 else 2 if rows < 50_000 else 1
    steps = epochs * -(-rows // (_MICRO_BATCH * _ACCUMULATION))  # rounded up, exact for any size
    rate = _learning_rate(spec)
    rank = _rank(spec, name, rows * per_row)
    bands: list[BandSection] = []
    choices: list[Choice] = []
    few_steps = f"{steps} optimizer steps are too few for AdaLoRA to score triplets and drop some"
    names = ("bottom", "middle", "top") if steps >= MIN_ADALORA_STEPS and spec.num_layers >= 3 else ("all",)
    for band in names:
        values = _adalora_band(rank) if band == "middle" else _plain_band(rank, rooted=rank[0] >= RSLORA_RANK)
        if steps < MIN_ADALORA_STEPS:
            values["kind"] = (values["kind"][0], few_steps, f"{_THUMB}; {_ADALORA}, trains for thousands")
        elif band in ("middle", "top"):
            values["rank"] = rank[0], "as everywhere: no profile along the depth is known to help", _PLANTED
        values["dropout"] = _dropout(spec, epochs)
        values["target_modules"] = (("all-linear",), "attention alone learns less", _WITHOUT_REGRET)
        bands.append(_section(band, band, values))
        choices += [Choice(f"adapters.{band}.{key}", *told) for key, told in values.items()]
    training = _training(rows, epochs, rate)
    choices += [Choice(f"training.{key}", *told) for key, told in training.items()]
    basis = f", an assumption for {name}: count yours and give tokens_per_row" if tokens_per_row is None else ""
    return Recommendation(
        tuple(bands),
        {key: told[0] for key, told in training.items()},
        tuple(choices),
        tokens=rows * per_row,
        about_tokens=f"{format_count(rows)} rows with {per_row} in each{basis}",
        per_rank=_per_rank(spec),
        about_memory=f"Not capped to memory. Ranks may be cut to {MIN_RANK} in steps of {MULTIPLE}.",
    )


def _find_task(task: str) -> str:
    word = task.strip().lower()
    if word in _PROFILES:
        return word
    if word in _ALIASES:
        return _ALIASES[word]
    known = [*_PROFILES, *_ALIASES]
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    raise RecipeError(
        f"unknown task {task!r}",
        hint=(f"did you mean {nearest[0]!r}? " if nearest else "") + f"known: {', '.join(known)}",
    )


def _per_rank(spec: ModelSpec) -> int:
    """Parameters of one rank with every linear adapted: 2,498,560 for Llama-2-7B."""
    return spec.num_layers * sum(linear.in_features + linear.out_features for linear in spec.linears)


def _highest_rank(spec: ModelSpec) -> int:
    """Half the smallest side of a linear: up to there no adapter has more parameters than its matrix."""
    side, target = min((min(lin.in_features, lin.out_features), lin.target) for lin in spec.linears)
    if side < 2 * MIN_RANK:
        raise RecipeError(
            f"{target} is only {side} wide: too narrow for an adapter of rank {MIN_RANK}",
            hint="write the bands by hand, with target_modules that leave it out",
        )
    return min(MAX_RANK, side // 2 // MULTIPLE * MULTIPLE)


def _rank(spec: ModelSpec, task: str, tokens: int) -> _Told:
    """The rank of all bands, in doublings: the argument is good for an order of magnitude."""
    floor, highest, per_rank = _PROFILES[task].floor, _highest_rank(spec), _per_rank(spec)
    rank = min(floor, highest)
    while rank < highest and rank * per_rank < tokens:
        rank = min(2 * rank, highest)
    if rank == highest < MAX_RANK:
        return rank, "half the smallest side of a module, where LoRA is as large as the matrix", _THUMB
    if rank == floor:
        return rank, *_FLOOR_REASONS[floor]
    against = f"{format_count(rank * per_rank)} parameters for {format_count(tokens)} trained tokens"
    if rank * per_rank < tokens:
        return rank, f"the highest in the sources; {against}", f"{_WITHOUT_REGRET}; {_BIDERMAN}"
    return rank, f"{against}, in doublings", _TINKER


def _plain_band(rank: _Told, *, rooted: bool) -> dict[str, _Told]:
    """LoRA, or rsLoRA where ranks are high. LoRA+ and DoRA were no better on SmolLM2, and DoRA is slower."""
    if rooted:
        scale = f"scale {_RSLORA_ALPHA:g}/√r: LoRA's with alpha {_ALPHA:g} at rank 16"
        return {
            "kind": ("rslora", "at high ranks a scale of alpha/r slows learning", _RSLORA),
            "rank": rank,
            "alpha": (_RSLORA_ALPHA, scale, _THUMB),
        }
    return {
        "kind": ("lora", "DoRA and LoRA+ were no better, and DoRA is slower", f"{_SMOLLM2}; {_PEFT}"),
        "rank": rank,
        "alpha": (_ALPHA, "the same for every rank, so that one learning rate suits them all", _WITHOUT_REGRET),
    }


def _adalora_band(rank: _Told) -> dict[str, _Told]:
    """AdaLoRA, at a rate of its own."""
    return {
        "kind": ("adalora", "moves rank to where it is used; alone in all layers it was the best", _SMOLLM2),
        "rank": rank,
        "alpha": (_ALPHA * _ADALORA_SCALE, "4 times LoRA's: Λ starts at zero, and P and Q small", _SMOLLM2),
        "lr_ratio": (ADALORA_RATE, "its best rate was 3 times LoRA's", _SMOLLM2),
        "adalora.init_rank": (rank[0] * 3 // 2, "1.5 times the rank at the end", _ADALORA),
        "adalora.warmup": (0.1, "a tenth of the steps with all triplets, to score them", _THUMB),
        "adalora.final": (0.3, "three tenths of the steps with the final ranks", _THUMB),
    }


def _section(band: str, layers: str, values: dict[str, _Told]) -> BandSection:
    section: dict[str, Any] = {"band": band, "layers": layers}
    nested: dict[str, Any] = {}
    for key, told in values.items():
        (nested if key.startswith("adalora.") else section)[key.rpartition(".")[2]] = told[0]
    if nested:
        section["adalora"] = AdaLoraSection(**nested)
    return BandSection(**section)


def _dropout(spec: ModelSpec, epochs: int) -> _Told:
    if epochs == 1:
        return 0.0, "no row is seen twice, so there is little to overfit", _THUMB
    large = spec.num_linear_parameters > _LARGE_MODEL
    reason = f"rows are seen {epochs} times; for models {'above' if large else 'up to'} 13 billion"
    return 0.05 if large else 0.1, reason, _QLORA


def _learning_rate(spec: ModelSpec) -> _Told:
    """The rate, from three sizes of model."""
    if spec.num_linear_parameters < _SMALL_MODEL:
        rate, size, source = (
            5e-4,
            "below 5 billion",
            f"{_WITHOUT_REGRET}, has it fall with width; the value: {_THUMB}",
        )
    elif spec.num_linear_parameters < _LARGE_MODEL:
        rate, size, source = 2e-4, "of 7 and 13 billion", f"{_QLORA}, table 9"
    else:
        rate, size, source = 1e-4, "above 13 billion", f"{_QLORA}, table 9"
    return rate, f"for models {size}", source


def _training(rows: int, epochs: int, rate: _Told) -> dict[str, _Told]:
    batch = f"with {_ACCUMULATION} steps of accumulation {_MICRO_BATCH * _ACCUMULATION} rows for an optimizer step"
    return {
        "num_train_epochs": (float(epochs), f"few rows are seen up to 3 times; here {format_count(rows)}", _THUMB),
        "per_device_train_batch_size": (_MICRO_BATCH, batch, _QLORA),
        "gradient_accumulation_steps": (
            _ACCUMULATION, "large batches cost LoRA more than full fine-tuning", _WITHOUT_REGRET,
        ),
        "learning_rate": rate,
        "lr_scheduler_type": ("cosine", "as in peft's benchmark; QLoRA keeps the rate constant", _PEFT),
        "warmup_steps": (0.03, "3% of all optimizer steps", _QLORA),
        "weight_decay": (0.0, "none in QLoRA's runs", _QLORA),
    }  # fmt: skip
