"""Data files with faults: each faulty row is told by its number, and nothing is lost of the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from bad_rows import (
    CASES,
    EACH,
    EACH_REPAIR,
    MAX_TOKENS,
    NUM_ROWS,
    Turns,
    good_messages,
    write_bad_file,
    write_jsonl,
)
from helpers import build_tokenizer, record_figure
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from qhybrid.cli.main import main
from qhybrid.data.prepare import PreparedData, prepare_data
from qhybrid.data.tokenize import has_trained_token
from qhybrid.errors import DataError
from qhybrid.recipe.schema import Recipe
from qhybrid.training.trainer import BandedTrainer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def prepared_from(
    path: Path, tokenizer: PreTrainedTokenizerFast, *, max_dropped_fraction: float = 0.2, **training: Any
) -> PreparedData:
    recipe = Recipe(
        model={"path": "tiny"},
        adapters=[{}],
        data={"sources": str(path), "max_dropped_fraction": max_dropped_fraction},
        training={"max_length": MAX_TOKENS, **training},
        output_dir="run",
    )  # pyright: ignore[reportArgumentType]
    return prepare_data(recipe, tokenizer, base_folder=path.parent)


def whole_text(conversation: Turns) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in conversation)


def trained_text(conversation: Turns) -> str:
    return "".join(f"{content}<|im_end|>\n" for role, content in conversation if role == "assistant")


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    return tokenizer.decode([token for token in ids if token != -100])


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_faulty_rows_are_reported_and_every_kept_turn_is_kept(name, tmp_path, tokenizer):
    file = write_bad_file(tmp_path, name)
    prepared = prepared_from(file.path, tokenizer)
    audit = prepared.audit.train[0]

    assert audit.dropped_rows == file.dropped
    assert sum(map(len, audit.dropped_rows.values())) == audit.dropped == 10 * EACH == 170
    assert audit.repaired_rows == file.repaired
    assert audit.repaired == sum(map(len, file.repaired.values())) >= 2 * EACH_REPAIR
    assert audit.rows_in == audit.untouched + audit.repaired + audit.dropped == NUM_ROWS
    told = prepared.audit.to_dict()["sources"][0]["dropped_by_reason"]
    assert {reason: entry["rows"] for reason, entry in told.items()} == file.dropped

    assert len(prepared.train) == len(file.kept) == 830
    for row, conversation in zip(prepared.train, file.kept, strict=True):
        assert decoded(tokenizer, row["input_ids"]) == whole_text(conversation)
        assert decoded(tokenizer, row["labels"]) == trained_text(conversation)
        assert has_trained_token(row["labels"])
    figure = f"{audit.dropped}/170 faulty rows told by number, {len(prepared.train)}/830 others kept whole"
    record_figure(13, f"1,000 rows, {name}", figure)


@pytest.mark.parametrize(("name", "limit"), [("messages in JSONL", 40), ("alpaca in CSV", 30)])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split", "wrapped"])
def test_no_row_is_trained_without_labels(name, limit, mode, packing, tmp_path, tokenizer):
    """With a limit that cuts many rows, so that prompts alone are left of some, and takes several short ones."""
    settings: dict[str, Any] = {"max_length": limit, "truncation_mode": mode}
    if packing:
        settings |= {"packing": True, "packing_strategy": packing}
    file = write_bad_file(tmp_path, name)
    prepared = prepared_from(file.path, tokenizer, max_dropped_fraction=1.0, **settings)
    audit = prepared.audit.train[0]
    assert audit.rows_in == audit.untouched + audit.repaired + audit.dropped == NUM_ROWS
    cut_off = sum(len(rows) for reason, rows in audit.dropped_rows.items() if "left after truncation" in reason)
    assert audit.truncated_rows + cut_off > 400
    assert all(has_trained_token(row["labels"]) for row in prepared.train)

    # The last step before the batches, as training takes it
    trainer = object.__new__(BandedTrainer)
    arguments = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, **settings)
    rows = trainer._prepare_dataset(prepared.train, tokenizer, arguments, bool(packing), None, "train")
    assert 0 < len(rows) <= len(prepared.train) and (len(rows) < len(prepared.train)) == bool(packing)
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"]) <= limit
        assert has_trained_token(row["labels"])
        start = 0
        for length in row.get("seq_lengths", ()):  # the rows of a pack that attend to themselves alone
            assert has_trained_token(row["labels"][start : start + length])
            start += length
    trained = sum(label != -100 for row in rows for label in row["labels"])
    # trl's wrapping cuts through rows. A pack that is left with one label, on its first token, has no loss.
    packs_left_out = -(-audit.tokens // limit) - len(rows) if packing == "wrapped" else 0
    assert 0 <= audit.trained_tokens - trained <= packs_left_out


def test_five_percent_is_the_limit(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows: list[Any] = [good_messages(number)[0] for number in range(NUM_ROWS)]
    for place in range(50):
        rows[20 * place + 3] = b"{broken"
    numbers = write_jsonl(path, rows)
    limit = Recipe.model_fields["data"].annotation.model_fields["max_dropped_fraction"].default
    assert limit == 0.05
    assert prepared_from(path, tokenizer, max_dropped_fraction=limit).audit.train[0].dropped == 50

    rows[500] = b"{broken"
    write_jsonl(path, rows)
    with pytest.raises(DataError) as caught:
        prepared_from(path, tokenizer, max_dropped_fraction=limit)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith(f"{path}: 51 of 1,000 rows (5.1%) cannot be used; the limit is 5.0%")
    first = ", ".join(str(numbers[20 * place + 3]) for place in range(10))
    assert f"invalid JSON: line {first} and 41 more" in message
    assert "data.max_dropped_fraction: 0.06" in message
    prepared_from(path, tokenizer, max_dropped_fraction=0.06)  # what the hint says is enough


def test_a_run_on_bad_data_stops_with_exit_code_2(tmp_path, tiny_model_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bad_file(tmp_path, "messages in JSONL")
    recipe = {
        "model": {"path": str(tiny_model_folder), "dtype": "float32"},
        "adapters": [{"rank": 2}],
        "data": {"sources": "rows.jsonl"},
        "training": {"max_length": MAX_TOKENS, "max_steps": 1},
        "output_dir": "run",
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as caught:
        main(["sft", "recipe.yaml"])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "rows.jsonl: 170 of 1,000 rows (17.0%) cannot be used; the limit is 5.0%" in shown
    for reason, _ in CASES["messages in JSONL"].faults:
        assert f"17  {reason}: line " in shown
    assert "Traceback" not in shown
    assert not list(Path("run").rglob("*.safetensors"))


# ---- files that are no data ----


def stopped(path: Path, tokenizer: PreTrainedTokenizerFast) -> DataError:
    with pytest.raises(DataError) as caught:
        prepared_from(path, tokenizer)
    assert caught.value.hint and caught.value.where
    return caught.value


def test_a_pipe_is_refused(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "rows.jsonl")  # which nobody writes to: reading it would wait for ever
    assert "is a pipe" in stopped(tmp_path / "rows.jsonl", tokenizer).message


def test_columns_of_one_name_are_refused(tmp_path, tokenizer):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "two columns are called 'text'" in stopped(tmp_path / "rows.parquet", tokenizer).message


def test_a_date_that_python_cannot_hold_costs_its_row_alone(tmp_path, tokenizer):
    """As some exports have it beside every message, in the year 36000 for "never"."""
    words = pyarrow.array(["user", "assistant"] * 10)
    sent = pyarrow.array([2**40 if index == 5 else 0 for index in range(20)], pyarrow.timestamp("s"))
    items = pyarrow.StructArray.from_arrays([words, words, sent], ["role", "content", "sent"])
    rows = pyarrow.ListArray.from_arrays(list(range(0, 21, 2)), items)
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "rows.parquet")
    audit = prepared_from(tmp_path / "rows.parquet", tokenizer).audit.train[0]
    assert audit.dropped_rows == {"a value that Python cannot hold": [3]} and audit.kept == 9


def test_thousands_of_columns_with_names_that_clear_the_screen(tmp_path, tokenizer):
    row = {f"\x1b[2J{index}" * 50: "x" for index in range(3000)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    message = stopped(tmp_path / "rows.jsonl", tokenizer).message
    assert "and 2,970 more" in message and message.isprintable() and len(message) < 4000
