"""Classification by label words: the confusion matrix by hand, and which labels cannot be told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import build_tokenizer

from qhybrid.data.tokenize import IGNORED_LABEL, EncodedRow
from qhybrid.errors import DataError
from qhybrid.evaluation.labels import LabelScores, label_rows


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def row(tokenizer, prompt: str, answer: str, number: int = 1) -> EncodedRow:
    asked, said = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    ids = np.array([*asked, *said, tokenizer.eos_token_id], dtype=np.int32)
    labels = ids.copy()
    labels[: len(asked)] = IGNORED_LABEL
    return EncodedRow(ids, labels, number=number, source="rows.jsonl")


def test_figures_against_a_confusion_matrix_made_by_hand():
    """
    Expected yes 6 times and no 4 times:

                said yes  said no  said maybe
        yes            4        1           1
        no             2        2           0
        maybe          0        0           1
    """
    expected = (0,) * 6 + (1,) * 4 + (2,)
    predicted = (0, 0, 0, 0, 1, 2, 0, 0, 1, 1, 2)
    scores = LabelScores(("yes", "no", "maybe"), expected, predicted)
    assert scores.confusion == [[4, 1, 1], [2, 2, 0], [0, 0, 1]]
    assert scores.accuracy == pytest.approx(7 / 11)
    yes, no, maybe = scores.classes
    assert (yes.rows, yes.right, yes.precision, yes.recall) == (6, 4, pytest.approx(4 / 6), pytest.approx(4 / 6))
    assert yes.f1 == pytest.approx(2 * 4 / (2 * 4 + 2 + 2)) and scores.f1 == yes.f1
    assert no.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 2)) and maybe.f1 == pytest.approx(2 / 3)
    assert scores.macro_f1 == pytest.approx((yes.f1 + no.f1 + maybe.f1) / 3)


def test_a_label_that_is_never_predicted_has_f1_zero():
    scores = LabelScores(("yes", "no"), (0, 0, 1), (1, 1, 1))
    assert scores.f1 == 0 and scores.classes[0].precision == 0 and scores.accuracy == pytest.approx(1 / 3)


def test_the_label_of_highest_probability_is_predicted(tokenizer):
    rows = [row(tokenizer, "Is it so? ", answer) for answer in ("yes", "no", "no")]
    labelled = label_rows(tokenizer, rows, ["no", "yes"])
    assert labelled.expected == (1, 0, 0)
    assert [tokenizer.decode([token]) for token in labelled.tokens] == [
        tokenizer.decode(tokenizer(word)["input_ids"][:1]) for word in ("no", "yes")
    ]
    logits = torch.full((3, len(tokenizer)), 9.0)  # something else is likelier than any label
    logits[:, list(labelled.tokens)] = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]])
    assert labelled.predicted(logits) == [1, 0, 0]


def test_labels_that_begin_alike_are_refused(tokenizer):
    rows = [row(tokenizer, "Is it so? ", answer) for answer in ("~a", "~b")]
    with pytest.raises(DataError, match="'~a' and '~b' begin with the same token"):
        label_rows(tokenizer, rows, ["~a", "~b"])


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        ([("Is it? ", "yes"), ("Is it? ", "perhaps")], ["yes", "no"], "rows.jsonl:2: the answer 'perhaps' is not"),
        ([("Is it? ", "yes"), ("", "no")], ["yes", "no"], "rows.jsonl:2: a row has no prompt"),
        ([("Is it? ", "yes"), ("Is it? ", "yes")], ["yes", "no"], "no row has the label 'no'"),
        (
            [("Is it? ", "yes"), ("Is it?", " yes")],
            ["yes", "no"],
            "does not begin with the same token",
        ),
    ],
)
def test_rows_that_do_not_fit_the_labels_are_refused(tokenizer, rows, labels, words):
    encoded = [row(tokenizer, *one, number=number) for number, one in enumerate(rows, 1)]
    with pytest.raises(DataError, match=words):
        label_rows(tokenizer, encoded, labels)
