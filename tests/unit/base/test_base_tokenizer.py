"""Which token pads, and what happens when there is no tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qhybrid.base.tokenizer import load_tokenizer
from qhybrid.errors import ModelError
from qhybrid.recipe.schema import ModelSection


def write(folder, *words, **special):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    vocabulary = {word: index for index, word in enumerate(["a", "b", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "a")))
    PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special).save_pretrained(folder)
    return folder


def load(folder, **settings):
    return load_tokenizer(ModelSection(path=str(folder), **settings))


@pytest.mark.parametrize(
    ("words", "special", "expected"),
    [
        (["<eos>", "<own>", "<pad>"], {"eos_token": "<eos>", "pad_token": "<own>"}, "<own>"),
        (
            ["<eos>", "<unk>", "<pad>", "<|finetune_right_pad_id|>"],
            {"eos_token": "<eos>"},
            "<|finetune_right_pad_id|>",
        ),
        (["<eos>", "<unk>", "<pad>"], {"eos_token": "<eos>"}, "<pad>"),
        (["<eos>", "<unk>"], {"eos_token": "<eos>", "unk_token": "<unk>"}, "<unk>"),
        (["<eos>"], {"eos_token": "<eos>"}, "<eos>"),
    ],
)
def test_the_padding_token(tmp_path, words, special, expected):
    folder = write(tmp_path, *words, **special)
    tokenizer = load(folder)
    assert tokenizer.pad_token == expected and tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id == tokenizer.get_vocab()[expected]
    assert len(tokenizer) == 2 + len(words)  # no token was added


def test_no_token_can_pad(tmp_path):
    with pytest.raises(ModelError, match="no padding token and no end-of-sequence token"):
        load(write(tmp_path))


def test_a_tokenizer_from_another_folder(tmp_path):
    write(tmp_path / "model", "<eos>", eos_token="<eos>")
    write(tmp_path / "other", "<pad>")
    assert load(tmp_path / "model", tokenizer=str(tmp_path / "other")).pad_token == "<pad>"


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path)
    # From this file alone transformers makes a tokenizer of three tokens.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)
