"""Choosing the best tokens: the reference against a plain sort."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcompress.ops.select import highest, select_tokens

SCORES = st.sampled_from((-math.inf, -2.5, -0.0, 0.0, 1e-30, 1.0, 3.0, math.inf, math.nan))


def best(scores, number):
    """Indices of the highest scores, rising; of equal ones the last; never -inf or NaN."""
    able = [i for i, score in enumerate(scores) if score > -math.inf]
    return sorted(sorted(able, key=lambda i: (scores[i], i), reverse=True)[: max(number, 0)])


@given(
    lanes=st.lists(st.tuples(st.lists(SCORES, min_size=7, max_size=7), st.integers(-1, 9)), min_size=1, max_size=4),
    width=st.integers(0, 9),
)
def test_the_highest_stay(lanes, width):
    scores, numbers = torch.tensor([own for own, _ in lanes]), [number for _, number in lanes]
    kept = select_tokens(scores, torch.tensor(numbers, dtype=torch.int32), width)
    assert kept.dtype == torch.int32 and kept.shape == (len(lanes), width)
    for (own, number), row in zip(lanes, kept.tolist(), strict=True):
        expected = best(own, min(number, width))
        assert row == expected + [-1] * (width - len(expected))
    for dtype in (torch.float32, torch.float64):
        for row, (own, _) in zip(highest(scores.to(dtype), numbers[0]), lanes, strict=True):
            assert row.nonzero()[:, 0].tolist() == best(own, numbers[0])


@given(
    scores=st.lists(SCORES, min_size=8, max_size=8),
    ranges=st.lists(st.tuples(st.integers(-2, 20), st.integers(0, 20), st.integers(-2, 3)), max_size=3),
    missing=st.sets(st.integers(0, 7)),
    number=st.integers(0, 9),
)
def test_levels_come_before_scores(scores, ranges, missing, number):
    positions = [-1 if i in missing else 2 * i + 1 for i in range(8)]
    levels = [next((level for a, b, level in reversed(ranges) if a <= at < b), 0) for at in positions]
    able = [i for i in range(8) if i not in missing and (levels[i] > 0 or (levels[i] == 0 and scores[i] > -math.inf))]
    order = sorted(able, key=lambda i: (levels[i], i if levels[i] else scores[i], i), reverse=True)
    kept = select_tokens(
        torch.tensor([scores]),
        torch.tensor([number], dtype=torch.int32),
        8,
        torch.tensor(ranges, dtype=torch.int32).view(1, -1, 3),
        torch.tensor([positions], dtype=torch.int32),
    )
    assert [i for i in kept[0].tolist() if i >= 0] == sorted(order[:number])


def test_a_lane_alone_keeps_the_same():
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).round()
    k = torch.tensor([3, 10, 0, 40, 7], dtype=torch.int32)
    together = select_tokens(scores, k, 40)
    for lane in range(5):
        assert torch.equal(select_tokens(scores[lane : lane + 1], k[lane : lane + 1], 40)[0], together[lane])


def test_errors_name_the_argument():
    scores, k = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scores: expected \[L, N\] float32, got \(2, 4\) torch.float64"):
        select_tokens(scores.double(), k, 4)
    with pytest.raises(ValueError, match=r"k: expected \[2\] int32, got \[2\] torch.int64"):
        select_tokens(scores, k.long(), 4)
    with pytest.raises(ValueError, match=r"ranges: expected \[2, 1, 3\] int32, got \[1, 1, 3\]"):
        select_tokens(scores, k, 4, torch.zeros(1, 1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"positions: expected \[2, 4\] int32, got \[4, 2\]"):
        select_tokens(scores, k, 4, None, torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="scores: expected a contiguous tensor"):
        select_tokens(torch.zeros(4, 2).t(), k, 4)
