"""Top-k selection by the kernel: the very tokens that the reference keeps."""

import pytest
import torch

from hf_kvcompress.ops import kernels
from hf_kvcompress.ops.select import MANY, highest, select_into, select_tokens

from .mutants import caught


def draw(lanes, tokens, ties, seed=0):
    """Scores with some -inf, inf and NaN; with `ties` few different ones, both zeros among them."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(lanes, tokens, generator=g) * (1 if ties else 1000)
    if ties:
        scores = torch.where(scores.abs() < 0.2, scores * 0, scores.round())
    odd = torch.tensor([-torch.inf, torch.nan, torch.inf, -torch.inf])
    for lane in range(lanes):
        scores[lane, torch.randperm(tokens, generator=g)[: min(4, tokens)]] = odd[: min(4, tokens)]
    return scores


def check(function, *args):
    with kernels.emulate(None):
        expected = function(*args)
    assert torch.equal(function(*args), expected)
    return expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 31, 33, 128, 333])
def test_indices_are_the_references(tokens, ties, emulated):
    scores = draw(5, tokens, ties)
    scores[3] = -torch.inf
    k = torch.tensor([0, 1, tokens // 2, tokens // 2, tokens + 3], dtype=torch.int32)
    for width in (0, max(tokens // 3, 1), tokens + 5):
        check(select_tokens, scores, k, width)
    assert emulated.launches


def test_protected_ranges_and_missing_tokens(emulated):
    scores = draw(4, 70, True, 1)
    k = torch.tensor([20, 20, 3, 70], dtype=torch.int32)
    # sinks, recent tokens, a pin inside them, and what has left a sliding window; the last one wins
    ranges = torch.tensor([[0, 4, 2], [60, 200, 1], [62, 64, 127], [8, 30, -1], [10, 12, 3]], dtype=torch.int32)
    positions = torch.arange(70, dtype=torch.int32).mul(2).repeat(4, 1)
    positions[1, 50:] = -1
    positions[2] = -1
    for own in (None, positions):
        kept = check(select_tokens, scores, k, 72, ranges.repeat(4, 1, 1), own)
        assert 62 // (1 if own is None else 2) in kept[0] and -1 in kept[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_the_references(dtype, emulated):
    for tokens, ties in ((1, False), (100, True), (259, False)):
        scores = draw(3, tokens, ties, 2).to(dtype)
        for number in (-1, 0, 1, tokens // 2, tokens, tokens + 7):
            check(highest, scores, number)


def test_close_doubles_are_told_apart(emulated):
    scores = 1e12 + torch.randperm(90, generator=torch.Generator().manual_seed(3)).double().view(1, 90) * 2**-10
    assert check(highest, scores, 30).sum() == 30


def test_a_long_lane_takes_a_larger_block(emulated):
    scores = draw(1, MANY + 5, True)
    check(select_tokens, scores, torch.tensor([MANY // 2], dtype=torch.int32), MANY // 2 + 40)


def test_every_schedule(scheduled):
    scores = draw(2, 140, True, 4)
    k, ranges = torch.tensor([60, 90], dtype=torch.int32), torch.tensor([[[0, 5, 1]]] * 2, dtype=torch.int32)
    check(select_tokens, scores, k, 80, ranges)


def test_op_is_traced(emulated):
    k, kept = torch.ones(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    args = (draw(2, 9, True), k, None, None, kept, torch.zeros(2, 9, dtype=torch.bool))
    torch.library.opcheck(select_into, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("after", "old", "new"),
    [
        ("1u);", "__syncthreads();", ""),  # counts are read before they are complete
        ("bool stays", ">= skipped", "< wanted"),  # of equal ones the first
        ("unsigned bits", "|| bits == (sign | infinity)", ""),  # hidden scores compete
        ("int above = 0", "some && i + in_warp < end", "some"),  # beyond the last token
    ],
)
def test_planted_bugs_are_caught(after, old, new):
    scores = draw(2, 140, True, 4)
    k = torch.tensor([60, 139], dtype=torch.int32)
    assert caught(lambda: check(select_tokens, scores, k, 150), "select_tokens.cu", after, old, new)
