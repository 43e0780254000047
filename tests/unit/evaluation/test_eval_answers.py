"""When a generated answer is as good as the expected one."""

from __future__ import annotations

import pytest

from qhybrid.evaluation.answers import Answer, result_after


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48/2 = 24 clips\n#### 72", "72"),
        ("#### 1,200\nand more", "1200"),
        ("#### $1,200.00.", "1200"),
        ("#### -3.50", "-3.5"),
        ("#### 70%", "70"),
        ("#### 5 #### 6", "6"),  # the last one counts
        ("####six apples ", "six apples"),
        ("####", ""),
        ("the answer is 72", None),
    ],
)
def test_the_result_of_a_derivation(text, result):
    assert result_after(text, "####") == result


@pytest.mark.parametrize(
    ("expected", "generated", "after", "exact"),
    [
        ("yes", " yes\n", None, True),
        ("yes", "yes.", None, False),
        ("two and two\n#### 4", "2 + 2 is four #### 4.0", "####", True),
        ("two and two\n#### 4", "two and two\n#### 5", "####", False),
        ("two and two\n#### 4", "two and two make 4", "####", False),
        ("no marker", "no marker", "####", False),
    ],
)
def test_exactness(expected, generated, after, exact):
    assert Answer("p", expected, generated, False, after).is_exact is exact
