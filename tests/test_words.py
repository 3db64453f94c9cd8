from __future__ import annotations

import pytest

from varlen_sft.words import count, listed


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [
        (1, "row", "1 row"),
        (0, "row", "0 rows"),
        (2000, "row", "2,000 rows"),
        (1, "micro-batch", "1 micro-batch"),
        (2, "micro-batch", "2 micro-batches"),
        (1.0, "epoch", "1 epoch"),
        (2.5, "epoch", "2.5 epochs"),
    ],
)
def test_count(number, what, text):
    assert count(number, what) == text


def test_listed():
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]
