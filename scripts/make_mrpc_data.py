#!/usr/bin/env python
"""Writes MRPC as instruction rows: two sentences, and whether they mean the same. make_mrpc_data.py SOURCE TARGET

SOURCE holds train.jsonl and test.jsonl of the Microsoft Research Paraphrase Corpus with sentence1, sentence2 and
label (1: a paraphrase), one object a line; it is for research use and not part of this project. TARGET gets
mrpc_train.jsonl and mrpc_test.jsonl in the form of alpaca, with "yes" and "no" as answers: --labels yes,no.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

INSTRUCTION = "Do these two sentences mean the same? Answer yes or no."
WORDS = {1: "yes", 0: "no"}
SEED = 0  # of the order


def converted(line: str) -> dict[str, str]:
    """One row."""
    row = json.loads(line)
    sentences = f"1. {row['sentence1'].strip()}\n2. {row['sentence2'].strip()}"
    return {"instruction": INSTRUCTION, "input": sentences, "output": WORDS[int(row["label"])]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes MRPC as instruction rows.")
    parser.add_argument("source", type=Path, help="the folder with train.jsonl and test.jsonl")
    parser.add_argument("target", type=Path, help="the folder to write mrpc_train.jsonl and mrpc_test.jsonl into")
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = (options.source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [converted(line) for line in lines if line.strip()]
        random.Random(SEED).shuffle(rows)  # so that the first ones are a sample
        file = options.target / f"mrpc_{split}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        share = sum(row["output"] == "yes" for row in rows) / len(rows)
        print(f"{file}: {len(rows)} rows, {share:.1%} yes")


if __name__ == "__main__":
    main()
