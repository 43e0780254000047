"""Tokenizers in GGUF files: llama.cpp splits texts as they do, and those that it cannot follow are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from helpers import SENTENCES, build_tokenizer, tiny_model
from llama_cpp import LlamaCpp
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from qhybrid.errors import ExportError
from qhybrid.export.gguf import tokenizer as gguf_tokenizer
from qhybrid.export.gguf.chat_samples import CONVERSATIONS, rendered
from qhybrid.export.gguf.model import write_gguf_model
from qhybrid.export.gguf.tokenizer import end_token_ids

TEXTS = (
    "", " ", "a", " a", "  two  blanks\tand a tab\n\n\nlines \r\n x", "the the thethe", "A" * 100,
    "1 12 123 1234567890 3.14159 ½ x² ٣٤", "it's I'LL WE'VE they're 'tis O'Neil's",
    "Ünïcödé 東京都 привет مرحبا 한국어 ไทย", "😀👍🏽👩\u200d👩\u200d👧 ﷽ \u200b\u00a0\u3000.",
    "def f(x):\n        return {'a': [1, 2]}  # <b>", "http://example.org/?q=a%20b&c=d#e...!!!\n\n??",
    "<|im_start|>user\nhi<|im_end|>\n <|im_end|> ", "<|im_start|> <|not_a_token|> <|im_end|><|im_end|>",
)  # fmt: skip
SPECIAL = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"


def split(regex: str, *, normalizer=None, **model) -> Callable[[], PreTrainedTokenizerFast]:
    """Byte-level BPE that splits by `regex` first."""
    steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return lambda: byte_level(pre_tokenizers.Sequence(steps), normalizer, **model)


def byte_level(pre_tokenizer, normalizer=None, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *TEXTS[4:]] * 5, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.model.ignore_merges = ignore_merges
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def sentencepiece(
    pre_tokenizer=None, normalizer=None, chat_template: str | None = None, drop_merge: str | None = None
) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece has it: the merges hold every pair of tokens whose text is a token."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    trained.train_from_iterator([*SENTENCES, TEXTS[4]] * 5, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    merges = [
        (text[:cut], text[cut:])
        for text in pieces
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab and text != drop_merge
    ]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return wrapped(tokenizer, chat_template)


def save(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int = 0) -> Path:
    """A tiny model with that tokenizer."""
    model = tiny_model(vocab_size=max(rows, len(tokenizer)), num_hidden_layers=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int = 0) -> tuple[Path, list[str]]:
    """The GGUF file of a tiny model with that tokenizer, and the notes."""
    notes = write_gguf_model(save(tokenizer, folder / "model", rows), folder / "model.gguf", dtype="f32")
    return folder / "model.gguf", notes


def fields_of(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
BYTE_LEVEL = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(SMOLLM),
    "llama-bpe": split(gguf_tokenizer._LLAMA_3, ignore_merges=True),
    "smaug-bpe": split(gguf_tokenizer._LLAMA_3),
    "qwen2": split(gguf_tokenizer._QWEN_2, normalizer=normalizers.NFC()),
    "tekken": split(gguf_tokenizer._TEKKEN, ignore_merges=True),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers_split_the_same_in_llama_cpp(name, tmp_path):
    tokenizer = BYTE_LEVEL[name]()
    file, notes = written(tokenizer, tmp_path, rows=720)
    assert notes == [] and fields_of(file)["tokenizer.ggml.pre"] == name
    server = LlamaCpp(file)
    for text in TEXTS:
        assert server.tokenize(text, add_special=True) == tokenizer(text)["input_ids"], text


def test_a_tokenizer_whose_merges_reach_every_token_may_take_words_whole_or_not(tmp_path):
    tokenizer = split(gguf_tokenizer._TEKKEN)()  # where llama.cpp always does
    file, _ = written(tokenizer, tmp_path)
    assert fields_of(file)["tokenizer.ggml.pre"] == "tekken"
    server = LlamaCpp(file)
    assert all(server.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS)


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@pytest.mark.parametrize(
    ("tokenizer", "exceptions"),
    [
        (lambda: sentencepiece(normalizer=PREPEND), set()),
        # A blank that is there already gets no second one in front.
        (
            lambda: sentencepiece(pre_tokenizers.Metaspace("▁", "always", split=False)),
            {" ", " a", "  two", "<|im_start|>"},
        ),
        (lambda: sentencepiece(normalizer=normalizers.Replace(" ", "▁")), set()),
    ],
    ids=["prepend", "metaspace", "bare"],
)
def test_sentencepiece_tokenizers_split_the_same_in_llama_cpp(tokenizer, exceptions, tmp_path):
    tokenizer = tokenizer()
    file, notes = written(tokenizer, tmp_path)
    assert bool(notes) == bool(exceptions)
    server = LlamaCpp(file)
    for text in TEXTS:
        same = server.tokenize(text, add_special=True) == tokenizer(text)["input_ids"]
        assert same or any(text.startswith(start) for start in exceptions), text


def test_blanks_beside_special_tokens_are_put_as_conversations_need_them(tmp_path):
    first = pre_tokenizers.Metaspace("▁", "first", split=False)
    opened = "{{ bos_token }}" + build_tokenizer().chat_template
    tokenizer = sentencepiece(first, chat_template=opened)
    file, notes = written(tokenizer, tmp_path)
    assert [note.startswith("a text that is no conversation") for note in notes] == [True]
    fields = fields_of(file)
    assert not fields["tokenizer.ggml.add_space_prefix"] and fields["tokenizer.ggml.add_bos_token"]
    server = LlamaCpp(file)
    for turns in CONVERSATIONS:
        prompt = rendered(tokenizer, turns)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert server.tokenize(prompt) == ids
        told = server.render([{"role": role, "content": content} for role, content in turns])
        # llama.cpp takes BOS off the rendered text where it puts it there itself.
        assert server.tokenize(told, add_special=True) == ids


def test_places_where_llama_cpp_splits_a_conversation_otherwise_are_told(tmp_path):
    first = pre_tokenizers.Metaspace("▁", "first", split=False)
    _, notes = written(sentencepiece(first, chat_template=ZEPHYR), tmp_path)
    assert any("0 of 3 sample conversations" in note for note in notes)


def test_bos_follows_the_chat_template_and_else_the_tokenizer(tmp_path):
    plain = build_tokenizer(chat_template=None, adds_bos=True)
    unopened = build_tokenizer(adds_bos=True)
    opened = build_tokenizer(chat_template="{{ bos_token }}" + unopened.chat_template, adds_bos=True)
    never = build_tokenizer()
    flags = []
    for index, tokenizer in enumerate((plain, unopened, opened, never)):
        file, _ = written(tokenizer, tmp_path / str(index))
        flags.append(fields_of(file)["tokenizer.ggml.add_bos_token"])
    assert flags == [True, False, True, False]


def test_special_tokens_and_rows_without_a_token(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    count = len(tokenizer)
    folder = save(tokenizer, tmp_path / "model", count + 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3, 0, 999_999]}))
    write_gguf_model(folder, tmp_path / "out.gguf")
    fields = fields_of(tmp_path / "out.gguf")
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert len(kinds) == count + 2
    assert [kinds[text] for text in ("a", "<|im_end|>", "<tool>", f"[PAD{count}]")] == [1, 3, 4, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 3  # training's, first
    assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eom_token_id"]) == (1, 0)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert end_token_ids(tokenizer, folder) == [3, 1, 0]


def refused(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        written(tokenizer, folder)
    assert not (folder / "model.gguf").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tokenizer", "word"),
    [
        (split(r"\p{N}{1,2}|\p{L}+|.", ignore_merges=False), "words"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(True)), "words"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(False), normalizers.Lowercase()), "words"),
        (lambda: sentencepiece(normalizer=PREPEND, drop_merge="▁the"), "merge"),
        (lambda: sentencepiece(pre_tokenizers.Split("e", "isolated"), PREPEND), "otherwise"),
        (lambda: sentencepiece(normalizer=normalizers.Sequence([normalizers.Lowercase(), PREPEND])), "otherwise"),
    ],
    ids=["regex", "prefix", "lowercase", "merges", "split", "normalizer"],
)
def test_tokenizers_that_llama_cpp_does_not_follow_are_refused(tokenizer, word, tmp_path):
    message = refused(tokenizer(), tmp_path)
    assert word in message and "convert_hf_to_gguf.py" in message


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    assert "end token" in refused(tokenizer, tmp_path)


def test_other_tokens_around_a_text_are_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    assert "BOS and EOS" in refused(tokenizer, tmp_path)


def test_tokens_that_take_blanks_along_are_told(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)], special_tokens=True)
    _, notes = written(tokenizer, tmp_path)
    assert len(notes) == 1 and "<mask>" in notes[0]
