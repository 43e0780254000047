"""A tokenizer as llama.cpp reads it from a GGUF file, where that is known to split texts into the same tokens.

"gpt2" there is byte-level BPE, with a pre-tokenizer by name; "llama" is SentencePiece's BPE, which merges what has
the highest score. What is not recognised is refused: a wrong guess gives slightly wrong tokens for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qhybrid.errors import ExportError
from qhybrid.export.gguf.chat_samples import CONVERSATIONS, chat_template_of, rendered
from qhybrid.export.gguf.names import CONVERTER

_CASELESS_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CASELESS_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_QWEN_2 = _CASELESS_ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _WHITESPACE
)
# The steps of a pre-tokenizer: llama.cpp's names for it, each with whether llama.cpp then takes a word that is in
# the vocabulary whole, whatever the merges say.
_PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], tuple[tuple[str, bool], ...]] = {
    (("bytes", True),): (("gpt-2", False),),
    (("digits",), ("bytes", True)): (("smollm", False),),
    (("split", _LLAMA_3), ("bytes", False)): (("llama-bpe", True), ("smaug-bpe", False)),
    (("split", _QWEN_2), ("bytes", False)): (("qwen2", False),),
    (("split", _TEKKEN), ("bytes", False)): (("tekken", True),),
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # SentencePiece's
_PLAIN_TEXTS = (
    "Hello world, it's 2024!",
    "  two  blanks\tand a tab\n\n\nlines ",
    "3.14159 1000000 ½ x²",
    "Ünïcödé 東京都 привет مرحبا 한국어 😀👍🏽",
    "def f(x):\n        return {'a': [1, 2]}  # <b>",
)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, *, folder: Path, num_rows: int
) -> list[str]:
    """Write vocabulary, merges or scores, special tokens, chat template and end tokens into the metadata.

    A text gets BOS and EOS in front and behind as the tokenizer itself does it. Where the chat template opens a
    conversation without BOS, llama.cpp is told to add none at all: it has one setting for both.

    Args:
        folder: of the model; its generation_config.json may name further end tokens.
        num_rows: of the embeddings. Rows without a token get names that no text contains.

    Returns:
        Notes for the user: where llama.cpp splits otherwise than the tokenizer.

    Raises:
        ExportError: a tokenizer for which llama.cpp is not known to do the same.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _unknown(f"it is of the type {model['type']}, not plain BPE")
    tokens, types = _tokens(description, num_rows)
    notes = [
        f"{token['content']} takes the blanks beside it along; llama.cpp leaves them"
        for token in description["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if model.get("byte_fallback"):
        prefix, found = _space_prefix(tokenizer, description)
        notes += found
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(model, tokens))
        writer.add_token_types(types)
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer_name(description))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
        writer.add_add_space_prefix(False)
    _add_special_tokens(writer, tokenizer, folder)
    template = chat_template_of(tokenizer)
    if template is not None:
        writer.add_chat_template(template)
    return notes


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """The tokens that end a reply: training's first, then others that generation_config.json names.

    Raises:
        ExportError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ExportError("the tokenizer has no end token", hint="set eos_token in its tokenizer_config.json")
    try:
        named = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        named = []
    others = named if isinstance(named, list) else [named]
    known = range(len(tokenizer))
    return list(dict.fromkeys([tokenizer.eos_token_id, *(i for i in others if type(i) is int and i in known)]))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp is to put BOS in front of a text: see `add_tokenizer`."""
    opens = bool(_around(tokenizer)[0])
    prompt = rendered(tokenizer, CONVERSATIONS[0]) if chat_template_of(tokenizer) is not None else None
    return opens and (prompt is None or prompt.startswith(tokenizer.bos_token))


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it: BOS and EOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    before, after = (whole[: places[0]], whole[places[0] + len(bare) :]) if places else (whole, [])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _unknown("it puts other tokens than BOS and EOS around a text")
    return before, after


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    ends = end_token_ids(tokenizer, folder)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, ends[0]),
        # llama.cpp stops at any of these three; its names for the others are "end of turn" and "end of message".
        (writer.add_eot_token_id, ends[1] if len(ends) > 1 else None),
        (writer.add_eom_token_id, ends[2] if len(ends) > 2 else None),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(bool(_around(tokenizer)[1]))


