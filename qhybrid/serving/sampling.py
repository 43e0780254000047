"""Which token comes next: the likeliest, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qhybrid.redaction import redacted_traceback
from qhybrid.serving.memory import is_out_of_memory

_log = logging.getLogger(__name__)

# Below it a token whose logit is 0.001 less than the likeliest's has a probability of e**-100: nothing is drawn.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are chosen.

    Attributes:
        temperature: 0, or less than 1e-5, takes the likeliest token each time.
        top_p: draw among the likeliest tokens that together have this probability; 1 for all.
        top_k: draw among so many of the likeliest; 0 for all.
        seed: equal seeds draw equal tokens. None: another draw each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < _LEAST_TEMPERATURE


class Sampler:
    """Draws the tokens of one answer, from a generator of its own: its neighbours in a batch change nothing.

    The order is transformers': temperature, top-k, top-p.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        assert not sampling.is_greedy
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> Tensor:
        """One token (1, 1) from logits (1, vocabulary) in fp32."""
        # Less the largest, which changes no probability: divided by a small temperature, it would overflow.
        scores = self._warpers(None, logits - logits.amax(-1, keepdim=True))
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)


def next_tokens(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int | None]:
    """The next token of every row of logits (rows, vocabulary) in fp32; None of a row that has none.

    A row has no next token where its values are not finite, or the draw fails.

    Args:
        samplers: one for each row; None takes the likeliest token.
    """
    finite = logits.isfinite().all(-1)
    tokens = logits.argmax(-1)
    for row, sampler in enumerate(samplers):
        if sampler is not None and finite[row]:  # on a GPU, drawing from NaN ends the process's use of it
            try:
                tokens[row] = sampler.draw(logits[row : row + 1])[0, 0]
            except RuntimeError as error:  # of this row alone; what others have drawn stays
                if is_out_of_memory(error):
                    raise
                _log.error("no token could be drawn\n%s", redacted_traceback(error))
                finite[row] = False
    pairs = zip(tokens.tolist(), finite.tolist(), strict=True)
    return [token if is_finite else None for token, is_finite in pairs]
