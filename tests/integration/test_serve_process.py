"""`qhybrid serve` as a process: a load, SIGTERM, and what it says when it cannot start."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_helpers import client_of, load_test, wait_until

from qhybrid.cli.main import main


def test_the_command_serves_a_load_and_finishes_what_was_begun(tmp_path, tiny_model_folder):
    """scripts/load_test.py on the tiny model; then SIGTERM, while one request is answered and two wait."""
    folders = load_test.make_adapters(str(tiny_model_folder), tmp_path, 4, scale=0.3)
    names = [folder.name for folder in folders]
    load = load_test.Load(requests=60, clients=8, max_tokens=16)
    prompts = ("How many apples?", "Name the largest planet. " * 4, "The river runs")
    with load_test.server(*map(str, folders), "--max-batch", "6") as (url, process):
        result = load_test.run_load(url, process, names, load, prompts)
        assert not result.lost and not result.wrong
        assert result.num_distinct == 4
        # 10 more requests; the caches and logits of those alone are larger
        assert result.resident_bytes[60] - result.resident_bytes[50] < 2**23

        client = client_of(url.removesuffix("/v1"))
        with ThreadPoolExecutor(12) as pool:
            asked = [
                pool.submit(client.completions.create, model=name, prompt="a", max_tokens=200, temperature=0)
                for name in names * 3
            ]
            health = http.client.HTTPConnection(url.removesuffix("/v1").removeprefix("http://"))

            def state() -> dict:
                health.request("GET", "/health")
                return json.loads(health.getresponse().read())

            wait_until(lambda: state()["waiting"] == 6)
            process.terminate()
            lengths = [one.result().usage.completion_tokens for one in asked]
        assert all(0 < length <= 200 for length in lengths)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to serve"),
        (["a b=x"], "cannot be the name of an adapter"),
        (["nowhere"], "there is no folder"),
        (["x", "--port", "TAKEN"], "Address already in use"),
        (["x", "--host", "192.0.2.1"], "cannot serve on 192.0.2.1 port 8000"),
        (["x", "--host", "nowhere.invalid"], "cannot serve on nowhere.invalid"),
        (["x", "KEY="], "QHYBRID_API_KEY is empty"),
        (["x", "KEY= \n"], "QHYBRID_API_KEY is empty"),
        (["x", "KEY=a\nb"], "QHYBRID_API_KEY is not one line of ASCII"),
        (["x", "--base", ""], "there is no folder x"),
        (["--base", "nowhere/at/all"], "there is no nowhere/at/all"),
    ],
)
def test_what_cannot_be_served_is_one_message(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if arguments and arguments[-1].startswith("KEY="):
            monkeypatch.setenv("QHYBRID_API_KEY", arguments[-1].removeprefix("KEY="))
            arguments = arguments[:-1]
        arguments = [argument.replace("TAKEN", str(taken.getsockname()[1])) for argument in arguments]
        if "--port" not in arguments and "--host" not in arguments:
            arguments = [*arguments, "--port", "0"]
        with pytest.raises(SystemExit) as caught:
            main(["serve", *arguments])
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert words in said.err and "error: " in said.err and "hint: " in said.err


def test_the_key_is_taken_without_the_blanks_around_it(monkeypatch, tiny_model_folder):
    """No header can end with a line's end, which a key that was read from a file has."""
    keys = []

    def serve(app, bound, timeout_seconds, ready):
        keys.append(app._key)

    monkeypatch.setattr("qhybrid.serving.server.serve", serve)
    monkeypatch.setenv("QHYBRID_API_KEY", " secret\n")
    main(["serve", "--base", str(tiny_model_folder), "--port", "0"])
    assert keys == [b"secret"]


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(SystemExit):
        main(["serve", "--base", "x"])
    assert "serving needs starlette\nhint: pip install 'qhybrid[serve]'" in capsys.readouterr().err
