"""The answer of a row: where it begins, its text, and when a generated one is as good."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import DataError

_NUMBER = re.compile(r"[$€£]?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*[.%]?")


def answer_start(row: EncodedRow) -> int:
    """Where the last scored run of tokens begins: the answer that generation must give."""
    scored = row.labels != IGNORED_LABEL
    if not scored.any():
        return 0
    last = int(np.flatnonzero(scored)[-1])
    unscored = np.flatnonzero(~scored[:last])
    return int(unscored[-1]) + 1 if len(unscored) else 0


def answer_text(tokenizer: PreTrainedTokenizerBase, row: EncodedRow) -> str:
    """The expected answer, without special tokens."""
    tokens = [token for token in row.labels[answer_start(row) :].tolist() if token != IGNORED_LABEL]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def result_after(text: str, marker: str) -> str | None:
    """What stands after the last `marker`, to the end of its line: the result of a derivation; None without one.

    A number is given without separators of thousands, currency, trailing zeros and the full stop: GSM8K's
    "#### 1,200" and "#### $1200.00." are one.
    """
    if marker not in text:
        return None
    found = text.rpartition(marker)[2].strip().partition("\n")[0].strip()
    number = _NUMBER.fullmatch(found)
    if number is None:
        return found
    digits = number[1].replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def require_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow], marker: str | None = None
) -> None:
    """Refuse rows whose answers cannot be compared.

    Raises:
        DataError: no row has a prompt; or an expected answer lacks the marker.
    """
    asked = [row for row in rows if answer_start(row) > 1]
    if not asked:
        raise DataError("exact match cannot be measured: no row has a prompt")
    for row in asked if marker is not None else ():
        if marker not in answer_text(tokenizer, row):
            raise DataError(
                f"the answer has no {marker!r}, after which its result should stand",
                where=f"{row.source}:{row.number}" if row.source else None,
                hint="leave answer_after out, or name what all answers have",
            )


@dataclass(frozen=True)
class Answer:
    """What the model generated for one row, and what the row says."""

    prompt: str
    expected: str
    generated: str
    is_cut_off: bool  # max_new_tokens came before an end token
    after: str | None = None  # only what follows this marker counts

    @property
    def is_exact(self) -> bool:
        """Whether both are the same text, blanks at the ends aside; or the same result after the marker."""
        if self.after is None:
            return self.generated.strip() == self.expected.strip()
        result = result_after(self.generated, self.after)
        return result is not None and result == result_after(self.expected, self.after)
