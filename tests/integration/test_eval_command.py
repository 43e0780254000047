"""`qhybrid eval --labels` and --answer-after on a tiny model, against forward passes of its own."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import run_cli, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def rows(tmp_path):
    questions = [("Is a cat a dog?", "no"), ("Is a cat a cat?", "yes"), ("Is the sea on the mat?", "no"),
                 ("Are three apples left?", "yes"), ("Is it so? Say it in many words or few!", "no")]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    write_rows(file, [{"instruction": question, "output": answer} for question, answer in questions])
    return file


def test_labels_are_compared_at_the_first_token_of_the_answer(rows, tiny_model_folder):
    arguments = ["eval", rows, "--model", tiny_model_folder, "--dtype", "float32", "--quantization", "none"]
    done = run_cli(*arguments, "--labels", "yes,no", "--batch-size", 2, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    words = [tokenizer(word)["input_ids"][0] for word in ("yes", "no")]
    confusion = [[0, 0], [0, 0]]
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["instruction"]}], add_generation_prompt=True, tokenize=False
        )
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        confusion[("yes", "no").index(row["output"])][int(logits[words].argmax())] += 1
    assert figures["confusion"] == confusion
    assert figures["accuracy"] == pytest.approx((confusion[0][0] + confusion[1][1]) / 5)
    assert figures["exact_match"] is None and figures["rows"] == 5 and figures["loss"] > 0

    shown = run_cli(*arguments, "--labels", "yes,no").stdout
    assert f"accuracy      {figures['accuracy']:.1%}" in shown and "label  rows  right" in shown
    assert f"F1            {figures['f1']:.4f} of 'yes'" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "yes"], "does not name two or more labels"),
        (["--labels", "yes,,no"], "does not name two or more labels"),
        (["--labels", "yes,no", "--predictions", "p.jsonl"], "--labels generates none"),
        (["--labels", "yes,no", "--answer-after", "#"], "--answer-after has no effect"),
        (["--labels", "yes,maybe"], "the answer 'no' is not one of the labels yes, maybe"),
        (["--no-generation", "--answer-after", "#"], "--answer-after has no effect"),
        (["--answer-after", "####"], "questions.jsonl:1: the answer has no '####'"),
    ],
)
def test_refusals(rows, tiny_model_folder, options, words):
    done = run_cli("eval", rows, "--model", tiny_model_folder, "--dtype", "float32", *options)
    assert done.returncode == 2 and words in done.stderr
