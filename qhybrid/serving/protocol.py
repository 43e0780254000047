"""OpenAI's protocol: what a request may say, what is refused, and the shape of answers and errors."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from qhybrid.serving.batcher import Update
from qhybrid.serving.decode import Completion
from qhybrid.serving.sampling import Sampling

_MOST_STOPS, _LONGEST_STOP = 4, 256

# Lists and objects in a request, at any depth. A million of them keep Python's garbage collector busy for seconds,
# in which no other thread runs.
_MOST_CONTAINERS = 100_000
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

# What would change the answer and is not done here, and the values with which it changes nothing. Other fields
# that are not known (user, metadata, store, …) are ignored.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
}


class ApiError(Exception):
    """A request that is not answered: the HTTP status, and what OpenAI's clients show of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class PromptLimits:
    """How much a request may ask with, known before a token is made.

    Attributes:
        prompts: of a request for completions.
        tokens: of a prompt; a conversation has no more messages than that.
    """

    prompts: int
    tokens: int


# Lists are looked at by hand, up to the first fault. pydantic would note a fault for every item, and for every
# kind of list that it could have been: seconds for a few megabytes.


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > _MOST_STOPS
        or not all(isinstance(stop, str) and len(stop) <= _LONGEST_STOP for stop in stops)
    ):
        limits = f"at most {_MOST_STOPS} strings of {_LONGEST_STOP} characters are taken"
        raise ApiError(400, f"stop: {limits}", param="stop")
    return [stop for stop in stops if stop]


def _messages(value: Any, info: ValidationInfo) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    if len(value) > info.context.tokens:
        raise _too_long("messages", f"{len(value)} messages are", info.context)
    return value


def _prompts(value: Any, info: ValidationInfo) -> list[str | list[int]]:
    is_one = not isinstance(value, list) or (value and type(value[0]) is int)
    prompts = [value] if is_one else value
    if not 0 < len(prompts) <= info.context.prompts:
        raise ApiError(400, f"1 to {info.context.prompts} prompts are taken at once", param="prompt")
    kind = type(prompts[0])
    for prompt in prompts:
        is_tokens = isinstance(prompt, list)
        if is_tokens and len(prompt) > info.context.tokens:
            raise _too_long("prompt", f"a prompt of {len(prompt)} tokens is", info.context)
        if not isinstance(prompt, kind) or not (
            isinstance(prompt, str) or (is_tokens and all(type(token) is int for token in prompt))
        ):
            raise ApiError(400, "prompt must be text, tokens, or a list of either", param="prompt")
    return prompts


def _too_long(param: str, what: str, most: PromptLimits) -> ApiError:
    message = f"{what} longer than {most.tokens} tokens"
    return ApiError(400, message, param=param, code="context_length_exceeded")


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class OpenAIRequest(BaseModel):
    """What both kinds of request may say."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # vLLM's; -1 and 0 for all
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], PlainValidator(_stop)] = []
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    prompt_field: ClassVar[str]
    default_tokens: ClassVar[int | None] = None  # of an answer, where the request says nothing; None for the most

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of the answer, where the request says."""
        return self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; as in OpenAI's protocol drawn at temperature 1 where nothing is said."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=self.seed,
        )


class ChatRequest(OpenAIRequest):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Any], PlainValidator(_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    prompt_field: ClassVar[str] = "messages"

    @property
    def answer_tokens(self) -> int | None:
        """Under its newer name or its older."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(OpenAIRequest):
    """Of /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]  # each as text or as tokens

    prompt_field: ClassVar[str] = "prompt"
    default_tokens: ClassVar[int | None] = 16  # as in OpenAI's protocol


R = TypeVar("R", bound=OpenAIRequest)


def parse_request(kind: type[R], body: bytes, most: PromptLimits) -> R:
    """A request of that kind. Takes some tenths of a second for megabytes.

    Raises:
        ApiError: 400, with the field that is at fault.
    """
    if _num_brackets(body) > _MOST_CONTAINERS and _num_brackets(_STRING.sub(b"", body)) > _MOST_CONTAINERS:
        raise ApiError(400, f"the body is of more than {_MOST_CONTAINERS} lists and objects")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    for name, harmless in _REFUSED.items():
        value = values.get(name)
        if value is not None and not any(_same(value, allowed) for allowed in harmless):
            raise ApiError(
                400, f"{name} is not supported by this server", param=name, code="unsupported_parameter"
            )
    try:
        request = kind.model_validate(values, context=most)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"][:1])
        raise ApiError(400, f"{place}: {fault['msg'][:200]}", param=place or None) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for requests with stream: true", param="stream_options")
    return request


def _num_brackets(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and not a number that stands for a truth: `logprobs: 0` asks for something, false does not."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


class AnswerShape:
    """Answers to one request as JSON, whole or in chunks."""

    def __init__(self, request: OpenAIRequest, model: str) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        self._counts = request.stream_options is not None and request.stream_options.include_usage
        self._common = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], completions: Sequence[Completion]) -> dict[str, Any]:
        """All answers, finished."""
        choices = []
        for text, completion in zip(texts, completions, strict=True):
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append(_choice(len(choices), content, completion.finish_reason))
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": _usage(completions)}

    def opening(self, num_answers: int) -> Iterator[dict[str, Any]]:
        """The chunks that come before the text: in a chat they say who speaks."""
        if self._is_chat:
            for index in range(num_answers):
                yield self._chunk([_choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def chunk(self, index: int, update: Update) -> dict[str, Any]:
        """A piece of the answer with that index."""
        if self._is_chat:
            content: dict[str, Any] = {"delta": {"content": update.text} if update.text else {}}
        else:
            content = {"text": update.text}
        return self._chunk([_choice(index, content, update.finish_reason)])

    def closing(self, completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
        """The chunks that come after the text: the counts of tokens, where they were asked for."""
        if self._counts:
            yield {**self._chunk([]), "usage": _usage(completions)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, **({"usage": None} if self._counts else {})}


def _choice(index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    num_prompt_tokens = sum(completion.num_prompt_tokens for completion in completions)
    num_tokens = sum(completion.num_tokens for completion in completions)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def model_entry(name: str, base: str, created: int, max_context: int) -> dict[str, Any]:
    """One of the models in the list; adapters name the base model as their parent, as in vLLM."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "qhybrid",
        "parent": None if name == base else base,
        "max_model_len": max_context,
    }
