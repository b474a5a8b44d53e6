"""Page features, exact comparisons and nearest pages by the kernels against torch."""

from dataclasses import astuple

import pytest
import torch

from hf_kvcompress.ops import features, kernels
from hf_kvcompress.ops.features import nearest, nearest_signs, page_features, pair_sums, sign_bits

from .mutants import caught


def draw(count, tokens, dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    pages = torch.randn(count, tokens, dim, generator=g) + torch.randn(dim, generator=g)
    pages[0, 0, 0] = torch.inf
    return pages.to(dtype)


def both(function, *args, **kwargs):
    with kernels.emulate(None):
        expected = function(*args, **kwargs)
    return function(*args, **kwargs), expected


def close(got, expected):
    """Sums in another order: to 1e-5 of their terms' size."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("tokens", "dim", "sketch", "dtype"),
    [(32, 128, 64, torch.bfloat16), (7, 20, 13, torch.float32), (5, 37, 160, torch.float16), (3, 9, 0, torch.float32)],
    ids=str,
)
def test_features_and_pairs_are_torchs(tokens, dim, sketch, dtype, emulated):
    pages = draw(4, tokens, dim, dtype)
    got, expected = both(page_features, pages, sketch, 5)
    close(got.all, expected.all)
    pairs = torch.tensor([[0, 1], [3, 3], [2, 0], [1, 3], [1, 2]])
    for others in (None, pages.flip(0)):
        got, expected = both(pair_sums, pages, pairs, others)
        for ours, theirs in zip(astuple(got), astuple(expected), strict=True):
            close(ours, theirs)
    assert emulated.launches == ["page_features", "page_pairs", "page_pairs"]


def signs_of(count, length, seed=0):
    """Rows of +-1: norms are powers of two where the length is one of four, so products are exact and ties many."""
    return torch.randint(0, 2, (count, length), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize(("count", "length", "k"), [(1, 16, 1), (70, 16, 4), (130, 64, 16), (5, 4, 8)])
def test_nearest_rows_are_torchs(count, length, k, emulated):
    rows = signs_of(count, length)
    for earlier in (False, True):
        for ours, theirs in zip(*both(nearest, rows, k, earlier=earlier), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(*both(nearest, rows, k, pool=rows[: count // 2 + 1]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("count", "bits", "k"), [(70, 70, 3), (3, 600, 16)])
def test_nearest_signs_are_torchs(count, bits, k, emulated):
    signs = sign_bits(signs_of(count, bits, 1))
    for earlier in (False, True):
        for ours, theirs in zip(*both(nearest_signs, signs, k, earlier=earlier), strict=True):
            assert torch.equal(ours, theirs)


def test_cosines_of_any_numbers(emulated):
    rows = torch.randn(40, 37, generator=torch.Generator().manual_seed(2))
    rows[3] = 0
    got, expected = both(nearest, rows, 5)
    close(got[0], expected[0])
    assert (got[1] == expected[1]).float().mean() > 0.9, "rows may change places where cosines tie within rounding"


def test_nothing_to_do(emulated):
    none = torch.zeros(0, 4, 8)
    assert page_features(none).all.shape == (0, 81)
    assert nearest(none[:, 0], 2)[0].shape == (0, 2)
    assert len(pair_sums(draw(2, 4, 8), torch.zeros(0, 2, dtype=torch.long)).x) == 0
    assert not emulated.launches


def test_every_schedule(scheduled):
    pages = draw(3, 6, 20)
    got, expected = both(page_features, pages)
    close(got.all, expected.all)
    got, expected = both(pair_sums, pages, torch.tensor([[1, 2], [0, 1]]))
    close(torch.stack(astuple(got)), torch.stack(astuple(expected)))
    for ours, theirs in zip(*both(nearest, signs_of(66, 16), 3, earlier=True), strict=True):
        assert torch.equal(ours, theirs)


def run():
    pages = draw(3, 6, 70)
    got, expected = both(page_features, pages)
    close(got.all, expected.all)
    got, expected = both(nearest, signs_of(66, 64), 3, earlier=True)
    assert torch.equal(got[1], expected[1])


def test_ops_are_traced(emulated):
    pages, util = draw(3, 4, 8), ("test_schema", "test_faketensor")
    torch.library.opcheck(features.features_into, (pages, torch.zeros(3, 33), 16, 0), test_utils=util)
    pairs = torch.tensor([[0, 1]])
    torch.library.opcheck(features.pairs_into, (pages, pages, pairs, torch.zeros(1, 4)), test_utils=util)
    rows, found = pages[:, 0].contiguous(), torch.zeros(3, 2, dtype=torch.int32)
    args = (rows, rows, torch.zeros(3, 2), found, True, False, False)
    torch.library.opcheck(features.nearest_into, args, test_utils=util)


@pytest.mark.parametrize(
    ("source", "after", "old", "new"),
    [
        ("page_features.cu", "sums[threadIdx.x >> 5] = x;", "__syncthreads();", ""),
        ("page_features.cu", "const int behind", "behind < 0 ? behind + sketch : behind", "behind"),
        ("page_nearest.cu", "sums[i][j] -= __popc", "__syncthreads();", ""),
        ("page_nearest.cu", "left[row][at] = inside", "&& first + row < query_count", ""),
        ("page_nearest.cu", "earlier && row > self", "score > best", "score >= best"),
        ("page_nearest.cu", "row == self ||", "row > self", "row >= self - 1"),
    ],
)
def test_planted_bugs_are_caught(source, after, old, new):
    assert caught(run, source, after, old, new)
