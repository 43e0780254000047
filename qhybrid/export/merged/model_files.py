"""What lies beside the weights of a merged model: configuration, generation settings, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qhybrid.architecture.spec import read_config
from qhybrid.base.tokenizer import save_tokenizer
from qhybrid.disk import write_bytes
from qhybrid.recipe.schema import Dtype
from qhybrid.redaction import redacted_values

CONFIG, GENERATION = "config.json", "generation_config.json"

# Entries of a base model's config.json that are not true of the result, or that lead out of its folder.
_NOT_CARRIED = ("quantization_config", "auto_map", "transformers_weights", "_name_or_path", "_commit_hash")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The base model's generation settings, if it has any.

    Raises:
        ModelError: they cannot be read.
    """
    file = folder / GENERATION
    return read_config(file) if file.is_file() else None


def write_model_files(
    folder: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    architecture: str,
    dtype: Dtype,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files, without secrets and local paths.

    The configuration stays in the base model's words: those of another version of transformers are not understood
    by every reader.

    Args:
        config, generation: the base model's. architecture: of what the weights are.
        tokenizer: its end token becomes one that ends a generation, beside those of the base.

    Raises:
        OSError: the disk is full or fails.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_CARRIED}
    # transformers wrote "torch_dtype" until version 4.55, and reads either.
    kept |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    _write_json(folder / CONFIG, kept)
    ending = _with_end(generation, config, tokenizer.eos_token_id)
    if ending:
        _write_json(folder / GENERATION, ending)
    save_tokenizer(tokenizer, folder)


def _with_end(generation: dict[str, Any] | None, config: dict[str, Any], end: Any) -> dict[str, Any] | None:
    """`generation`, ended by `end` too; training may have taught another end of an answer than the base's."""
    known = config if generation is None else generation
    ends = known.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [ends] if ends is not None else []
    if end is None or end in ends:
        return generation
    if generation is None:
        generation = {key: config[key] for key in _SPECIAL_TOKENS if config.get(key) is not None}
    return {**generation, "eos_token_id": [*ends, end] if ends else end}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_bytes(file, (json.dumps(redacted_values(content), indent=2, ensure_ascii=False) + "\n").encode())
