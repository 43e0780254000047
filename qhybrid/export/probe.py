"""The short built-in probe: conversations of many kinds, for proofs where the user gives no data."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qhybrid.adapters.info import AdapterInfo
from qhybrid.data.prepare import prepare_file
from qhybrid.data.tokenize import EncodedRow
from qhybrid.errors import DataError
from qhybrid.recipe.schema import SourceSection

_TURNS = (
    ("Name three colours of the rainbow.", "Red, green and violet are three colours of the rainbow."),
    ("What is 17 plus 26?", "17 plus 26 is 43."),
    ("Why is the sky blue?", "Air scatters short waves of light more, so blue comes from everywhere."),
    ("Translate to German: The book lies on the table.", "Das Buch liegt auf dem Tisch."),
    ("Write a function in Python that doubles a number.", "def double(x):\n    return 2 * x"),
    ("Give the opposite of each word: hot, early, narrow.", "cold, late, wide"),
    ("Is 91 a prime number?", "No: 91 is 7 times 13."),
    ("Order these by size: a house, a cat, a mountain.", "A cat, a house, a mountain."),
    ("Which gas do plants take from the air?", "Plants take carbon dioxide from the air."),
    ("Make one sentence of these words: rain, umbrella, forgot.", "I forgot my umbrella, and then the rain came."),
    ('Return JSON with the name and the age of Anna, who is 31.', '{"name": "Anna", "age": 31}'),
    ("How do I boil an egg?", "Put the egg into boiling water for eight minutes, then into cold water."),
    ("What comes after Wednesday?", "Thursday comes after Wednesday."),
    ("Correct the sentence: She go to school every days.", "She goes to school every day."),
    ("How many minutes are two and a half hours?", "Two and a half hours are 150 minutes."),
    ("Describe a lighthouse in one sentence.", "A lighthouse is a tower whose lamp guides ships at night."),
    ("Tell me a short joke.", "Why did the bicycle fall over? It was two-tired."),
    ("What is the capital of Norway?", "The capital of Norway is Oslo."),
    ("Sort the numbers 9, 2, 14, 5.", "2, 5, 9, 14"),
    ("Summarise: The meeting began late, and nothing was decided.", "The late meeting decided nothing."),
)  # fmt: skip


def probe_rows(tokenizer: PreTrainedTokenizerBase, info: AdapterInfo) -> list[EncodedRow]:
    """The probe as rows for evaluation, in the adapter's chat template; as plain text where there is none."""
    return rows_of_probe(tokenizer, info, as_messages=bool(tokenizer.chat_template))


def rows_of_probe(tokenizer: PreTrainedTokenizerBase, info: AdapterInfo, *, as_messages: bool) -> list[EncodedRow]:
    """The probe in one of its two forms."""
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        if as_messages
        else {"prompt": asked + "\n", "completion": answered}
        for asked, answered in _TURNS
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            encoded, _ = prepare_file(
                SourceSection.model_validate({"path": str(file)}),
                tokenizer,
                chat_template=None,
                base_folder=Path(),
                system_prompt=info.system_prompt,
                date=info.date,
            )
        except DataError:
            if not as_messages:
                raise
            return rows_of_probe(tokenizer, info, as_messages=False)  # a template that takes no such turns
    return encoded
