"""Loads the tokenizer of the base model, with a padding token and right padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qhybrid.base.locate import tokenizer_folder
from qhybrid.disk import write_atomically
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection

# Tokens that models carry for padding, or that no text of theirs contains. Tried in this order.
_PADDING_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "<unk>")

# Entries of tokenizer_config.json that may be opened wherever they lead. Others, such as the tokenizer_file that
# old repositories carry, are replaced by the files of the folder.
_OPENED_AS_WRITTEN = ("vocab", "merges", "vocab_file", "merges_file", "spm_file")

_VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_TAKE_ANOTHER = "model.tokenizer names another folder or hub id to take the tokenizer from"


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Load `model.tokenizer`, or the tokenizer that comes with the model.

    A tokenizer without a padding token gets one that its vocabulary already has, so the embeddings keep
    their size: a token made for padding, else `<unk>`, else the end-of-sequence token.

    Raises:
        ModelError: there is no tokenizer, it needs code of its own, it names files outside its folder, or no token
            can serve as padding.
    """
    folder = tokenizer_folder(model)
    written = model.tokenizer or model.path
    # Without this, transformers makes up an empty tokenizer from the name of a class.
    if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARY_FILES):
        raise ModelError(f"{written} has no tokenizer", hint=_TAKE_ANOTHER)
    _refuse_files_elsewhere(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each tokenizer class raises what it likes
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the tokenizer of {written} cannot be loaded: {reason}", hint=_TAKE_ANOTHER) from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        found = [token for token in _PADDING_CANDIDATES if token in vocabulary]
        tokenizer.pad_token = found[0] if found else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {written} has no padding token and no end-of-sequence token",
            hint="set pad_token in its tokenizer_config.json",
        )
    tokenizer.padding_side = "right"
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, without the paths of this machine that some of them hold.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the tokenizers library tells of a full disk in an exception of its own
        raise OSError(f"the tokenizer cannot be written: {str(error).partition(chr(10))[0]}") from error
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        write_atomically(settings, settings.read_text(encoding="utf-8"))


def _refuse_files_elsewhere(file: Path) -> None:
    """Refuse a tokenizer_config.json that names files outside its folder."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it, or does without it
    if not isinstance(config, dict):
        return
    versions = config.get("fast_tokenizer_files")
    named = [name for name in versions if "/" in str(name)] if isinstance(versions, list) else []
    for key in _OPENED_AS_WRITTEN:
        name = config.get(key)
        # A path that is nothing here is a trace of the machine on which the tokenizer was made.
        if isinstance(name, str) and os.path.exists(name):
            named.append(name)
    if named:
        raise ModelError(
            f"{file} names the file {named[0]!r}, which is not one of its folder",
            hint="do not use this tokenizer, or remove the entry: it points outside its folder",
        )
