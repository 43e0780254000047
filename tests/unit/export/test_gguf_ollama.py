"""TEMPLATE in a Modelfile renders what the chat template renders, and is left out where that is not shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from helpers import build_tokenizer

from qhybrid.data.templates import ALPACA, CHATML
from qhybrid.errors import ExportError
from qhybrid.export.gguf.chat_samples import Message, rendered
from qhybrid.export.gguf.ollama import chat_pieces, ollama_modelfile

PER_TURN = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
LLAMA_3 = "{{ bos_token }}" + PER_TURN % (
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}",
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
)
ZEPHYR = PER_TURN % ("{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}", "{{ '<|assistant|>\n' }}")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
SYSTEM_IN_THE_LAST_TURN = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' }}{% if loop.last %}{{ s }}{% endif %}{{ m.content }}{% endfor %}"
)
TRANSLATED = {
    "chatml": CHATML, "alpaca": ALPACA, "llama-3": LLAMA_3, "zephyr": ZEPHYR, "default-system": DEFAULT_SYSTEM,
    "llama-2": LLAMA_2, "mistral": MISTRAL,
}  # fmt: skip
TALK: tuple[Message, ...] = (
    ("user", "One?"), ("assistant", "1,\n\nof course."), ("user", "Two {{ and }} \"three\"?"),
    ("assistant", "2 + 1 = 3"), ("user", "東京 😀"),
)  # fmt: skip


def go(template: str, messages: Sequence[Message]) -> str:
    """Run the part of Go's text/template that is used, on what Ollama gives to it."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    system = "\n\n".join(content for role, content in messages if role == "system")
    out: list[str] = []

    def truth(test: str, index: int) -> bool:
        role = messages[index][0] if index >= 0 else None
        last = index == len(messages) - 1
        known = {".System": bool(system), "$last": last, "not $last": not last}
        known |= {f'eq .Role "{name}"': role == name for name in ("user", "assistant")}
        return known[test]

    def run(place: int, index: int, active: bool) -> int:
        """From `place` to the end of the block; the place of the action that ends it."""
        while place < len(parts):
            if place % 2 == 0:
                out.append(parts[place] if active else "")
            elif parts[place] in (".System", ".Content"):
                out.append((system if parts[place] == ".System" else messages[index][1]) if active else "")
            elif parts[place].startswith("if "):
                done, test = False, parts[place].removeprefix("if ")
                while True:
                    chosen = active and not done and (test == "" or truth(test, index))
                    done |= chosen
                    place = run(place + 1, index, chosen)
                    if parts[place] == "end":
                        break
                    test = parts[place].removeprefix("else").strip().removeprefix("if ")
            elif parts[place] == "range $i, $_ := .Messages":
                start = place + 1
                for number in range(len(messages)):
                    place = run(start, number, active)
            elif parts[place] == "end" or parts[place].startswith("else"):
                return place
            else:
                assert parts[place] == "$last := eq (len (slice $.Messages $i)) 1", parts[place]
            place += 1
        return place

    run(0, -1, True)
    return "".join(out)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TRANSLATED)
def test_the_translation_renders_the_same_text(name, adds_bos):
    tokenizer = build_tokenizer(chat_template=TRANSLATED[name], adds_bos=adds_bos)
    pieces = chat_pieces(tokenizer)
    assert pieces is not None
    # llama.cpp puts BOS in front of the prompt, where the tokenizer does and the template wants it.
    bos = "<s>" if adds_bos and TRANSLATED[name] in (LLAMA_2, LLAMA_3, MISTRAL) else ""
    systems = [()] if name == "mistral" else [(), (("system", "Be brief.\nAlways."),)]
    for system in systems:
        for count in (1, 3, 5):
            messages = [*system, *TALK[:count]]
            assert bos + go(pieces.go_template(), messages) == rendered(tokenizer, messages)


def test_a_reply_that_is_begun_is_left_open():
    pieces = chat_pieces(build_tokenizer())
    assert go(pieces.go_template(), TALK[:2]).endswith("<|im_start|>assistant\n1,\n\nof course.")


@pytest.mark.parametrize(
    "template",
    [
        SYSTEM_IN_THE_LAST_TURN,
        CHATML + "{{ strftime_now('%d') }}",
        PER_TURN % ("{{ m.role + '{{ ' + m.content + ' }}' }}", ""),
        PER_TURN % ("{{ m.role + '{' + m.content }}", ""),
        PER_TURN % ("{{ m.role + '\"\"\"' + m.content }}", ""),
        PER_TURN % ("{{ m.role + '\\u200b' + m.content }}", ""),
        PER_TURN % ("{{ m.content | upper }}", ""),
        PER_TURN % ("{{ loop.index ~ m.content }}", ""),
        None,
    ],
    ids=["last-turn", "date", "action", "brace", "quotes", "unprintable", "changed", "numbered", "none"],
)  # fmt: skip
def test_what_is_not_shown_to_be_the_same_is_left_out(template):
    tokenizer = build_tokenizer(chat_template=template)
    assert chat_pieces(tokenizer) is None
    text = ollama_modelfile("model.gguf", tokenizer)
    assert "\nTEMPLATE" not in text and ("# No TEMPLATE" in text) == (template is not None)


def test_the_modelfile_names_files_ends_and_the_system_prompt():
    tokenizer = build_tokenizer()
    ends = ["<|im_end|>", "<s>"]
    text = ollama_modelfile(
        "model.gguf", tokenizer, adapter_file="a.gguf", end_tokens=ends, system_prompt='Be\n"kind".'
    )
    template = chat_pieces(tokenizer).go_template()
    assert text == (
        "FROM ./model.gguf\nADAPTER ./a.gguf\n"
        f'TEMPLATE """{template}"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<s>"\n'
        'SYSTEM """Be\n"kind"."""\n'
    )


def test_the_modelfile_says_what_the_template_cannot():
    assert "takes no system message" in ollama_modelfile("m.gguf", build_tokenizer(chat_template=MISTRAL))
    assert "strips blanks" in ollama_modelfile("m.gguf", build_tokenizer(chat_template=LLAMA_3))
    text = ollama_modelfile("m.gguf", build_tokenizer())
    assert "#" not in text


@pytest.mark.parametrize("changes", [{"system_prompt": 'a"""\nSYSTEM b'}, {"system_prompt": "a\x00"}])
def test_what_a_modelfile_cannot_hold_is_refused(changes):
    with pytest.raises(ExportError, match="Modelfile"):
        ollama_modelfile("m.gguf", build_tokenizer(), **changes)


@pytest.mark.parametrize("token", ['a"\nSYSTEM pwned', 'a"', '"""', "a\x00", "a\r", "\u200b"])
def test_end_tokens_that_a_modelfile_cannot_hold_are_left_out_and_named(token):
    plain = ollama_modelfile("m.gguf", build_tokenizer(), end_tokens=["<end>"])
    lines = ollama_modelfile("m.gguf", build_tokenizer(), end_tokens=["", token, "<end>"]).splitlines()
    (comment,) = (line for line in lines if line not in plain.splitlines())
    assert comment == f"# No PARAMETER stop for the end token {token!a}, which a Modelfile cannot hold."
    assert [line for line in lines if line != comment] == plain.splitlines()


@pytest.mark.parametrize("name", ["", "../m.gguf", "a\nADAPTER b", " m.gguf"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ExportError, match="name"):
        ollama_modelfile(name, build_tokenizer())
