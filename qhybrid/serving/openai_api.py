"""The HTTP side of the server: OpenAI's chat and completions protocol over one batcher."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qhybrid.errors import DataError
from qhybrid.serving.answers import FAULTS, Answers, ClientGoneError, EventStream, unless_gone
from qhybrid.serving.batcher import Batcher, ClosingError, DeadError, QueueFullError
from qhybrid.serving.decode import Completion
from qhybrid.serving.engine import Engine, ServedModel, TooLongError
from qhybrid.serving.protocol import (
    AnswerShape,
    ApiError,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
    PromptLimits,
    R,
    model_entry,
    parse_request,
)

_BODY_SECONDS = 30.0  # for a client to send its request


@dataclass(frozen=True)
class ApiLimits:
    """What one request may take.

    Attributes:
        max_tokens: of one answer.
        timeout_seconds: from a request's arrival to its last token.
        body_bytes: of a request.
    """

    max_tokens: int
    timeout_seconds: float
    body_bytes: int = 4 * 2**20


def create_app(
    engine: Engine,
    batcher: Batcher,
    limits: ApiLimits,
    *,
    api_key: str | None = None,
    local_hosts_only: bool = True,
) -> ASGIApp:
    """The server as an ASGI application; it starts and closes the batcher.

    Args:
        api_key: what clients must give; None asks for none.
        local_hosts_only: without a key, answer only requests whose Host header names this machine. A web page
            whose name was made to lead here (DNS rebinding) has another.
    """
    api = _Api(engine, batcher, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await run_in_threadpool(batcher.close)

    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name}", api.show_model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _own_fault},
        lifespan=lifespan,
    )
    return _Guard(app, api_key, local_hosts_only)


class _Guard:
    """Lets through who may ask: with the key where there is one, else from this machine by its own name."""

    def __init__(self, app: ASGIApp, api_key: str | None, local_hosts_only: bool) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._local_hosts_only = local_hosts_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        app = self._app if error is None else _error_response(error)
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            if self._local_hosts_only and not _names_this_machine(headers.get(b"host", b"").decode("latin-1")):
                return ApiError(403, "this server answers to the name localhost alone; a key would open it")
        elif scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                return ApiError(
                    401,
                    "the API key is missing or wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None


def _names_this_machine(host: str) -> bool:
    """Whether a Host header, with or without a port, is "localhost" or a loopback address."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class _Api:
    """The endpoints."""

    def __init__(self, engine: Engine, batcher: Batcher, limits: ApiLimits) -> None:
        self._engine, self._batcher, self._limits = engine, batcher, limits
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        waiting, running = self._batcher.counts
        state = self._batcher.state
        content = {"status": state, "waiting": waiting, "running": running}
        return JSONResponse(content, status_code=200 if state == "ok" else 503)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self._engine.models]})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self._entry(self._model(request.path_params["name"]).name))

    def _entry(self, name: str) -> dict[str, Any]:
        return model_entry(name, self._engine.base, self._created, self._engine.max_context)

    def _model(self, name: str) -> ServedModel:
        found = self._engine.models.get(name)
        if found is None:
            known = ", ".join(self._engine.models)
            raise ApiError(404, f"there is no model {name[:80]!r}; there are {known}", param="model",
                           code="model_not_found")  # fmt: skip
        return found

    async def chat(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.timeout_seconds
        asked = await self._parsed(ChatRequest, request)
        served = self._model(asked.model)
        with _as_api_error("messages"):
            ids = await run_in_threadpool(served.prompter.chat, asked.messages)
        return await self._answer(request, asked, served, [ids], deadline)

    async def complete(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.timeout_seconds
        asked = await self._parsed(CompletionRequest, request)
        served = self._model(asked.model)
        with _as_api_error("prompt"):
            prompts = [
                await run_in_threadpool(served.prompter.text, prompt) if isinstance(prompt, str) else prompt
                for prompt in asked.prompt
            ]
        return await self._answer(request, asked, served, prompts, deadline)

    async def _parsed(self, kind: type[R], request: Request) -> R:
        """The request, read in a thread: others go on while a large one is looked at."""
        body = await self._body(request)
        most = PromptLimits(prompts=self._batcher.max_queue, tokens=self._engine.max_context)
        return await run_in_threadpool(parse_request, kind, body, most)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a web page cannot send elsewhere without being asked first (CORS)
            raise ApiError(415, "the Content-Type must be application/json")
        body = bytearray()
        with contextlib.suppress(ClientDisconnect):
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    async for part in request.stream():
                        body += part
                        if len(body) > self._limits.body_bytes:
                            raise ApiError(413, f"the request has more than {self._limits.body_bytes} bytes")
            except TimeoutError:
                raise ApiError(408, "the request took too long to arrive") from None
        return bytes(body)

    def _completion(self, asked: OpenAIRequest, served: ServedModel, ids: Sequence[int]) -> Completion:
        most, wanted = self._limits.max_tokens, asked.answer_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens is {wanted}, and this server's most is {most}", param="max_tokens")
        if wanted is None:
            wanted = max(1, min(asked.default_tokens or most, most, self._engine.max_context - len(ids)))
        return served.completion(ids, max_tokens=wanted, sampling=asked.sampling, stop=asked.stop)

    async def _answer(
        self,
        request: Request,
        asked: OpenAIRequest,
        served: ServedModel,
        prompts: Sequence[Sequence[int]],
        deadline: float,
    ) -> Response:
        with _as_api_error(asked.prompt_field):
            completions = [self._completion(asked, served, ids) for ids in prompts]
        answers = Answers(completions, deadline)
        try:
            self._batcher.submit(answers.jobs)
        except QueueFullError:
            raise ApiError(
                429, "too many requests are waiting", code="rate_limit_exceeded", headers={"Retry-After": "1"}
            ) from None
        except ClosingError:
            raise ApiError(503, "the server is being stopped") from None
        except DeadError:
            raise ApiError(503, "the server can answer no more; it must be restarted", code="failed") from None
        shape = AnswerShape(asked, served.name)
        try:
            if asked.stream:
                updates = answers.updates()
                first = await unless_gone(request, anext(updates))  # a fault before it still has a status
                return EventStream(shape, answers, first, updates)
            return JSONResponse(shape.whole(await unless_gone(request, answers.whole()), completions))
        except BaseException as error:
            answers.cancel()
            if isinstance(error, ClientGoneError):
                return Response(status_code=499)  # which nobody reads
            raise


@contextlib.contextmanager
def _as_api_error(param: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        code = "context_length_exceeded" if isinstance(error, TooLongError) else None
        raise ApiError(400, error.message, param=param, code=code) from None


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path[:80]}", 405: f"{request.method} is not for this path"}
    message = words.get(error.status_code, error.detail)
    return _error_response(ApiError(error.status_code, message, headers=error.headers))


async def _own_fault(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, FAULTS["internal"]))  # starlette raises it again, for the log
