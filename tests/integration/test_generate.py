"""`qhybrid generate`: one answer, several adapters, files of prompts and conversations."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from helpers import write_rows
from serving_helpers import load_test

from qhybrid.cli.main import main
from qhybrid.evaluation.models import load_adapter_for_inference


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model_folder):
    """Two adapters, the second DoRA."""
    return load_test.make_adapters(str(tiny_model_folder), tmp_path_factory.mktemp("adapters"), 2, scale=0.3)


@pytest.fixture(scope="module")
def expected(folders):
    """What transformers' generate answers: by adapter's name and prompt, 12 tokens at most."""
    found = {}
    for folder in folders:
        model, tokenizer, _ = load_adapter_for_inference(folder)
        for prompt in ("How many apples?", "Name the planet"):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
                return_dict=True,
            )  # fmt: skip
            with torch.no_grad():
                out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
            found[folder.name, prompt] = tokenizer.decode(out, skip_special_tokens=True)
    assert len(set(found.values())) == 4
    return found


def generate(capsys, *arguments, code: int = 0) -> tuple[str, str]:
    if code:
        with pytest.raises(SystemExit) as caught:
            main(["generate", *map(str, arguments)])
        assert caught.value.code == code
    else:
        main(["generate", "--max-new-tokens", "12", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


def test_a_prompt_is_answered_by_the_adapter(capsys, folders, expected, monkeypatch):
    out, err = generate(capsys, "How many apples?", "--adapter", folders[0])
    assert out == expected["adapter-0", "How many apples?"] + "\n"
    assert err in ("", "note: the answer was cut off (--max-new-tokens)\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many apples?"))
    assert generate(capsys, "-", "--adapter", folders[0])[0] == out


def test_several_adapters_answer_under_their_names(capsys, folders, expected):
    out, _ = generate(capsys, "Name the planet", "--adapter", f"first={folders[0]}", "--adapter", folders[1])
    assert out == "[first]\n{}\n[adapter-1]\n{}\n".format(
        *(expected[f"adapter-{i}", "Name the planet"] for i in range(2))
    )


def test_a_file_is_answered_line_by_line_in_its_order(capsys, folders, expected, tmp_path):
    asked = [
        {"prompt": "Name the planet", "adapter": "adapter-1", "ignored": 1},
        {"prompt": "How many apples?"},
        {"messages": [{"role": "user", "content": "Name the planet"}]},
        {"prompt": "How many apples?", "adapter": "tiny"},
        {"prompt": "How many apples?", "adapter": "adapter-1"},
    ]
    file = write_rows(tmp_path / "prompts.jsonl", asked)
    out, _ = generate(capsys, "--file", file, *(f"--adapter={folder}" for folder in folders), "--batch-size", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    one, other = "How many apples?", "Name the planet"
    wanted = [("adapter-1", other), ("adapter-0", one), ("adapter-0", other), None, ("adapter-1", one)]
    for line, key in zip(lines, wanted, strict=True):
        assert key is None or line["generated"] == expected[key]
    assert lines[0]["adapter"] == "adapter-1" and lines[2]["messages"] == asked[2]["messages"]
    assert all(line["tokens"] <= 12 and line["finish_reason"] in ("stop", "length") for line in lines)


def test_raw_text_systems_stops_and_draws(capsys, folders, tiny_model_folder):
    base = ["--base", tiny_model_folder, "--quantization", "none", "--dtype", "float32"]
    raw, _ = generate(capsys, "The river", "--raw", *base)
    assert raw != generate(capsys, "The river", *base)[0]
    assert (
        generate(capsys, "The river", "--system", "Be brief.", *base)[0] != generate(capsys, "The river", *base)[0]
    )
    stop = raw[4:7]
    assert generate(capsys, "The river", "--raw", "--stop", stop, *base)[0] == raw.partition(stop)[0] + "\n"
    drawn = [
        generate(capsys, "a", "--temperature", 1, "--top-p", 0.9, "--seed", seed, *base)[0] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "cut off" in generate(capsys, "a", "--max-new-tokens", 1, *base)[1]
    assert generate(capsys, "a", "--temperature", "1e-39", *base)[0] == generate(capsys, "a", *base)[0]


def test_a_conversation_remembers(capsys, folders, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many apples?\n\nAnd rivers?\n"))
    out, err = generate(capsys, "--chat", "--adapter", folders[0])
    assert err.count("> ") == 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("And rivers?\n"))
    alone, _ = generate(capsys, "--chat", "--adapter", folders[0])
    assert out.endswith("\n") and not out.endswith(alone)


def test_a_turn_without_an_answer_does_not_end_a_conversation(capsys, folders, monkeypatch):
    def answered(said: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode("latin-1")), encoding="utf-8"))
        return generate(capsys, "--chat", "--adapter", folders[0])

    plain, _ = answered("How many apples?\nAnd rivers?\n")
    out, err = answered(f"How many apples?\n{'a ' * 400}\nAnd rivers?\n")
    assert out == plain and err.count("longer than 256 tokens") == 1  # the turn is not remembered either
    assert answered("\xff?\n")[0].strip()  # half a character


def test_a_file_has_blank_lines_and_ends_of_lines_within_texts(capsys, tmp_path, tiny_model_folder):
    asked = ["one\u2028two\x85three", "four"]
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in asked]
    (tmp_path / "prompts").write_bytes("\n{}\r\n  \n{}\n\n".format(*rows).encode())
    out, _ = generate(capsys, "--file", tmp_path / "prompts", "--base", tiny_model_folder)
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a PROMPT"),
        (["a", "--chat"], "only one of them"),
        (["a"], "nothing to answer with"),
        (["a", "--raw", "--system", "b", "--base", "x"], "--raw has no conversation"),
        (["a", "--seed", "1", "--base", "x"], "no effect without --temperature"),
        (["--chat", "--adapter", "a", "--adapter", "b"], "with one adapter"),
        (["a", "--adapter", "nowhere"], "there is no folder nowhere"),
        (["--file", "nowhere", "--base", "x"], "nowhere: cannot be read"),
        (["--file", "empty", "--base", "x"], "it holds no prompts"),
        (["--file", "both", "--base", "x"], 'both:2: it must have a "prompt"'),
        (["--file", "broken", "--base", "x"], "broken:1: invalid JSON"),
        (["--file", "other", "--base", "TINY"], "other:1: there is no adapter 'b'; there are tiny"),
        (["--file", "mad", "--base", "TINY"], "mad:1: messages cannot be used: unknown role"),
        (["--file", "list", "--base", "x"], 'list:3: "adapter" must be the name of one'),
        (["--file", "nothing", "--base", "x"], "nothing:1: there are no messages"),
        (["--file", "half", "--base", "x"], "half:1: it has half of a surrogate pair"),
        (["-", "--base", "x"], "standard input is not text"),
        (["a " * 400, "--base", "TINY"], "longer than 256 tokens"),
    ],
)
def test_what_cannot_be_answered_is_one_message(
    capsys, tmp_path, monkeypatch, tiny_model_folder, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "both").write_text('{"prompt": "a"}\n{"prompt": "a", "messages": []}\n')
    (tmp_path / "broken").write_text("{prompt")
    (tmp_path / "other").write_text('{"prompt": "a", "adapter": "b"}')
    (tmp_path / "mad").write_text('{"messages": [{"role": "wizard", "content": "a"}]}')
    (tmp_path / "list").write_text('{"prompt": "a"}\n\n{"prompt": "a", "adapter": ["a"]}')
    (tmp_path / "nothing").write_text('{"messages": []}')
    (tmp_path / "half").write_text('{"prompt": "a\\ud800"}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    tiny = [str(tiny_model_folder) if argument == "TINY" else argument for argument in arguments]
    out, err = generate(capsys, *tiny, code=2)
    assert out == "" and words in err and err.count("error: ") == 1


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(capsys, seed):
    _, err = generate(capsys, "a", "--base", "x", "--temperature", 1, "--seed", seed, code=2)
    assert "--seed" in err and "range" in err
