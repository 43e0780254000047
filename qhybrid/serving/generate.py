"""Answers to a list of prompts without a server, in batches that any adapters share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from qhybrid.errors import AdapterError
from qhybrid.serving.decode import Completion
from qhybrid.serving.engine import Engine


def answer_all(
    engine: Engine, completions: Sequence[Completion], max_batch: int, tell: Callable[[Completion, str], None]
) -> None:
    """Decode every completion; a waiting one takes the place of one that is finished.

    Args:
        max_batch: rows that are decoded together.
        tell: called with each piece of text as it comes; with the last one the completion has its finish reason.

    Raises:
        AdapterError: the model computed values that are not finite.
    """
    batch, waiting, running = engine.new_batch(), deque(completions), []
    with engine.inference():
        while waiting or running:
            joining = [waiting.popleft() for _ in range(min(len(waiting), max_batch - len(running)))]
            running += joining
            if joining:
                batch.add(joining)
            if len(batch):
                batch.step()
            for row in running:
                if row.finish_reason == "error":
                    raise AdapterError("the model computed values that are not finite")
                text = row.read()
                if text or row.finish_reason:
                    tell(row, text)
            running = [row for row in running if row.finish_reason is None]
