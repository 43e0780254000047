"""Prompts have the very tokens that training saw before the answer."""

from __future__ import annotations

import pytest
from helpers import build_tokenizer

from qhybrid.data.normalise import normalise_row
from qhybrid.data.rows import PromptCompletionRow
from qhybrid.data.templates import ALPACA, CHATML
from qhybrid.data.tokenize import RowEncoder
from qhybrid.errors import DataError, ServingError
from qhybrid.evaluation.answers import answer_start
from qhybrid.recipe.training_fields import TrainingSection
from qhybrid.serving.prompts import Prompter

DATED = (
    "{{- bos_token }}{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- for m in messages if m.role != 'system' %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TALKS = [
    [{"role": "user", "content": "How many?"}],
    [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many\nriver\x00s?"}],
    [
        {"role": "user", "content": "\ufeffa \ud83d b"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And now?"},
    ],
]


@pytest.mark.parametrize("template", [CHATML, ALPACA, DATED])
@pytest.mark.parametrize("system_prompt", [None, "You count."])
@pytest.mark.parametrize("messages", TALKS)
def test_conversations_are_tokenised_as_in_training(template, system_prompt, messages):
    tokenizer = build_tokenizer(chat_template=template, adds_bos=True)
    told = {"chat_template": template, "system_prompt": system_prompt, "date": "2024-02-29"}
    row, _ = normalise_row("messages", {"messages": [*messages, {"role": "assistant", "content": "Six."}]}, {})
    [trained] = RowEncoder(tokenizer, TrainingSection(max_length=None), **told).encode([row])
    asked = Prompter(tokenizer, **told).chat(messages)
    assert asked == trained.input_ids[: answer_start(trained)].tolist()
    if template is DATED:
        assert "29 February 2024" in tokenizer.decode(asked)


def test_plain_text_is_tokenised_as_in_training():
    tokenizer = build_tokenizer(adds_bos=True)
    [row] = RowEncoder(tokenizer, TrainingSection(max_length=None), chat_template=None).encode(
        [PromptCompletionRow("How many?\n", "Six.")]
    )
    asked = Prompter(tokenizer).text("How many?\n")
    assert asked == row.input_ids[: answer_start(row)].tolist() and asked[0] == tokenizer.bos_token_id


def test_openais_ways_of_saying_the_same_are_understood():
    prompter = Prompter(build_tokenizer(), system_prompt="Count.")
    plain = prompter.chat([{"role": "system", "content": "Count."}, {"role": "user", "content": "ab"}])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for same in (
        [{"role": "developer", "content": "Count."}, {"role": "user", "content": parts}],
        [{"role": "user", "content": "ab", "name": "Ada"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "ab"}],  # as if there were none
    ):
        assert prompter.chat(same) == plain


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "role or content is missing"),
        ([{"role": "wizard", "content": "a"}], "unknown role"),
        ([{"role": "user", "content": " "}], "'content' is empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'; only text"),
        ([{"role": "user", "content": ["a"]}], "only text"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "system message not first"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "tool_calls"),
        (["a"], "malformed"),
        ([{"role": "tool", "content": "3"}], "refused the messages: no tools here"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(messages, words):
    template = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}a"
    with pytest.raises(DataError, match=words):
        Prompter(build_tokenizer(chat_template=template)).chat(messages)


def test_without_a_template_only_plain_text_is_taken():
    prompter = Prompter(build_tokenizer(chat_template=None))
    assert not prompter.has_chat_template and prompter.text("a")
    with pytest.raises(DataError, match="no chat template"):
        prompter.chat([{"role": "user", "content": "a"}])
    with pytest.raises(DataError, match="the prompt is empty"):
        prompter.text("")


def test_a_tokenizer_without_streaming_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ServingError, match="Slow"):
        Prompter(Slow())
