"""`qhybrid serve` with the openai client: chat, completions, streams, refusals and limits."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serving_helpers import client_of, running_server, wait_until
from transformers import AutoTokenizer

from qhybrid.evaluation.models import load_adapter_for_inference
from qhybrid.serving.prompts import Prompter

CHAT = [{"role": "user", "content": "How many apples are left?"}]


@pytest.fixture(scope="module")
def engine(folders):
    from qhybrid.serving.load import BaseChoice, load_engine

    return load_engine(list(folders.items()), BaseChoice(dtype="float32"))


@pytest.fixture(scope="module")
def served(engine):
    """A server that is not stopped between tests: its address and its batcher."""
    with running_server(engine) as (url, batcher):
        yield url, batcher


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return client_of(served[0])


def test_models_are_listed(client, folders):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == [*folders, "tiny"]
    assert listed["dora"].parent == "tiny" and listed["tiny"].parent is None
    assert client.models.retrieve("banded").owned_by == "qhybrid"
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        client.models.retrieve("nobody")


def test_chat_is_what_the_adapter_generates(client, folders):
    for name in ("banded", "lora"):
        model, tokenizer, _ = load_adapter_for_inference(folders[name])
        ids = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer = client.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=12)
        assert answer.choices[0].message.content == tokenizer.decode(out, skip_special_tokens=True)
        assert answer.model == name and answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == ids["input_ids"].shape[1]
        assert answer.usage.completion_tokens == len(out)
        assert answer.choices[0].finish_reason == ("length" if len(out) == 12 else "stop")


def test_a_stream_is_the_same_in_pieces(client):
    asked = {"model": "dora", "messages": CHAT, "temperature": 0.8, "seed": 3, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 5
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_completions_take_text_tokens_and_several_prompts(client, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    asked = {"model": "other", "temperature": 0, "max_tokens": 8}
    texts = ["The river", "Name the planet and"]
    alone = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    both = client.completions.create(prompt=texts, **asked)
    assert [choice.text for choice in both.choices] == alone and alone[0] != alone[1]
    assert [choice.index for choice in both.choices] == [0, 1] and 2 < both.usage.completion_tokens <= 16
    as_tokens = client.completions.create(prompt=tokenizer(texts)["input_ids"], **asked)
    assert [choice.text for choice in as_tokens.choices] == alone
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=texts, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    longest, prompt = max(zip(alone, texts, strict=True), key=lambda pair: len(pair[0]))
    stopped = client.completions.create(prompt=prompt, stop=[longest[3:6]], **asked)
    assert stopped.choices[0].text == longest.partition(longest[3:6])[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert client.completions.create(prompt="a", model="tiny").usage.completion_tokens <= 16


def test_requests_of_all_adapters_share_a_batch_and_answer_as_alone(engine, client, folders, monkeypatch):
    names = [*folders, "tiny"]

    def ask(name: str, words: str) -> str:
        asked = {"messages": [{"role": "user", "content": f"How many apples are left? {words}"}], "max_tokens": 24}
        return client.chat.completions.create(model=name, temperature=0, **asked).choices[0].message.content

    asked = [(name, words) for name in names for words in ("", "Name them! " * 3)]
    alone = [ask(*one) for one in asked]
    assert len(set(alone)) == len(asked)
    mixes = []
    original = engine.forward

    def forward(adapters, *rest):
        mixes.append(set(adapters))
        return original(adapters, *rest)

    monkeypatch.setattr(engine, "forward", forward)
    with running_server(engine) as (url, _), ThreadPoolExecutor(len(asked)) as pool:
        client = client_of(url)
        assert list(pool.map(lambda one: ask(*one), asked)) == alone
    assert max(map(len, mixes)) >= 4  # LoRA, DoRA and the base among them


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "there are lora, other, dora, banded, few, tiny"),
        ({"n": 2}, openai.BadRequestError, "n is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format is not"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs is not"),
        ({"max_tokens": 65}, openai.BadRequestError, "this server's most is 64"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": ""}]}, openai.BadRequestError, "'content' is empty"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, openai.BadRequestError, "longer than 256"),
        (
            {"messages": [{"role": "user", "content": "a" * 70_000}]},
            openai.APIStatusError,
            "more than 65536 bytes",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(client, change, error, words):
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**{"model": "lora", "messages": CHAT, **change})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    if words.startswith("more"):
        assert caught.value.status_code == 413
    if words.startswith("longer"):
        assert caught.value.code == "context_length_exceeded"


def test_prompts_that_cannot_be_are_refused(client):
    prompts = {"1 to 64 prompts": [], "tokens are not all": [999_999], "prompt is empty": "", "not all": [[]]}
    for words, prompt in (*prompts.items(), ("1 to 64 prompts", ["a"] * 65)):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(model="lora", prompt=prompt)


def post(url: str, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """A request as no client sends it."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


