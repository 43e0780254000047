"""Chat templates: which one is used, and where in the text the assistant's turns are."""

from __future__ import annotations

import json

import pytest

from qhybrid.data.rows import ConversationRow, RowFault
from qhybrid.data.templates import ALPACA, CHATML, resolve_chat_template
from qhybrid.data.turns import ChatRenderer
from qhybrid.errors import DataError

MULTI = ConversationRow(
    (("system", "Be kind"), ("user", "one"), ("assistant", "eins"), ("user", "two"), ("assistant", "zwei"))
)

# As Qwen3's: only the turn after the last user message keeps its thinking, and shows an empty one if it has none.
STRIPS_THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set words = message.content.split('</think>')[-1] | trim %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {%- if '</think>' in message.content %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1] | trim %}
        {%- else %}
            {%- set thought = '' %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + words + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + words + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# As Phi-3's: the end token closes the whole conversation, not its turns.
CLOSES_WHOLE = """\
{%- for message in messages %}{{- '[' + message.role + ']' + message.content + '[end]' }}{% endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{% else %}{{- eos_token }}{% endif %}"""

# As Mistral's: the system message is part of the last user turn, wherever that is.
MOVES_SYSTEM = """\
{%- set users = messages | selectattr('role', 'eq', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' }}
        {%- if message == users[-1] and messages[0].role == 'system' %}{{- messages[0].content + '|' }}{% endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- MARK }}
    {%- endif %}
{%- endfor %}"""


def spans(tokenizer, template, row=MULTI, **options):
    rendered = ChatRenderer(tokenizer, template, tokenizer.eos_token).render(row, **options)
    return [rendered.text[start:end] for start, end in rendered.spans]


def fault(tokenizer, template, row=MULTI) -> str:
    with pytest.raises(RowFault) as caught:
        spans(tokenizer, template, row)
    return caught.value.reason


def test_every_assistant_turn_with_its_end_token(tokenizer):
    assert spans(tokenizer, CHATML) == ["eins<|im_end|>\n", "zwei<|im_end|>\n"]
    assert spans(tokenizer, ALPACA) == ["eins<|im_end|>", "zwei<|im_end|>"]


def test_the_built_in_templates_have_their_known_shape(tokenizer):
    def text(template):
        row = ConversationRow((("system", "s"), ("user", "q"), ("assistant", "a")))
        return ChatRenderer(tokenizer, template, "</s>").render(row).text

    assert (
        text(CHATML)
        == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert text(ALPACA) == "s\n\n### Instruction:\nq\n\n### Response:\na</s>"
    assert "has no turn for the role tool" in fault(
        tokenizer, ALPACA, ConversationRow((("tool", "x"), ("assistant", "a")))
    )


def test_prompt_turns_and_whole(tokenizer):
    row = ConversationRow(MULTI.messages, num_prompt_messages=4)
    assert spans(tokenizer, CHATML, row) == ["zwei<|im_end|>\n"]
    assert spans(tokenizer, CHATML, row, prompt_turns=True) == ["eins<|im_end|>\n", "zwei<|im_end|>\n"]
    (whole,) = spans(tokenizer, CHATML, row, whole=True)
    assert whole.startswith("<|im_start|>system") and whole.endswith("zwei<|im_end|>\n")


def test_first_turn_and_trailing_question(tokenizer):
    row = ConversationRow((("assistant", "hello"), ("user", "q"), ("assistant", "a"), ("user", "more")))
    assert spans(tokenizer, CHATML, row) == ["hello<|im_end|>\n", "a<|im_end|>\n"]


def test_template_that_strips_earlier_thinking(tokenizer):
    assert spans(tokenizer, STRIPS_THINKING) == ["eins<|im_end|>\n", "<think>\n\n</think>\n\nzwei<|im_end|>\n"]
    thinks = ConversationRow(
        (
            ("user", "one"),
            ("assistant", "<think>hm</think>eins"),
            ("user", "two"),
            ("assistant", "<think>so</think>zwei"),
        )
    )
    assert spans(tokenizer, STRIPS_THINKING, thinks) == [
        "eins<|im_end|>\n",
        "<think>\nso\n</think>\n\nzwei<|im_end|>\n",
    ]
    assert ChatRenderer(tokenizer, STRIPS_THINKING, None).render(thinks).lost_thinking


def test_template_that_closes_the_whole(tokenizer):
    assert spans(tokenizer, CLOSES_WHOLE) == ["eins[end]", "zwei[end]<|im_end|>"]


def test_common_start_ends_before_a_control_token(tokenizer):
    # "<|im_end|>" at the end and "<|im_start|>" in its place share "<|im_", which is part of neither turn.
    template = CLOSES_WHOLE.replace("'[' + message.role + ']'", "'<|im_start|>' + message.role + ' '").replace(
        "'[assistant]'", "'<|im_start|>assistant '"
    )
    assert spans(tokenizer, template) == ["eins[end]", "zwei[end]<|im_end|>"]


def test_generation_prompt_that_opens_a_thought(tokenizer):
    # As DeepSeek-R1's: the reply is asked for with "<think>", which the conversation itself does not have.
    template = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    assert template != CHATML
    assert spans(tokenizer, template) == ["eins<|im_end|>\n", "zwei<|im_end|>\n"]


def test_marked_turns_are_the_last_resort(tokenizer):
    marked = MOVES_SYSTEM.replace(
        "{{- MARK }}", "{%- generation %}{{- message.content + eos_token }}{% endgeneration %}"
    )
    assert spans(tokenizer, marked) == ["eins<|im_end|>", "zwei<|im_end|>"]
    assert "renders a turn differently" in fault(
        tokenizer, MOVES_SYSTEM.replace("MARK", "message.content + eos_token")
    )


def test_rows_that_a_template_refuses_or_cuts(tokenizer):
    alternate = (
        "{%- if messages[0].role != 'user' %}{{- raise_exception('roles must alternate') }}{% endif %}" + CHATML
    )
    assert fault(tokenizer, alternate) == "chat template refused the row: roles must alternate"
    no_system = CHATML.replace("{%- for message in messages %}", "{%- for message in messages[1:] %}")
    assert fault(tokenizer, no_system) == "chat template leaves out or changes a message"
    broken = CHATML.replace("message['content']", "message['content'] + 1")
    assert fault(tokenizer, broken).startswith("chat template refused the row: can only concatenate str")


def resolve(make_recipe, tokenizer, folder, chat_template=None, **training):
    recipe = make_recipe({"sources": "a.jsonl", "chat_template": chat_template}, **training)
    return resolve_chat_template(recipe, tokenizer, folder)


def test_where_the_template_comes_from(make_recipe, make_tokenizer, tmp_path):
    own = make_tokenizer(chat_template="{{- 'own' }}")
    assert resolve(make_recipe, own, tmp_path) == "{{- 'own' }}"
    assert resolve(make_recipe, own, tmp_path, "alpaca") == ALPACA
    (tmp_path / "mine.jinja").write_text("{{- 'mine' }}")
    assert resolve(make_recipe, own, tmp_path, "mine.jinja") == "{{- 'mine' }}"
    assert resolve(make_recipe, own, tmp_path, chat_template_path=str(tmp_path / "mine.jinja")) == "{{- 'mine' }}"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{- 'config' }}"}))
    assert resolve(make_recipe, own, tmp_path, chat_template_path="model") == "{{- 'config' }}"
    named = [{"name": "default", "template": "{{- 'default' }}"}, {"name": "tools", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert resolve(make_recipe, own, tmp_path, chat_template_path="model") == "{{- 'default' }}"
    (folder / "chat_template.jinja").write_text("{{- 'file' }}")
    assert resolve(make_recipe, own, tmp_path, chat_template_path="model") == "{{- 'file' }}"
    assert resolve(make_recipe, make_tokenizer(chat_template=None), tmp_path) is None


def test_built_in_templates_open_with_bos_where_the_tokenizer_does(make_recipe, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(adds_bos=True)
    template = resolve(make_recipe, tokenizer, tmp_path, "chatml")
    text = ChatRenderer(tokenizer, template, tokenizer.eos_token).render(MULTI).text
    assert text.startswith("<s><|im_start|>system\nBe kind<|im_end|>")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": "chatlm"}, "did you mean chatml"),
        ({"chat_template": "llama"}, "chatml and alpaca"),
        ({"chat_template": "mime.jinja"}, "mine.jinja"),
        ({"chat_template": "broken.jinja"}, "built-in"),
        ({"chat_template_path": "notes.txt"}, "tokenizer_config.json"),
        ({"chat_template_path": "empty"}, "chat_template.jinja"),
        ({"chat_template_path": "damaged"}, "valid JSON"),
    ],
)
def test_template_errors(make_recipe, tokenizer, tmp_path, settings, words):
    (tmp_path / "mine.jinja").write_text("")
    (tmp_path / "broken.jinja").write_text("\n\n{% if %}")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer_config.json").write_text("[1")
    with pytest.raises(DataError) as caught:
        resolve(make_recipe, tokenizer, tmp_path, **settings)
    assert words in caught.value.hint
    if "broken.jinja" in settings.values():
        assert caught.value.where == "broken.jinja:3"
