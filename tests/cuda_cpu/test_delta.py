"""Page deltas by the kernels: the bytes and the numbers of the reference in torch."""

from dataclasses import astuple

import pytest
import torch

from hf_kvcompress.ops import kernels
from hf_kvcompress.ops.delta import BITS, decode_delta, decode_delta_into, encode_delta, encode_delta_into

from .mutants import caught

MEMBERS, BASES = torch.tensor([1, 2, 0, 4, 0, 5, 1]), torch.tensor([0, 3, 0, 1, 2, 4, 5])


def draw(tokens, dim, dtype, seed=0):
    """Pages: alike, with odd numbers, all zeros, huge, tiny."""
    pages = torch.randn(6, tokens, dim, generator=torch.Generator().manual_seed(seed))
    pages[1] = 1.5 * pages[0] + 0.1 * pages[1]
    pages[2, 0, 0], pages[2, -1, -1], pages[3] = torch.nan, -torch.inf, 0
    if dtype != torch.float16:
        pages[4] *= 1e30
        pages[5] *= 1e-30
    return pages.to(dtype)


def check(pages, nbits, out_dtype=torch.float32):
    with kernels.emulate(None):
        expected = encode_delta(pages, pages, MEMBERS, BASES, nbits)
        numbers = decode_delta(expected, pages, BASES, out_dtype)
    got = encode_delta(pages, pages, MEMBERS, BASES, nbits)
    for ours, theirs in zip(astuple(got)[1:], astuple(expected)[1:], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert torch.equal(decode_delta(expected, pages, BASES, out_dtype), numbers)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize(
    ("tokens", "dim", "dtype"),
    [(32, 128, torch.bfloat16), (7, 20, torch.float32), (16, 37, torch.float16), (1, 1, torch.float32)],
    ids=str,
)
def test_bytes_and_numbers_are_torchs(tokens, dim, dtype, nbits, emulated):
    check(draw(tokens, dim, dtype), nbits, dtype)
    assert emulated.launches == ["delta_encode", "delta_decode"]


def test_no_members(emulated):
    pages, none = draw(4, 8, torch.float32), torch.zeros(0, dtype=torch.long)
    delta = encode_delta(pages, pages, none, none, 8)
    assert decode_delta(delta, pages, none).shape == (0, 4, 8) and not emulated.launches


def test_large_pages_take_fewer_warps(emulated):
    """A page of heads of 512 channels still fits the shared memory that every block gets."""
    pages = torch.randn(2, 300, 512, generator=torch.Generator().manual_seed(1))
    one = torch.zeros(1, dtype=torch.long)
    with kernels.emulate(None):
        expected = encode_delta(pages, pages, one, one + 1, 8)
    assert torch.equal(encode_delta(pages, pages, one, one + 1, 8).codes, expected.codes)


@pytest.mark.parametrize("nbits", [4, 12])
def test_every_schedule(nbits, scheduled):
    check(draw(10, 20, torch.float32), nbits)


def test_ops_are_traced(emulated):
    pages = draw(4, 8, torch.float32)
    fields = astuple(encode_delta(pages, pages, MEMBERS, BASES, 12))[1:]
    util = ("test_schema", "test_faketensor")
    torch.library.opcheck(encode_delta_into, (pages, pages, MEMBERS, BASES, *fields, 12), test_utils=util)
    out = torch.zeros(len(MEMBERS), 4, 8)
    torch.library.opcheck(decode_delta_into, (pages, BASES, *fields, out, 12), test_utils=util)


@pytest.mark.parametrize(
    ("after", "old", "new"),
    [
        ("if (n % 2", "__syncwarp();", ""),
        ("x[i] += x[half + i];", "n % 2 &&", "false &&"),
        ("__device__ unsigned code", "c >= dim", "false"),
        ("page_squares[t] = square;", "__syncthreads();", ""),
    ],
)
def test_planted_bugs_are_caught(after, old, new):
    pages = draw(10, 21, torch.float32)
    assert caught(lambda: check(pages, 4), "page_delta.cu", after, old, new)
