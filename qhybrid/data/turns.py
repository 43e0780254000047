"""Turns: a conversation as text, and which part of the text each assistant turn is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qhybrid.data.rows import TURN_DIFFERS, TURN_MISSING, ConversationRow, RowFault

_DATE_CALL = re.compile(r"""\bstrftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
# What a template raises by itself, and what the Python in it raises on values it did not expect.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, and the [start, end) character spans of it that are trained.

    `lost_thinking`: the template left out what a trained turn thought, as many do for earlier turns.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    lost_thinking: bool = False


class ChatRenderer:
    """Renders conversations and finds the assistant's turns in the text.

    Turn i starts where the conversation before it ends when a reply is asked for, and ends where the
    conversation up to it ends; so the end-of-turn token is part of the turn and the role header is not.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str | None, date: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template if date is None else _with_date(template, date)
        self._control_tokens = [token for token in tokenizer.get_added_vocab() if len(token) > 1]
        self._variables = {} if eos_token is None else {"eos_token": eos_token}

    def render(
        self, row: ConversationRow, *, whole: bool = False, prompt_turns: bool = False
    ) -> RenderedConversation:
        """The text of `row` and its trained spans.

        `whole` trains all of the text; `prompt_turns` trains the assistant's turns in the prompt as well.

        Raises:
            RowFault: the template refuses the row, drops a message, or renders a turn in a way that its
                place cannot be told.
        """
        try:
            return self._render(row, whole, prompt_turns)
        except _TEMPLATE_ERRORS as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RowFault(f"chat template refused the row: {lines[0][:120]}") from None

    def _render(self, row: ConversationRow, whole: bool, prompt_turns: bool) -> RenderedConversation:
        text = self._text(row.messages)
        if any(_visible(content) not in text for role, content in row.messages if role != "tool"):
            raise RowFault(TURN_MISSING)
        if whole:
            return RenderedConversation(text, ((0, len(text)),))
        first = 0 if prompt_turns else row.num_prompt_messages
        turns = [index for index, (role, _) in enumerate(row.messages) if role == "assistant" and index >= first]
        spans = [self._turn_span(row.messages, index, text) for index in turns]
        if None in spans or any(left[1] > right[0] for left, right in pairwise(spans)):
            spans = self._marked_spans(row.messages, text)[-len(turns) :]
        if any(
            _visible(row.messages[turn][1]) not in text[start:end]
            for turn, (start, end) in zip(turns, spans, strict=True)
        ):
            raise RowFault(TURN_MISSING)
        lost_thinking = any(_thinking(row.messages[turn][1]) not in text for turn in turns)
        return RenderedConversation(text, tuple(spans), lost_thinking)

    def _text(self, messages: Sequence[tuple[str, str]], *, ask: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            _as_dicts(messages),
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=ask,
            **self._variables,
        )

    def _turn_span(self, messages: Sequence[tuple[str, str]], index: int, text: str) -> tuple[int, int] | None:
        start = self._turn_start(messages, index, text)
        if start is None:
            return None
        if index == len(messages) - 1:
            return start, len(text)
        ended_here = self._text(messages[: index + 1])
        if text.startswith(ended_here):
            return start, len(ended_here)
        # Some templates close the last turn, or the whole conversation, in another way than a turn inside it.
        words = _visible(messages[index][1])
        shared = self._before_control_token(text, common_prefix_length(ended_here, text))
        turn = text[start:shared].rstrip()
        if words and words in turn and not turn.endswith(words):
            return start, shared
        # Templates that strip thinking from earlier turns render this turn in two ways. What it closes with
        # is the same in both, so its end is where its words and that closing are.
        closing = ended_here[ended_here.rfind(words) + len(words) :]
        place = text.find(words + closing, start)
        return None if place < 0 or not words or not closing.strip() else (start, place + len(words + closing))

    def _turn_start(self, messages: Sequence[tuple[str, str]], index: int, text: str) -> int | None:
        if index == 0:
            return self._first_turn_start(messages[0], text)
        asked = self._text(messages[:index], ask=True)
        if text.startswith(asked):
            return len(asked)
        # Some generation prompts open a thinking block that the whole conversation does not have.
        before = self._text(messages[:index])
        if not text.startswith(before):
            return None
        return self._before_control_token(text, common_prefix_length(asked, text))

    def _first_turn_start(self, message: tuple[str, str], text: str) -> int:
        """Nothing before it can be rendered, so its header is what two other turns in its place share.

        The first place of its words may be inside the header: "a" is in "assistant".
        """
        left, right = (self._text([(message[0], words)]) for words in ("0", "1"))
        header = left[: common_prefix_length(left, right)]
        return len(header) if text.startswith(header) else text.find(_visible(message[1]))

    def _before_control_token(self, text: str, place: int) -> int:
        """`place`, or the start of the control token that it is inside of: "<|" is shared by most of them."""
        for token in self._control_tokens:
            start = text.find(token, max(0, place - len(token) + 1), place + len(token) - 1)
            if 0 <= start < place:
                return start
        return place

    def _marked_spans(self, messages: Sequence[tuple[str, str]], text: str) -> list[tuple[int, int]]:
        """All assistant turns, from a template that marks them with {% generation %}."""
        if "endgeneration" not in self._template:
            raise RowFault(TURN_DIFFERS)
        encoded = self._tokenizer.apply_chat_template(
            _as_dicts(messages),
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **self._variables,
        )
        tokens = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        runs = [list(run) for marked, run in groupby(tokens, key=lambda token: token[0]) if marked]
        if len(runs) != sum(role == "assistant" for role, _ in messages):
            raise RowFault(TURN_DIFFERS)
        return [(run[0][1][0], run[-1][1][1]) for run in runs]


def _with_date(template: str, date: str) -> str:
    """`template` with `date` (ISO 8601) in the place of today's, which would give other rows on another day.

    transformers gives templates a function strftime_now and lets no caller replace it, so its calls are.
    """
    day = datetime.fromisoformat(date)
    return _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call["format"])), template)


def _as_dicts(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def _visible(content: str) -> str:
    """What every template keeps of a message: not its thinking, nor the blanks around it."""
    return content.rsplit("</think>", 1)[-1].strip()


def _thinking(content: str) -> str:
    """What a message thinks aloud before it answers, or nothing."""
    thinking, mark, _ = content.rpartition("</think>")
    return thinking.rpartition("<think>")[2].strip() if mark else ""


def common_prefix_length(left: Sequence, right: Sequence) -> int:
    """How many leading characters or tokens two sequences share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))
