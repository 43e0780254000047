"""Tokens into text as they come: never a part of a character, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer, piece by piece; special tokens are left out.

    The pieces together are what the tokenizer makes of all tokens at once, cut where the first stop string begins.
    (Of bytes that make no character, tokenizers with byte fallback may take back what stood before them; what was
    shown stays. Their own DecodeStream ends with an exception there.)

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []  # from the last piece's tokens on, which are the next piece's context
        self._num_decoded = 0  # of them, tokens that are text already
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown now that `token` has come; often nothing."""
        self._ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):  # a part of a character, as far as is known
            return ""
        self._ids, self._num_decoded = self._ids[self._num_decoded :], len(self._ids) - self._num_decoded
        return self._released(self._held + piece)

    def close(self) -> str:
        """What was held back, where no more tokens come."""
        text = self._released(self._held + self._piece())
        self._ids, self._num_decoded, held, self._held = [], 0, self._held, ""
        return text + held

    def _piece(self) -> str:
        """The text of the tokens that are none yet. What a token is can depend on the one before: a blank, say."""
        context = self._tokenizer.decode(self._ids[: self._num_decoded], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(context) :]

    def _released(self, text: str) -> str:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
