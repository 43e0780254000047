"""One request's answers, on their way from the decoding thread to the client, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qhybrid.serving.batcher import Job, Update
from qhybrid.serving.decode import Completion
from qhybrid.serving.protocol import AnswerShape, ApiError

FAULTS = {
    "memory": "out of memory; a shorter prompt or answer needs less",
    "values": "the model computed values that are not finite",
    "internal": "an error inside the server; its log says more",
}

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """The answers to one request's prompts, as they come from the decoding thread.

    Attributes:
        jobs: for the batcher, one for each.
    """

    def __init__(self, completions: Sequence[Completion], deadline: float) -> None:
        self._loop, self._deadline = asyncio.get_running_loop(), deadline
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self.completions = completions
        self.jobs = [Job(completion, self._teller(index)) for index, completion in enumerate(completions)]

    def _teller(self, index: int) -> Callable[[Update], None]:
        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, update))

        return tell

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """What is new, with the index of its prompt, until all are finished.

        Raises:
            ApiError: one of them failed, or the time is over.
        """
        left = len(self.jobs)
        while left:
            try:
                index, update = await asyncio.wait_for(self._queue.get(), self._deadline - self._loop.time())
            except TimeoutError:
                raise ApiError(
                    504, "the answer took too long", code="timeout", headers={"x-should-retry": "false"}
                ) from None
            if update.fault is not None:
                raise ApiError(500, FAULTS[update.fault], code=update.fault)
            yield index, update
            left -= update.finish_reason is not None

    async def whole(self) -> list[str]:
        """The text of every answer.

        Raises:
            ApiError: as `updates`.
        """
        texts = [""] * len(self.jobs)
        async for index, update in self.updates():
            texts[index] += update.text
        return texts

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.cancelled = True


async def _events(
    shape: AnswerShape,
    answers: Answers,
    first: tuple[int, Update],
    updates: AsyncIterator[tuple[int, Update]],
) -> AsyncIterator[str]:
    """The events: a chunk for each piece of text, the counts of tokens if asked for, and [DONE]."""
    for chunk in shape.opening(len(answers.jobs)):
        yield _event(chunk)
    try:
        yield _event(shape.chunk(*first))
        async for update in updates:
            yield _event(shape.chunk(*update))
    except ApiError as error:
        yield _event(error.body)
        return
    for chunk in shape.closing(answers.completions):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; where the client goes away, the answers are given up."""

    def __init__(
        self,
        shape: AnswerShape,
        answers: Answers,
        first: tuple[int, Update],
        updates: AsyncIterator[tuple[int, Update]],
    ) -> None:
        events = _events(shape, answers, first, updates)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is given up when the client goes away.

    Raises:
        ClientGoneError: it did.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
