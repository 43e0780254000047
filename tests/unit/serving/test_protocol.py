"""What a request may say."""

from __future__ import annotations

import json

import pytest

from qhybrid.serving.protocol import ApiError, ChatRequest, CompletionRequest, PromptLimits, parse_request
from qhybrid.serving.sampling import Sampling

CHAT = {"model": "a", "messages": [{"role": "user", "content": "b"}]}
TEXT = {"model": "a", "prompt": "b"}
MOST = PromptLimits(prompts=4, tokens=8)


def parsed(values: dict, kind=ChatRequest):
    return parse_request(kind, json.dumps({**(CHAT if kind is ChatRequest else TEXT), **values}).encode(), MOST)


def test_what_is_left_out_is_as_in_openais_protocol():
    request = parsed({})
    assert request.sampling == Sampling(temperature=1.0) and request.answer_tokens is None and not request.stop
    assert parsed({}, CompletionRequest).default_tokens == 16


def test_what_is_said_is_understood():
    request = parsed({"temperature": 0, "top_p": 0.5, "top_k": -1, "seed": 3, "stop": "x", "max_tokens": 4})
    assert request.sampling == Sampling(0.0, 0.5, 0, 3) and request.stop == ["x"] and request.answer_tokens == 4
    assert parsed({"max_tokens": 4, "max_completion_tokens": 5}).answer_tokens == 5
    for prompt, prompts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert parsed({"prompt": prompt}, CompletionRequest).prompt == prompts


def test_what_changes_nothing_is_ignored():
    parsed(
        {
            "user": "u", "metadata": {}, "store": True, "something_new": 1, "n": 1, "logprobs": False, "tools": [],
            "tool_choice": "auto", "response_format": {"type": "text"}, "presence_penalty": 0,
            "frequency_penalty": 0.0, "logit_bias": {}, "stop": None, "stream": None, "top_logprobs": None,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", True), ("logprobs", True), ("logprobs", 0), ("top_logprobs", 3), ("echo", True),
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("logit_bias", {"5": -100}),
        ("response_format", {"type": "json_object"}), ("presence_penalty", 0.5), ("suffix", "x"), ("best_of", 2),
        ("temperature", -0.1), ("temperature", 2.5), ("temperature", "hot"), ("temperature", float("nan")),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("seed", 2**64), ("seed", 1.5), ("max_tokens", 0),
        ("max_tokens", "9"), ("stop", ["a"] * 5), ("stop", "a" * 300), ("stop", 3), ("stream", "yes"),
        ("stream_options", {"include_usage": True}), ("messages", []), ("messages", "hi"), ("model", None),
        ("model", 7),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_field(field, value):
    with pytest.raises(ApiError) as caught:
        parsed({field: value})
    assert caught.value.status == 400 and caught.value.param == field and field in caught.value.message
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"1" * 5000, b"[" * 100_000, b'{"model": '])
def test_bodies_that_are_no_requests_are_refused(body):
    with pytest.raises(ApiError, match="the body is not") as caught:
        parse_request(ChatRequest, body, MOST)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "1 to 4 prompts"), (["a"] * 5, "1 to 4 prompts"), ([[1]] * 5, "1 to 4 prompts"),
        (5, "must be text"), (None, "must be text"), ({}, "must be text"), (True, "must be text"),
        ([1, "a"], "must be text"), (["a", 1], "must be text"), (["a", [1]], "must be text"),
        ([[1], ["a"]], "must be text"), ([1, True], "must be text"), ([1.0], "must be text"),
        ([[[1]]], "must be text"), ([1] * 9, "longer than 8"), ([[1], [1] * 9], "longer than 8"),
    ],
)  # fmt: skip
def test_prompts_of_another_form_or_size_are_refused(prompt, words):
    with pytest.raises(ApiError, match=words) as caught:
        parsed({"prompt": prompt}, CompletionRequest)
    assert caught.value.status == 400 and caught.value.param == "prompt"
    assert caught.value.code == ("context_length_exceeded" if words.startswith("longer") else None)


def test_brackets_within_text_are_no_lists():
    for text in ("[{" * 60_000, '\\"[{' * 60_000):
        assert parsed({"prompt": text}, CompletionRequest).prompt == [text]
    with pytest.raises(ApiError, match="more than 100000 lists and objects"):
        parsed({"metadata": {"a": [[]] * 100_001}})


def test_a_conversation_of_more_messages_than_tokens_is_refused():
    parsed({"messages": CHAT["messages"] * 8})
    with pytest.raises(ApiError, match="9 messages are longer than 8 tokens") as caught:
        parsed({"messages": CHAT["messages"] * 9})
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
