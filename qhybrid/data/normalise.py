"""Normalising: one row of each of the five formats, checked, repaired and brought into a normal form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from qhybrid.data.rows import (
    BOM_REMOVED,
    LATE_SYSTEM_MESSAGE,
    MALFORMED_HISTORY,
    MALFORMED_MESSAGE,
    NO_ASSISTANT_TURN,
    NUL_REMOVED,
    NUMBER_TO_TEXT,
    ROLE_RENAMED,
    SURROGATE_REPLACED,
    TWO_SYSTEM_MESSAGES,
    UNKNOWN_ROLE,
    ConversationRow,
    PromptCompletionRow,
    Row,
    RowFault,
    TextRow,
)

ROLES = ("system", "user", "assistant", "tool")
_ROLE_ALIASES = {
    "human": "user", "prompter": "user", "customer": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "developer": "system",
    "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
# What a message may carry beside its text. Training on the text alone would teach something else.
_UNSUPPORTED_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking", "images")

_UNCLEAN = re.compile("[\x00\ufeff\ud800-\udfff]")


def normalise_row(
    format_name: str, values: Mapping[str, object], columns: Mapping[str, str]
) -> tuple[Row, set[str]]:
    """The normal form of one row of a format, and the reasons for which it had to be repaired.

    Raises:
        RowFault: the row cannot be used.
    """
    fields = _Fields(values, columns)
    return _NORMALISERS[format_name](fields), fields.repairs


class _Fields:
    """One row seen through the recipe's column names; collects what had to be repaired."""

    def __init__(self, values: Mapping[str, object], columns: Mapping[str, str]) -> None:
        self._values = values
        self._columns = columns
        self.repairs: set[str] = set()

    def value(self, name: str) -> object:
        column = self._columns.get(name, name)
        if column not in self._values:
            raise RowFault(f"missing column {column!r}")
        return self._values[column]

    def text(self, name: str) -> str:
        return self.clean(self.value(name), self._columns.get(name, name))

    def optional(self, name: str) -> object | None:
        """The value, or None where it is missing, null, empty or blank."""
        value = self._values.get(self._columns.get(name, name))
        blank = _is_null(value) or value in ("", [], ()) or (isinstance(value, str) and not value.strip())
        return None if blank else value

    def optional_text(self, name: str) -> str | None:
        value = self.optional(name)
        return None if value is None else self.clean(value, self._columns.get(name, name))

    def clean(self, value: object, name: str) -> str:
        """`value` as text that a tokenizer takes, with `name` to call it by in a fault."""
        if _is_null(value):
            raise RowFault(f"{name!r} is null")
        if isinstance(value, bool | int | float):
            value = json.dumps(value)
            self.repairs.add(NUMBER_TO_TEXT)
        if not isinstance(value, str):
            raise RowFault(f"{name!r} is not text")
        if _UNCLEAN.search(value):
            value = self._scrub(value)
        if not value.strip():
            raise RowFault(f"{name!r} is empty")
        return value

    def _scrub(self, text: str) -> str:
        without_nul = text.replace("\0", "")
        without_bom = without_nul.lstrip("\ufeff")
        whole = without_bom.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        steps = (
            (text, without_nul, NUL_REMOVED),
            (without_nul, without_bom, BOM_REMOVED),
            (without_bom, whole, SURROGATE_REPLACED),
        )
        self.repairs.update(reason for before, after, reason in steps if before != after)
        return whole


def _is_null(value: object) -> bool:
    # pandas writes a missing cell as NaN
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(fields: _Fields) -> Row:
    return TextRow(fields.text("text"))


def _prompt_completion(fields: _Fields) -> Row:
    if not isinstance(fields.value("prompt"), list):
        return PromptCompletionRow(fields.text("prompt"), fields.text("completion"))
    prompt = _messages(fields, "prompt")
    completion = _messages(fields, "completion")
    if all(role != "assistant" for role, _ in completion):
        raise RowFault(NO_ASSISTANT_TURN)
    return _conversation(prompt + completion, num_prompt_messages=len(prompt))


def _messages_column(fields: _Fields) -> Row:
    return _conversation(_messages(fields, "messages"))


def _sharegpt(fields: _Fields) -> Row:
    messages = _messages(fields, "conversations", role_key="from", content_key="value", aliases_are_normal=True)
    return _conversation(_system_column(fields) + messages)


def _alpaca(fields: _Fields) -> Row:
    instruction, more, answer = fields.text("instruction"), fields.optional_text("input"), fields.text("output")
    pairs = fields.optional("history") or []
    messages = _system_column(fields)
    if not isinstance(pairs, list):
        raise RowFault(MALFORMED_HISTORY)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault(MALFORMED_HISTORY)
        messages += [("user", fields.clean(pair[0], "history")), ("assistant", fields.clean(pair[1], "history"))]
    question = f"{instruction}\n\n{more}" if more else instruction
    return _conversation([*messages, ("user", question), ("assistant", answer)])


def _system_column(fields: _Fields) -> list[tuple[str, str]]:
    system = fields.optional_text("system")
    return [("system", system)] if system else []


def _messages(
    fields: _Fields,
    name: str,
    role_key: str = "role",
    content_key: str = "content",
    aliases_are_normal: bool = False,
) -> list[tuple[str, str]]:
    items = fields.value(name)
    if _is_null(items):
        raise RowFault(f"{name!r} is null")
    if not isinstance(items, list):
        raise RowFault(f"{name!r} is not a list of messages")
    if not items:
        raise RowFault(f"{name!r} is empty")
    messages = []
    for item in items:
        if isinstance(item, dict) and role_key not in item and aliases_are_normal:
            role_key, content_key = "role", "content"  # {"conversations": [{"role", "content"}]} is common too
        if not isinstance(item, dict) or not isinstance(item.get(role_key), str) or content_key not in item:
            raise RowFault(MALFORMED_MESSAGE)
        for part in _UNSUPPORTED_PARTS:
            if item.get(part):
                raise RowFault(f"message has {part}, which cannot be trained yet")
        role, renamed = _role(item[role_key])
        if renamed and not aliases_are_normal:
            fields.repairs.add(ROLE_RENAMED)
        messages.append((role, fields.clean(item[content_key], content_key)))
    return messages


def _role(written: str) -> tuple[str, bool]:
    name = written.strip().lower()
    role = _ROLE_ALIASES.get(name, name)
    if role not in ROLES:
        raise RowFault(f"{UNKNOWN_ROLE} {name[:20]!r}")
    return role, role != written


def _conversation(messages: Sequence[tuple[str, str]], num_prompt_messages: int = 0) -> ConversationRow:
    roles = [role for role, _ in messages]
    if roles.count("system") > 1:
        raise RowFault(TWO_SYSTEM_MESSAGES)
    if "system" in roles[1:]:
        raise RowFault(LATE_SYSTEM_MESSAGE)
    if "assistant" not in roles:
        raise RowFault(NO_ASSISTANT_TURN)
    return ConversationRow(tuple(messages), num_prompt_messages)


_NORMALISERS = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _messages_column,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
