from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft.ops.attention_split import Part, scratch_rows, split_plan


@pytest.mark.parametrize(
    ("heads", "head_dim", "per_row"), [(32, 128, 4096), (5, 80, 480), (3, 16, 96), (8, 160, 1536)]
)
def test_the_most_rows_are_below_the_limit_and_one_more_is_not(heads, head_dim, per_row):
    rows = scratch_rows(heads, head_dim)
    assert rows * per_row < 2**31 <= (rows + 1) * per_row


def test_a_part_may_reach_the_limit_and_not_pass_it():
    edges = [0, 100, 200, 200, 300]
    whole = [Part(0, 4, 0, 300, 0, 300)]
    assert split_plan(edges, edges, 300 + 4 * 128) == whole
    assert split_plan(edges, edges, 300 + 4 * 128 - 1) == [
        Part(0, 2, 0, 200, 0, 200), Part(3, 4, 200, 300, 200, 300)
    ]  # fmt: skip
    assert [part.first for part in split_plan(edges, edges, 228)] == [0, 1, 3]
    with pytest.raises(ValueError, match="sequence 0 must be at most 99 tokens long.*got 100"):
        split_plan(edges, edges, 227)


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(428, 2000))
def test_parts_cover_every_query_in_as_few_calls_as_can_be(lengths, rows):
    edges = [0, *accumulate(lengths)]
    parts = split_plan(edges, edges, rows)
    tokens = [t for part in parts for t in range(part.start, part.end)]
    assert tokens == list(range(edges[-1]))
    for part, following in zip(parts, [*parts, None][1:], strict=True):
        assert (part.start, part.end) == (edges[part.first], edges[part.last])
        assert part.end - part.start + 128 * (part.last - part.first) <= rows
        if following is not None:  # its first sequence would not have gone in
            last = following.first + 1
            assert edges[last] - part.start + 128 * (last - part.first) > rows
