"""Rows: as a file has them, in their three normal forms, and the reasons for which one is not used."""

from __future__ import annotations

from dataclasses import dataclass

# Reasons for dropping a row. They are what the audit counts by, so they name no content of the row.
INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "not valid UTF-8"
INVALID_CSV = "invalid CSV"
INVALID_CSV_LINES = "invalid CSV over several lines, and what else is in them is lost"
UNREADABLE = "a value that Python cannot hold"
TOO_MANY_CELLS = "more cells than the header has columns"
NOT_AN_OBJECT = "not an object"
MALFORMED_MESSAGE = "malformed message (role or content is missing)"
MALFORMED_HISTORY = "history is not a list of question and answer pairs"
UNKNOWN_ROLE = "unknown role"
NO_ASSISTANT_TURN = "no assistant turn"
TWO_SYSTEM_MESSAGES = "more than one system message"
LATE_SYSTEM_MESSAGE = "system message not first"
TURN_DIFFERS = "chat template renders a turn differently in the whole conversation than at its end"
TURN_MISSING = "chat template leaves out or changes a message"
NO_TRAINED_TOKEN = "no trained token"

# Reasons for counting a row as repaired.
NUL_REMOVED = "NUL characters removed"
BOM_REMOVED = "byte order mark removed"
SURROGATE_REPLACED = "lone surrogates replaced"
NUMBER_TO_TEXT = "number or boolean turned into text"
ROLE_RENAMED = "role renamed"


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it: its value, or the fault that kept it from being read."""

    number: int
    value: object = None
    fault: str | None = None
    repairs: frozenset[str] = frozenset()


class RowFault(Exception):
    """Why one row cannot be used. Stays inside this package: users read its reason in the audit."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class TextRow:
    """Plain text, all of it trained."""

    text: str


@dataclass(frozen=True)
class PromptCompletionRow:
    """Two plain strings; the completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ConversationRow:
    """(role, content) pairs; the assistant turns after the first `num_prompt_messages` are trained."""

    messages: tuple[tuple[str, str], ...]
    num_prompt_messages: int = 0


Row = TextRow | PromptCompletionRow | ConversationRow
