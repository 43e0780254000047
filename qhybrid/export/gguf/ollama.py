"""A Modelfile for Ollama: the GGUF files, the training's chat template in Ollama's language, and the end tokens.

Ollama's templates are Go's text/template over .System (all system messages) and .Messages. A chat template is
taken apart by rendering conversations of marked messages, which shows what stands between two messages. The pieces
are put together again for the sample conversations, and a TEMPLATE is written only if they come out the same.
References: docs/modelfile.mdx, docs/template.mdx and template/template.go of github.com/ollama/ollama.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qhybrid.errors import ExportError
from qhybrid.export.gguf.chat_samples import CONVERSATIONS, SYSTEM, Message, chat_template_of, rendered
from qhybrid.export.gguf.tokenizer import adds_bos

_QUOTES = '"""'  # of a value of several lines; nothing stands for them inside of one


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        opening: before the first user message, where there is no system message.
        before_system, after_system: around the system message; the user's follows. None where the template takes
            no system message.
        before_reply: between a user's message and the reply to it.
        after_reply: between a reply and the next user's message.
        asking: after the last user's message, so that a reply follows.
    """

    opening: str
    before_system: str | None
    after_system: str
    before_reply: str
    after_reply: str
    asking: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for `messages`: a system message or none, then user and assistant in turn, the user last."""
        (role, content), rest = messages[0], list(messages[1:])
        if role == "system":
            assert self.before_system is not None
            text = self.before_system + content + self.after_system + rest.pop(0)[1]
        else:
            text = self.opening + content
        for role, content in rest:
            text += (self.before_reply if role == "assistant" else self.after_reply) + content
        return text + self.asking

    def go_template(self) -> str:
        """The same in Ollama's language. After a reply that is the last message nothing is written: it goes on.

        No action trims (`{{-`), so every character of the pieces stays.
        """
        opening = self.opening
        if self.before_system is not None:
            system = self.before_system + "{{ .System }}" + self.after_system
            opening = "{{ if .System }}" + system + "{{ else }}" + opening + "{{ end }}"
        user = "{{ .Content }}{{ if $last }}" + self.asking + "{{ end }}"
        reply = self.before_reply + "{{ .Content }}{{ if not $last }}" + self.after_reply + "{{ end }}"
        return (
            opening
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + '{{ if eq .Role "user" }}' + user
            + '{{ else if eq .Role "assistant" }}' + reply
            + "{{ end }}{{ end }}"
        )  # fmt: skip

    def can_be_written(self) -> bool:
        """Whether nothing in the pieces is an action of Go's, or lost in a Modelfile."""
        pieces = (self.opening, self.before_system or "", self.after_system)
        pieces += (self.before_reply, self.after_reply, self.asking)
        is_text = not any("{{" in piece or piece.endswith("{") for piece in pieces)
        return is_text and _can_be_written(self.go_template())


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """The pieces of the tokenizer's chat template, shown to render the sample conversations as it does; else None.

    BOS is left out in front where llama.cpp puts it there.
    """
    template = chat_template_of(tokenizer)
    if template is None or "strftime_now" in template:  # a date that would stay the same for ever
        return None
    one, three = ([("user", "⟦0⟧")], [("user", "⟦0⟧"), ("assistant", "⟦1⟧"), ("user", "⟦2⟧")])
    first, later = _between(rendered(tokenizer, one), 1), _between(rendered(tokenizer, three), 3)
    with_system = _between(rendered(tokenizer, [("system", "⟦0⟧"), ("user", "⟦1⟧")]), 2)
    if first is None or later is None:
        return None
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    pieces = ChatPieces(
        opening=first[0].removeprefix(bos),
        before_system=with_system[0].removeprefix(bos) if with_system else None,
        after_system=with_system[1] if with_system else "",
        before_reply=later[1],
        after_reply=later[2],
        asking=first[1],
    )
    samples = [*CONVERSATIONS, *([SYSTEM, *turns] for turns in CONVERSATIONS if with_system)]
    same = all(bos + pieces.render(turns) == rendered(tokenizer, turns) for turns in samples)
    return pieces if same and pieces.can_be_written() else None


def ollama_modelfile(
    model_file: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter_file: str | None = None,
    end_tokens: Sequence[str] = (),
    system_prompt: str | None = None,
) -> str:
    """The text of a Modelfile, to be put beside the GGUF files.

    Args:
        model_file: the name of the model's GGUF file.
        tokenizer: with the chat template of training.
        adapter_file: the name of an adapter's GGUF file.
        end_tokens: what ends a reply, beside the tokenizer's end token.
        system_prompt: for conversations that have none.

    Raises:
        ExportError: a system prompt or a name that a Modelfile cannot hold.
    """
    lines = [f"FROM {_beside(model_file)}"]
    if adapter_file is not None:
        lines.append(f"ADAPTER {_beside(adapter_file)}")
    pieces = chat_pieces(tokenizer)
    if pieces is not None:
        if pieces.before_system is None:
            lines.append("# The chat template takes no system message, so this leaves them out.")
        if _strips(tokenizer):
            lines.append("# The chat template strips blanks around messages, which TEMPLATE cannot.")
        lines.append(f"TEMPLATE {_QUOTES}{pieces.go_template()}{_QUOTES}")
    elif chat_template_of(tokenizer) is not None:
        lines += [
            "# No TEMPLATE: the chat template has no proven translation. Ollama renders the one in the GGUF file,",
            "# unless it takes it for one of its own: `ollama show --template` then shows that.",
        ]
    ends = dict.fromkeys([*([tokenizer.eos_token] if tokenizer.eos_token else []), *end_tokens])
    for token in filter(None, ends):
        if _can_be_written(token) and '"' not in token:
            lines.append(f'PARAMETER stop "{token}"')
        else:
            lines.append(f"# No PARAMETER stop for the end token {token!a}, which a Modelfile cannot hold.")
    if system_prompt:
        if not _can_be_written(system_prompt):
            raise ExportError(
                "the system prompt holds three quotes in a row or control characters, which no Modelfile can",
                hint="give it with each request instead",
            )
        lines.append(f"SYSTEM {_QUOTES}{system_prompt}{_QUOTES}")
    return "\n".join(lines) + "\n"


def _between(text: str | None, count: int) -> list[str] | None:
    """What stands around the marks ⟦0⟧, ⟦1⟧, … of `text`; None if they are not there once each, in order."""
    if text is None or re.findall("⟦.⟧", text) != [f"⟦{index}⟧" for index in range(count)]:
        return None
    return re.split("⟦.⟧", text)


def _strips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template takes blanks around messages away."""
    return " \n⟦a⟧\n " not in (rendered(tokenizer, [("user", " \n⟦a⟧\n ")]) or "")


def _can_be_written(text: str) -> bool:
    """Whether Ollama's parser gives the text back as it is: it drops what Go does not call printable."""
    return _QUOTES not in text and all(char in "\n\t " or (char.isprintable() and char != "\r") for char in text)


def _beside(name: str) -> str:
    if not name or "/" in name or not name.isprintable() or name != name.strip():
        raise ExportError(
            f"{name!r} is no name of a file beside a Modelfile", hint="use letters, digits and dashes"
        )
    return f"./{name}"