def _tokens(description: Mapping[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """The text and llama.cpp's type of every row of the embeddings."""
    model, added = description["model"], description["added_tokens"]
    kinds = gguf.TokenType
    texts: dict[int, str] = {}
    types: dict[int, int] = {}
    for text, number in model["vocab"].items():
        texts[number] = text
        is_byte = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
        types[number] = kinds.BYTE if is_byte else kinds.NORMAL
    for token in added:
        number, text = token["id"], token["content"]
        is_unknown = model.get("byte_fallback") and text == model.get("unk_token")
        types[number] = kinds.UNKNOWN if is_unknown else kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        # llama.cpp looks for these in the text as it was written.
        texts[number] = text if token["special"] else text.replace(_SPACE, " ")
    if max(texts) >= num_rows:
        raise ExportError(
            f"the tokenizer has tokens up to {max(texts)}, the model's embeddings have {num_rows} rows",
            hint="use the tokenizer that belongs to the model",
        )
    for number in range(num_rows):
        if number not in texts:
            texts[number], types[number] = f"[PAD{number}]", kinds.UNUSED
    return [texts[number] for number in range(num_rows)], [int(types[number]) for number in range(num_rows)]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """In order of rank; files have them as pairs or as "left right"."""
    return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _core(model: Mapping[str, Any]) -> Tokenizer:
    """The merges alone: without normalisation, splitting and special tokens."""
    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": dict(model), **bare}))


def _pre_tokenizer_name(description: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of byte-level BPE.

    Qwen's normalisation to NFC is let pass: llama.cpp leaves it out, which shows only in texts that are not in
    that form. Its expression for "tekken" takes capitals beyond A to Z for small letters inside of words.
    """
    model = description["model"]
    normalizer = description["normalizer"]
    names = _PRE_TOKENIZERS.get(_steps(description["pre_tokenizer"]))
    if names is None or (normalizer is not None and normalizer != {"type": "NFC"}):
        raise _unknown("llama.cpp has no name for the way it splits texts into words")
    takes_whole = bool(model.get("ignore_merges"))
    for name, takes_whole_there in names:
        if takes_whole_there == takes_whole:
            return name
    if not _merges_reach_every_token(description):
        raise _unknown("it takes words that are in its vocabulary whole, or does not, other than llama.cpp")
    return names[0][0]


def _merges_reach_every_token(description: Mapping[str, Any]) -> bool:
    """Whether it makes no difference that words which are in the vocabulary are taken whole."""
    model = description["model"]
    special = {token["content"] for token in description["added_tokens"]}
    words = [text for text in model["vocab"] if text not in special]
    encoded = _core({**model, "ignore_merges": False}).encode_batch(words, add_special_tokens=False)
    return all(item.ids == [model["vocab"][text]] for item, text in zip(encoded, words, strict=True))


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """A pre-tokenizer of the tokenizers library in comparable form; unknown steps match nothing."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (("bytes", use_regex),)
        case {"type": "Digits", "individual_digits": True}:
            return (("digits",),)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (("split", regex),)
    return (("unknown", pre_tokenizer["type"]),)


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Scores with which SentencePiece's algorithm, which llama.cpp runs, merges as the ranks say.

    It merges any two neighbours whose text is in the vocabulary, the highest score first. So the merges must hold
    every such pair, and those that make the same token must stand together.

    Raises:
        ExportError: the merges are not of that kind.
    """
    merges = _merges(model)
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        token = left + right
        if token != last and token in order:
            raise _unknown(f"its merges make {token!r} at different ranks")
        order.setdefault(token, len(order))
        last = token
    known = set(merges)
    for token in model["vocab"]:
        if _BYTE_TOKEN.fullmatch(token):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in model["vocab"] and right in model["vocab"] and (left, right) not in known:
                raise _unknown(f"it does not merge {left!r} and {right!r}, though their text is a token")
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if missing:
        raise _unknown(f"it has no token for the byte {missing[0]}")
    return [-float(order.get(token, len(order))) for token in tokens]


def _space_prefix(tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether llama.cpp shall put a blank in front of a text and behind every special token; and notes.

    transformers has more ways than these two. That one is taken with which fewer tokens of sample conversations,
    or of plain texts where there is no chat template, are other than here.
    """
    core = _core(description["model"])
    special = sorted((token["content"] for token in description["added_tokens"]), key=len, reverse=True)

    def num_other(text: str, prefix: bool) -> int:
        """Tokens of `text` that llama.cpp does not have."""
        ours = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        theirs = _as_llama_cpp(core, special, text, prefix)
        blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
        return max(len(ours), len(theirs)) - sum(block.size for block in blocks)

    for text in _PLAIN_TEXTS:
        if num_other(text, True) and num_other(text, False):
            raise _unknown(f"llama.cpp would split {text!r} otherwise")
    prompts = []
    if chat_template_of(tokenizer) is not None:
        prompts = [text for text in (rendered(tokenizer, turns) for turns in CONVERSATIONS) if text is not None]
    texts = prompts or list(_PLAIN_TEXTS)
    counts = {prefix: [num_other(text, prefix) for text in texts] for prefix in (True, False)}
    prefix = min(counts, key=lambda key: sum(counts[key]))
    notes = []
    if any(counts[prefix]):
        notes.append(
            f"llama.cpp puts blanks in other places: {counts[prefix].count(0)} of {len(texts)} sample "
            f"{'conversations' if prompts else 'texts'} are split into the same tokens as here"
        )
    if prompts and num_other(_PLAIN_TEXTS[0], prefix):
        notes.append("a text that is no conversation is split without the blank that the tokenizer puts in front")
    return prefix, notes


def _as_llama_cpp(core: Tokenizer, special: Sequence[str], text: str, prefix: bool) -> list[str]:
    """The tokens of `text` as llama.cpp finds them: special ones first, then the merges between them."""
    pattern = "|".join(map(re.escape, special))
    pieces = re.split(f"({pattern})", text) if special else [text]
    found: list[str] = []
    after_special = True
    for index, piece in enumerate(pieces):
        if index % 2:
            found.append(piece)
            after_special = True
        elif piece:
            words = (" " if prefix and after_special else "") + piece
            found += core.encode(words.replace(" ", _SPACE), add_special_tokens=False).tokens
            after_special = False
    return found


def _unknown(what: str) -> ExportError:
    return ExportError(f"the tokenizer cannot be written for llama.cpp: {what}", hint=CONVERTER)
