"""Sample conversations, as a tokenizer's own chat template renders them: what translations are held against."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = tuple[str, str]  # role and content

_TURNS: tuple[str, ...] = (
    "Hello, how are you?",
    "Fine. 12345 + 678 = 13023\n\n- one\n- two",
    "Naïve 東京 😀 <b>bold</b> {{ x }}",
    "def f(x):\n    return x\t# ok",
    "Thanks!",
)
CONVERSATIONS: tuple[tuple[Message, ...], ...] = tuple(
    tuple((("user", "assistant")[index % 2], text) for index, text in enumerate(_TURNS[:count]))
    for count in (1, 3, 5)
)
SYSTEM: Message = ("system", "You answer briefly.\nAlways in English.")


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The jinja text of the template that conversations are rendered with, or None."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # none, or several without a default
        return None


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The prompt that asks for a reply to `messages`; None where the template refuses them."""
    dicts = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError):
        return None
