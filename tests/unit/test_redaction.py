"""What is taken for a secret or the home directory, in which forms, and what is left alone."""

from __future__ import annotations

import io
import json
import sys

import pytest

from qhybrid.redaction import redacted, redacted_output, redacted_traceback, redacted_values


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("SERVICE_TOKEN", "abc/def+ghi")
    monkeypatch.setenv("SHORT_KEY", "short")
    monkeypatch.setenv("TOKENS_SEEN", "not-a-secret")
    (tmp_path / "token").write_text("saved-by-login\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc/def+ghi", "***"),
        ("x=abc/def+ghi;", "x=***;"),
        ("abc/def%2Bghi", "***"),  # as a URL has it
        ("saved-by-login", "***"),
        ("short not-a-secret", "short not-a-secret"),
        ("hf_0123456789012345678901234567890123", "***"),
        ("hf_transfer and hf_hub", "hf_transfer and hf_hub"),
        ("https://user:pass@host/x", "https://***@host/x"),
        ("https://key@host", "https://***@host"),
        ("https:/user:pass@host/x", "https:/***@host/x"),  # what pathlib makes of it
        ("postgresql+psycopg2://u:p@ss@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("https://u:pa/ss@host", "https://***@host"),
        ("https://host:8080/org/name@main", "https://host:8080/org/name@main"),
        ("https://host/a@b http://x:y@z", "https://host/a@b http://***@z"),
        ("ann@example.org", "ann@example.org"),
        ("org/model@v1", "org/model@v1"),
        ("/home/ann", "~"),
        ("/home/ann/data.jsonl", "~/data.jsonl"),
        ("see /home/ann.", "see ~."),
        ("'/home/ann', file:///home/ann/x", "'~', file://~/x"),
        ("\x1b[1m/home/ann/x", "\x1b[1m~/x"),
        (
            "/home/anna /home/ann-2 /home/ann.bak /mnt/home/ann",
            "/home/anna /home/ann-2 /home/ann.bak /mnt/home/ann",
        ),
        ("/home/ann:/home/ann/b", "~:~/b"),
    ],
)
def test_text(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected  # a second time changes nothing
    assert json.loads(redacted(json.dumps(text))) == expected


def test_text_that_was_escaped(monkeypatch):
    monkeypatch.setenv("A_PASSWORD", 'wörd "quoted" \\ and\nmore')
    monkeypatch.setenv("HOME", "/home/josé o'hara")
    text = "\n/home/josé o'hara/x\n" + 'wörd "quoted" \\ and\nmore'
    for written in (json.dumps(text), json.dumps(text, ensure_ascii=False), repr(text)):
        found = redacted(written)
        assert "jos" not in found and "quoted" not in found and "~/x" in found, found


@pytest.mark.parametrize("home", ["/", "", "relative"])
def test_a_home_that_is_no_folder_of_its_own_changes_nothing(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert redacted("/data/x and relative/y") == "/data/x and relative/y"


def test_the_home_behind_a_link(monkeypatch, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert redacted(f"{tmp_path}/disk/x {tmp_path}/home/x") == "~/x ~/x"


def test_the_password_of_a_proxy_is_a_secret_by_itself(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s%40cret-pass@proxy:8080")
    assert redacted("s@cret-pass refused, s%40cret-pass") == "*** refused, ***"


def test_values():
    before = {"abc/def+ghi": [1, None, ("/home/ann", 2.5)], "b": True}
    assert redacted_values(before) == {"***": [1, None, ["~", 2.5]], "b": True}
    assert before["b"] is True and "abc/def+ghi" in before


def test_output_and_what_is_left_of_a_stream(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with redacted_output():
        print("abc/def+ghi", "at", "/home/ann")
        sys.stderr.writelines(["/home/ann\n", "x"])
        assert not sys.stdout.isatty() and not hasattr(sys.stdout, "buffer")
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")
    assert (out.getvalue(), err.getvalue()) == ("*** at ~\n", "~\nx")
    assert sys.stdout is out and sys.stderr is err


def test_a_traceback_has_no_values_and_no_secrets():
    try:
        local = "abc/def+ghi"
        raise RuntimeError(f"token {local} in /home/ann") from ValueError("abc/def+ghi")
    except RuntimeError as error:
        text = redacted_traceback(error)
    assert "RuntimeError: token *** in ~" in text and "ValueError: ***" in text and "abc" not in text
