"""Tokenising: labels on what is trained and on nothing else, truncation, and settings that change both."""

from __future__ import annotations

import pytest

from qhybrid.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Name the planet"}, {"role": "assistant", "content": "Jupiter"}]}


def test_text_is_trained_whole_and_ends(prepare, write_jsonl, trained_text):
    data = prepare(write_jsonl([{"text": "A cat sat"}, {"text": "on the mat<|im_end|>"}])).train
    assert [trained_text(row) for row in data] == ["A cat sat<|im_end|>", "on the mat<|im_end|>"]
    assert all(row["input_ids"] == row["labels"] for row in data)


def test_only_the_completion_is_trained(prepare, write_jsonl, trained_text):
    rows = write_jsonl([{"prompt": "How many?", "completion": " Three"}])
    assert trained_text(prepare(rows).train[0]) == " Three<|im_end|>"
    assert trained_text(prepare(rows, completion_only_loss=False).train[0]) == "How many? Three<|im_end|>"


def test_only_assistant_turns_are_trained(prepare, write_jsonl, trained_text):
    long = {"messages": CHAT["messages"] * 3}
    data = prepare(write_jsonl([CHAT, long])).train
    assert [trained_text(row) for row in data] == ["Jupiter<|im_end|>\n", "Jupiter<|im_end|>\n" * 3]


def test_loss_settings_of_conversations(prepare, write_jsonl, trained_text):
    rows = write_jsonl([{"prompt": CHAT["messages"] * 2, "completion": CHAT["messages"]}])
    reply = "Jupiter<|im_end|>\n"
    whole = "<|im_start|>user\nName the planet<|im_end|>\n<|im_start|>assistant\n" + reply
    assert trained_text(prepare(rows).train[0]) == reply
    assert trained_text(prepare(rows, completion_only_loss=False).train[0]) == whole * 3
    both = {"completion_only_loss": False, "assistant_only_loss": True}
    assert trained_text(prepare(rows, **both).train[0]) == reply * 3


def test_a_token_across_the_boundary_belongs_to_where_it_starts(prepare, write_jsonl, make_tokenizer, tokenizer):
    # "c" ends the prompt and "at" starts the reply; " cat" is one token, and the prompt's.
    each = "{%- for message in messages %}{{- message.content }}{% endfor %}"
    end = "{%- if not add_generation_prompt %}{{- eos_token }}{% endif %}"
    joined = make_tokenizer(chat_template=each + end)
    row = {"messages": [{"role": "user", "content": "A c"}, {"role": "assistant", "content": "at sat on the mat"}]}
    data = prepare(write_jsonl([row]), tokenizer=joined).train[0]
    ids = tokenizer("A cat sat on the mat<|im_end|>")["input_ids"]
    prompt = [token for token, label in zip(data["input_ids"], data["labels"], strict=True) if label == -100]
    assert data["input_ids"] == ids
    assert tokenizer.decode(prompt) == "A cat"


def test_offsets_hold_beyond_ascii(prepare, write_jsonl, trained_text):
    answer = "naïve 日本語 🎉 e\u0301"
    row = {"messages": [{"role": "user", "content": "🎉日本"}, {"role": "assistant", "content": answer}]}
    assert trained_text(prepare(write_jsonl([row])).train[0]) == answer + "<|im_end|>\n"


def test_system_prompt_is_for_conversations_without_one(prepare, write_jsonl, tokenizer):
    has_one = {"messages": [{"role": "system", "content": "Be kind"}, *CHAT["messages"]]}
    split = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    source = {"sources": write_jsonl([CHAT, has_one]), "system_prompt": "Be brief"}
    texts = [tokenizer.decode(row["input_ids"]) for row in prepare(source).train]
    assert texts[0].startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")
    assert texts[1].startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user")
    split = prepare({"sources": write_jsonl([split], "split.jsonl"), "system_prompt": "Be brief"}).train[0]
    assert tokenizer.decode([x for x in split["labels"] if x != -100]) == "Jupiter<|im_end|>\n"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(prepare, write_jsonl, mode):
    rows = write_jsonl([CHAT, {"messages": CHAT["messages"] * 20}])
    whole = prepare(rows).train[1]
    prepared = prepare(rows, max_length=60, truncation_mode=mode)
    cut = slice(None, 60) if mode == "keep_start" else slice(-60, None)
    assert prepared.train[1]["input_ids"] == whole["input_ids"][cut]
    assert prepared.train[1]["labels"] == whole["labels"][cut]
    source = prepared.audit.train[0]
    assert (source.truncated_rows, source.truncated_tokens) == (1, len(whole["input_ids"]) - 60)
    assert max(len(row["input_ids"]) for row in prepare(rows, max_length=None).train) == len(whole["input_ids"])


def test_rows_without_a_trained_token_are_dropped(prepare, write_jsonl):
    long = {"messages": [{"role": "user", "content": "Name the planet " * 50}, CHAT["messages"][1]]}
    data = {"sources": write_jsonl([CHAT, long, CHAT]), "max_dropped_fraction": 0.5}
    source = prepare(data, max_length=32).audit.train[0]
    assert source.dropped_rows == {"no trained token left after truncation to 32 tokens": [2]}
    # One trained token at the very start has no token before it that could predict it.
    data = {"sources": write_jsonl([{"text": "<|im_end|>"}, {"text": "two tokens"}]), "max_dropped_fraction": 0.5}
    assert prepare(data).audit.train[0].dropped_rows == {"no trained token": [1]}


def test_conversations_need_a_template(prepare, write_jsonl, make_tokenizer):
    bare = make_tokenizer(chat_template=None)
    with pytest.raises(DataError, match="no chat template") as caught:
        prepare(write_jsonl([CHAT]), tokenizer=bare)
    assert "chatml or alpaca" in caught.value.hint
    prepared = prepare({"sources": write_jsonl([CHAT]), "chat_template": "chatml"}, tokenizer=bare)
    assert prepared.chat_template.lstrip().startswith("{%-")


def test_end_token(prepare, write_jsonl, make_tokenizer, trained_text):
    rows = write_jsonl([{"text": "A cat"}])
    assert trained_text(prepare(rows, eos_token="<s>").train[0]) == "A cat<s>"
    with pytest.raises(DataError, match="not in the tokenizer's vocabulary") as caught:
        prepare(rows, eos_token="<nope>")
    assert "<|im_end|>" in caught.value.hint
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        prepare(rows, tokenizer=endless)


def test_warnings(prepare, write_jsonl, make_tokenizer):
    rows = write_jsonl([CHAT])
    assert prepare(rows).audit.warnings == []
    (warning,) = prepare(rows, eos_token="<s>").audit.warnings
    assert "may not learn to stop" in warning
    text = write_jsonl([{"text": "A cat"}], "text.jsonl")
    unused = {"sources": text, "system_prompt": "x", "chat_template": "chatml", "mixture": "all_exhausted"}
    assert [note.split(" is not used")[0] for note in prepare(unused).audit.warnings] == [
        "data.chat_template",
        "data.system_prompt",
        "data.mixture",
    ]
    thinks = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>hm</think>Jupiter"}]}
    strips = make_tokenizer()
    strips.chat_template = strips.chat_template.replace("['content']", "['content'].split('</think>')[-1]")
    (warning,) = prepare(write_jsonl([CHAT, thinks]), tokenizer=strips).audit.warnings
    assert "thinking out of 1 rows" in warning
