"""Prompts into tokens exactly as training saw them: the same template, system prompt, date and cleaning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

from qhybrid.data.normalise import normalise_row
from qhybrid.data.rows import ConversationRow, RowFault
from qhybrid.data.templates import BUILT_IN, chat_template_text
from qhybrid.data.turns import ChatRenderer
from qhybrid.errors import DataError, ServingError

_ANSWER = {"role": "assistant", "content": "."}  # rows of data have one; it is taken off again


class _PromptRenderer(ChatRenderer):
    """Renders conversations up to where the answer begins."""

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        return self._text(messages, ask=True)


class Prompter:
    """Tokenises what one adapter, or the base model, is asked. Threads may share it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        date: str | None = None,
    ) -> None:
        """
        Args:
            chat_template: jinja text; the tokenizer's own when left out.
            system_prompt: for conversations that have none.
            date: what templates that write the date are told (ISO 8601); today when left out.

        Raises:
            ServingError: a tokenizer that cannot tell text from tokens one at a time.
            DataError: a chat template that is not valid jinja.
        """
        if not tokenizer.is_fast:
            raise ServingError(
                f"{type(tokenizer).__name__} cannot give text token by token",
                hint="use a tokenizer with a tokenizer.json file",
            )
        self.tokenizer = tokenizer
        template = chat_template or chat_template_text(None, None, tokenizer, Path())
        self._renderer = _PromptRenderer(tokenizer, template, tokenizer.eos_token, date) if template else None
        self._system_prompt = system_prompt
        self._lock = Lock()  # the tokenizers' own settings are not safe to share

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return self._renderer is not None

    def text(self, prompt: str) -> list[int]:
        """The tokens of plain text, with the special tokens that open a text.

        Raises:
            DataError: no tokens come of it.
        """
        return self._ids(_utf8(prompt), special=True)

    def chat(self, messages: Sequence[Any]) -> list[int]:
        """The tokens of a conversation up to where the answer begins.

        Args:
            messages: mappings of "role" and "content", as OpenAI's protocol has them: text, or parts of type text.

        Raises:
            DataError: there is no chat template, it refuses the conversation, or a message is none that can be
                trained on.
        """
        if self._renderer is None:
            raise DataError(
                "the tokenizer has no chat template",
                hint=f"ask with plain text, or train with data.chat_template {' or '.join(BUILT_IN)}",
            )
        rows = [_flattened(message) for message in messages]
        rows = [row for row in rows if not (_is_system(row) and row["content"] == "")]
        if not rows:
            raise DataError("there are no messages")
        try:
            row, _ = normalise_row("messages", {"messages": [*rows, _ANSWER]}, {})
        except RowFault as fault:
            raise DataError(f"messages cannot be used: {fault.reason}") from None
        assert isinstance(row, ConversationRow)
        told = row.messages[:-1]
        if self._system_prompt is not None and told[0][0] != "system":
            told = (("system", self._system_prompt), *told)
        try:
            text = self._renderer.prompt(told)
        except Exception as error:  # templates raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"the chat template refused the messages: {reason}") from None
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if not ids:
            raise DataError("the prompt is empty")
        return ids


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _flattened(message: Any) -> Any:
    """The message with the text of its parts in one piece.

    Raises:
        DataError: a part that is no text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise DataError(f"a part of a message is {str(kind or 'nothing')[:40]!r}; only text is understood")
    return {**message, "content": "".join(part["text"] for part in message["content"])}


def _utf8(text: str) -> str:
    """`text` with lone surrogates, which JSON can hold and tokenizers cannot, replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
