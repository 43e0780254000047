"""Classification as instruction: the label word that a model gives the highest probability, and F1 of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qhybrid.data.tokenize import EncodedRow
from qhybrid.errors import DataError
from qhybrid.evaluation.answers import answer_start, answer_text


@dataclass(frozen=True)
class LabelledRows:
    """Rows whose answers are labels: the label of each row, and the token by which each label is told.

    Attributes:
        expected: indices into `labels`, one for each row.
        tokens: the first token of each label where it is an answer; no two are equal.
    """

    labels: tuple[str, ...]
    expected: tuple[int, ...]
    tokens: tuple[int, ...]

    def predicted(self, logits: Tensor) -> list[int]:
        """The labels with the highest probability; logits (rows, vocabulary) predict the first answer token.

        As no two labels begin with the same token, this is what greedy decoding would give if it could say nothing
        but labels. Of equal ones the first label is taken.
        """
        chosen = logits[:, torch.tensor(self.tokens, device=logits.device)].float()
        return chosen.argmax(dim=-1).tolist()


def label_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow], labels: Sequence[str]
) -> LabelledRows:
    """Find the label of every row, and the token that tells each label from the others.

    Raises:
        DataError: a row without a prompt, or whose answer is none of the labels; a label that no row has; labels
            that begin with the same token.
    """
    expected: list[int] = []
    tokens: dict[int, int] = {}
    for row in rows:
        where = f"{row.source}:{row.number}" if row.source else None
        start = answer_start(row)
        if start < 1:
            raise DataError("a row has no prompt, so there is no label to ask for", where=where)
        answer = answer_text(tokenizer, row)
        if answer.strip() not in labels:
            raise DataError(
                f"the answer {answer.strip()[:60]!r} is not one of the labels {', '.join(labels)}",
                where=where,
                hint="name all labels that the rows have, as they are written there",
            )
        label = list(labels).index(answer.strip())
        token = int(row.input_ids[start])
        if tokens.setdefault(label, token) != token:
            raise DataError(
                f"the label {labels[label]!r} does not begin with the same token in all rows",
                where=where,
                hint="write it in the same way, blanks included",
            )
        expected.append(label)
    for index, label in enumerate(labels):
        if index not in tokens:
            raise DataError(f"no row has the label {label!r}", hint="leave it out, or take more rows")
        twin = next((labels[other] for other in range(index) if tokens[other] == tokens[index]), None)
        if twin is not None:
            raise DataError(
                f"the labels {twin!r} and {label!r} begin with the same token "
                f"({tokenizer.decode([tokens[index]])!r}), by which they cannot be told apart",
                hint="use other words, such as yes and no, in the data and as labels",
            )
    return LabelledRows(tuple(labels), tuple(expected), tuple(tokens[i] for i in range(len(labels))))


@dataclass(frozen=True)
class ClassScores:
    """One label: how many rows have it, and how well it is found."""

    label: str
    rows: int
    right: int
    precision: float  # 0 where it was never predicted
    recall: float  # the class's accuracy
    f1: float


@dataclass(frozen=True)
class LabelScores:
    """What was expected and what was predicted, as indices into `labels`, row by row."""

    labels: tuple[str, ...]
    expected: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def confusion(self) -> list[list[int]]:
        """Rows by expected label (outer) and predicted label (inner)."""
        counts = [[0] * len(self.labels) for _ in self.labels]
        for expected, predicted in zip(self.expected, self.predicted, strict=True):
            counts[expected][predicted] += 1
        return counts

    @property
    def accuracy(self) -> float:
        """The share of rows that are right."""
        right = sum(a == b for a, b in zip(self.expected, self.predicted, strict=True))
        return right / len(self.expected)

    @property
    def classes(self) -> tuple[ClassScores, ...]:
        """The figures of each label."""
        confusion, scores = self.confusion, []
        for index, label in enumerate(self.labels):
            right, rows = confusion[index][index], sum(confusion[index])
            said = sum(line[index] for line in confusion)
            precision, recall = right / said if said else 0.0, right / rows if rows else 0.0
            f1 = 2 * right / (said + rows) if said + rows else 0.0
            scores.append(ClassScores(label, rows, right, precision, recall, f1))
        return tuple(scores)

    @property
    def f1(self) -> float:
        """F1 of the first label, 2·TP/(2·TP + FP + FN): the positive one, as GLUE counts MRPC and QQP."""
        return self.classes[0].f1

    @property
    def macro_f1(self) -> float:
        """The mean of all labels' F1."""
        classes = self.classes
        return sum(one.f1 for one in classes) / len(classes)