HOSTILE = {
    "tokens": ("prompt", b"[" + b"1," * 2_097_000 + b"1]"),
    "lists": ("prompt", b"[" + b"[1]," * 1_048_000 + b"[1]]"),
    "mixed": ("prompt", b"[" + b'1,"a",[],' * 460_000 + b"1]"),
    "one of each": ("prompt", b'["a"' + b",1" * 2_090_000 + b"]"),
    "objects": ("prompt", b"[" + b"{}," * 1_390_000 + b"{}]"),
    "stops": ("stop", b"[" + b"1," * 2_097_000 + b"1]"),
    "messages": ("messages", b"[" + b"{}," * 1_390_000 + b"{}]"),
    "small messages": ("messages", b"[" + b'{"role":"user","content":"a"},' * 139_000 + b"{}]"),
    "parts": ("messages", b'[{"role":"user","content":[' + b"{}," * 1_390_000 + b"{}]}]"),
    "depth": ("messages", b"[" * 2_090_000 + b"]" * 2_090_000),
    "some depth": ("messages", b"[" + b",".join([b"[" * 900 + b"]" * 900] * 2_300) + b"]"),
    "long text": ("messages", b'[{"role":"wizard","content":"' + b"[" * 4_190_000 + b'"}]'),
    "short texts": ("prompt", b"[" + b'"[",' * 1_040_000 + b'"a"]'),
    "open text": ("messages", b'"' + b'\\"[' * 1_390_000),
    "fields": ("x", b"0," + b",".join(b'"%d":[]' % i for i in range(350_000))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_large_body_is_refused_soon_and_holds_nobody_up(engine, name):
    """Measured below half a second each; pydantic needed 20 s for one of them, and everybody waited."""
    field, written = HOSTILE[name]
    path = "/v1/completions" if field == "prompt" else "/v1/chat/completions"
    body = b'{"model":"lora",%s"%s":%s}' % (
        b'"messages":[0],' if field == "stop" else b"",
        field.encode(),
        written,
    )
    assert 2**21 < len(body) <= 2**22
    with running_server(engine, body_bytes=2**22) as (url, _), ThreadPoolExecutor(1) as pool:
        health = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        began, slowest = time.monotonic(), 0.0
        asked = pool.submit(post, url, path, body)
        while not asked.done():
            asked_at = time.monotonic()
            health.request("GET", "/health")
            assert health.getresponse().read()
            slowest = max(slowest, time.monotonic() - asked_at)
        health.close()
        assert asked.result()[0] == 400
        print(f"{name}: {time.monotonic() - began:.2f} s, /health at most {slowest:.2f} s")
        assert time.monotonic() - began < 2.0 and slowest < 1.0


def test_a_temperature_near_zero_is_greedy(client):
    asked = {"model": "lora", "prompt": "The river", "max_tokens": 8}
    least = [client.completions.create(temperature=value, **asked).choices[0].text for value in (0, 1e-39, 1e-6)]
    assert len(set(least)) == 1


def test_a_server_that_can_answer_no_more_says_so(engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "forward", fail)
    with running_server(engine) as (url, batcher):
        client = client_of(url)
        monkeypatch.setattr(engine, "new_batch", fail)
        with pytest.raises(openai.InternalServerError, match="inside the server"):
            client.completions.create(model="lora", prompt="a")
        wait_until(lambda: batcher.state == "failed")
        with pytest.raises(openai.InternalServerError, match="must be restarted") as caught:
            client.completions.create(model="lora", prompt="a")
        assert caught.value.status_code == 503
        health = http.client.HTTPConnection(url.removeprefix("http://"))
        health.request("GET", "/health")
        answer = health.getresponse()
        assert answer.status == 503 and json.loads(answer.read())["status"] == "failed"
        health.close()


def test_requests_of_other_programs_are_refused(served):
    url, _ = served
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    for status, path, headers in (
        (200, "/v1/completions", {}),
        (200, "/v1/completions", {"Host": "localhost"}),
        (415, "/v1/completions", {"Content-Type": "text/plain"}),  # what a web page can send anywhere
        (403, "/v1/completions", {"Host": "evil.example"}),  # and what it is when its name leads here
        (404, "/v1/embeddings", {}),
        (405, "/v1/models", {}),
    ):
        found, answer = post(url, path, body, **headers)
        assert found == status and ("error" in answer) == (status != 200), answer
    assert post(url, "/v1/completions", b"{")[0] == 400


# ---- limits


def slow_down(monkeypatch, engine, seconds: float) -> None:
    original = type(engine).forward

    def forward(self, *inputs):
        time.sleep(seconds)
        return original(self, *inputs)

    monkeypatch.setattr(type(engine), "forward", forward)


def test_a_key_is_asked_for(engine):
    with running_server(engine, api_key="sesame-open") as (url, _):
        for key in ("wrong", "sesame-opem", "sesame-ope", "sesame-openn"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client_of(url, key).models.list()
        assert len(list(client_of(url, "sesame-open").models.list())) == 6
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/health", headers={"Host": "proxy.example"})  # with a key, by any name
        assert connection.getresponse().status == 200
        connection.request("GET", "/v1/models")


def test_a_full_queue_answers_429_and_loses_nobody(engine, monkeypatch):
    slow_down(monkeypatch, engine, 0.02)
    with running_server(engine, max_batch=1, max_queue=2) as (url, _):
        client = client_of(url)

        def ask(_: int) -> str:
            try:
                client.completions.create(model="lora", prompt="a", max_tokens=20)
                return "answered"
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1" and "waiting" in str(error)
                return "refused"

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(ask, range(8)))
        assert set(results) == {"answered", "refused"} and results.count("answered") >= 3


def test_a_request_has_a_time_limit_and_its_row_is_given_up(engine, monkeypatch):
    slow_down(monkeypatch, engine, 0.1)
    with running_server(engine, timeout_seconds=1.0) as (url, batcher):
        client = client_of(url)
        with pytest.raises(openai.APIStatusError, match="took too long") as caught:
            client.completions.create(model="lora", prompt="a", max_tokens=60, temperature=0)
        assert caught.value.status_code == 504 and caught.value.response.headers["x-should-retry"] == "false"
        pieces = []
        with pytest.raises(openai.APIError, match="took too long"):
            for chunk in client.completions.create(model="lora", prompt="a", max_tokens=60, stream=True):
                pieces.append(chunk)
        assert pieces
        wait_until(lambda: batcher.counts == (0, 0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(engine, monkeypatch, stream):
    slow_down(monkeypatch, engine, 0.05)
    with running_server(engine) as (url, batcher):
        host, _, port = url.removeprefix("http://").partition(":")
        asked = {"model": "lora", "prompt": "a", "max_tokens": 60, "stream": stream, "temperature": 0}
        body = json.dumps(asked).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            if stream:
                assert b"200 OK" in connection.recv(4096)
            wait_until(lambda: batcher.counts == (0, 1))
        began = time.monotonic()
        wait_until(lambda: batcher.counts == (0, 0))
        assert time.monotonic() - began < 2.0  # 60 tokens would take three seconds


def test_a_fault_in_a_batch_is_an_error_500_and_the_server_lives_on(engine, monkeypatch):
    original, broken = type(engine).forward, threading.Event()

    def forward(self, *inputs):
        if broken.is_set():
            raise RuntimeError("a secret of the inside")
        return original(self, *inputs)

    monkeypatch.setattr(type(engine), "forward", forward)
    with running_server(engine) as (url, _):
        client = client_of(url)
        broken.set()
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="inside the server") as caught:
                client.completions.create(model="lora", prompt="a", stream=stream)
            assert "secret" not in str(caught.value)
        broken.clear()
        with monkeypatch.context() as patch, pytest.raises(openai.InternalServerError, match="inside the server"):
            patch.setattr(Prompter, "text", lambda self, prompt: 1 / 0)
            client.completions.create(model="lora", prompt="a")
        assert client.completions.create(model="lora", prompt="a").choices[0].text
