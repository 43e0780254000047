"""The short built-in probe: conversations of many kinds, for proofs where the user gives no data."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qhybrid.adapters.info import AdapterInfo
from qhybrid.data.audit import SourceAudit
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


PROBE = "built-in probe"


@dataclass(frozen=True)
class MeasuredRows:
    """Rows to measure a loss on, what they are called, and how many of the file cannot be used."""

    name: str
    rows: list[EncodedRow]
    dropped: int = 0


def measured_rows(
    source: SourceSection | None, tokenizer: PreTrainedTokenizerBase, info: AdapterInfo
) -> MeasuredRows:
    """The rows of `source`, or the probe, as training would have tokenised them.

    Raises:
        DataError: the file cannot be read, or none of its rows can be used.
    """
    if source is None:
        return MeasuredRows(PROBE, probe_rows(tokenizer, info))
    rows, audit = _encoded(source, tokenizer, info)
    return MeasuredRows(Path(source.path).name, rows, audit.dropped)


def probe_rows(tokenizer: PreTrainedTokenizerBase, info: AdapterInfo) -> list[EncodedRow]:
    """The probe in the adapter's chat template; as plain text where there is none, or it takes no such turns."""
    if tokenizer.chat_template:
        conversations = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
            for asked, answered in _TURNS
        ]
        with contextlib.suppress(DataError):
            return _from_values(conversations, tokenizer, info)
    return _from_values(
        [{"prompt": f"{asked}\n", "completion": answered} for asked, answered in _TURNS], tokenizer, info
    )


def _from_values(
    values: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, info: AdapterInfo
) -> list[EncodedRow]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
        return _encoded(SourceSection.model_validate({"path": str(file)}), tokenizer, info)[0]


def _encoded(
    source: SourceSection, tokenizer: PreTrainedTokenizerBase, info: AdapterInfo
) -> tuple[list[EncodedRow], SourceAudit]:
    return prepare_file(
        source,
        tokenizer,
        chat_template=None,
        base_folder=Path(),
        system_prompt=info.system_prompt,
        date=info.date,
    )
