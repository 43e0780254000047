"""Text token by token: whole characters, stop strings, and in the end what the tokenizer says of all tokens."""

from __future__ import annotations

import random

import pytest
from helpers import build_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qhybrid.serving.text import TextStream

TEXTS = [
    "",
    "a",
    "How many apples?",
    "naïve – 日本語 \U0001f30a\U0001f1e9\U0001f1f0 e\u0301",
    "a\n\n  b\ttab",
    "�",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_give_the_text(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    if text != "�":
        assert not any("�" in piece for piece in pieces)
    assert "".join([*pieces, stream.close()]) == text


def test_any_tokens_give_what_the_tokenizer_makes_of_them_all(tokenizer):
    """Broken bytes and special tokens among them."""
    for seed in range(300):
        chooser = random.Random(seed)
        ids = [chooser.randrange(len(tokenizer)) for _ in range(chooser.randint(1, 30))]
        stream = TextStream(tokenizer)
        text = "".join([*map(stream.push, ids), stream.close()])
        assert text == tokenizer.decode(ids, skip_special_tokens=True), ids


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama-2's: words with a mark for the blank before them, and bytes for the rest."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "▁the",
        "th",
        "e",
        "日",
    ]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_byte_fallback_loses_nothing_and_never_fails():
    tokenizer = byte_fallback()
    whole = ["▁", "▁", "▁a", "▁the", "th", "e", "日", "<s>", "</s>", "<0xE6> <0x97> <0xA5>", "<0xC3> <0xA9>"]
    for seed in range(300):
        chooser = random.Random(seed)
        tokens = " ".join(chooser.choices(whole, k=chooser.randint(1, 12))).split(" ")
        ids = tokenizer.convert_tokens_to_ids(tokens)
        stream = TextStream(tokenizer)
        pieces = [*map(stream.push, ids), stream.close()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), tokens
        assert not any("�" in piece for piece in pieces)
        broken = [chooser.randrange(len(tokenizer)) for _ in range(20)]
        stream = TextStream(tokenizer)
        text = "".join([*map(stream.push, broken), stream.close()])
        assert "�" in text or text == tokenizer.decode(broken, skip_special_tokens=True)


def test_nothing_from_a_stop_string_on_is_shown(tokenizer):
    chooser = random.Random(0)
    text = "How many apples are left? Three apples are left in the basket."
    ids = tokenizer(text)["input_ids"]
    for _ in range(200):
        stops = []
        for _ in range(chooser.randint(1, 3)):
            start = chooser.randrange(len(text))
            stops.append(text[start : start + chooser.randint(1, 12)] + chooser.choice(["", "", "~"]))
        stream, shown = TextStream(tokenizer, stops), ""
        for token in ids:
            shown += stream.push(token)
            if stream.stopped:
                break
        else:
            shown += stream.close()
        places = [text.find(stop) for stop in stops if stop in text]
        assert stream.stopped == bool(places)
        assert shown == text[: min(places, default=len(text))]


def test_text_is_held_back_only_while_it_may_be_a_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["xyz"])
    shown = [stream.push(token) for token in tokenizer("abxy?")["input_ids"]]
    assert shown == ["a", "b", "", "", "xy?"]
