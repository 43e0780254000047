"""A run cut down to what decides about memory: two steps on full rows. For simulations, and for measuring them."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qhybrid.recipe.schema import Recipe

STEPS = 2  # the states that the first optimizer step makes are there in the second one's backward pass
SCHEDULE_STEPS = 1000  # of which the steps taken are the first: AdaLoRA scores, and does not yet allocate
_PAD_TOKEN = 0
_UNKNOWN_LENGTH = 1024


def shortened(recipe: Recipe) -> Recipe:
    """The recipe for STEPS optimizer steps, without evaluation, checkpoints, trackers and worker processes."""
    training = recipe.training.model_copy(
        update={
            "max_steps": STEPS,
            "gradient_accumulation_steps": min(recipe.training.gradient_accumulation_steps, 2),
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "report_to": "none",
            "logging_strategy": "no",
            "warmup_steps": 0,
            "dataloader_num_workers": 0,
            "dataloader_prefetch_factor": None,
            "dataloader_persistent_workers": False,
            "dataset_num_proc": None,
            "lr_scheduler_type": "constant",
            "lr_scheduler_kwargs": None,
        }
    )
    return recipe.model_copy(update={"training": training})


def full_rows(recipe: Recipe) -> Dataset:
    """As many full rows as the steps take; every token is trained on."""
    training = recipe.training
    length = training.max_length or _UNKNOWN_LENGTH
    number = training.per_device_train_batch_size * training.gradient_accumulation_steps * STEPS
    row = [_PAD_TOKEN + 1] * length
    return Dataset.from_dict({"input_ids": [row] * number, "labels": [row] * number})


def two_word_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one for its padding token; nothing is tokenised."""
    words = Tokenizer(models.WordLevel({"<pad>": _PAD_TOKEN, "word": 1}, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="word")
