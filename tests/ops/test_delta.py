"""Pages coded against other pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.ops.delta import BITS, LARGEST_GAIN, decode_delta, delta_tolerance, encode_delta

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pages_like(tokens, dim, dtype, alike, size, seed):
    """Four pages that share a part `alike` of what they are, one of zeros, one with numbers that are not finite."""
    g = torch.Generator().manual_seed(seed)
    pages = (1 - alike) * torch.randn(5, tokens, dim, generator=g) + alike * torch.randn(1, tokens, dim, generator=g)
    pages[3] = 0
    pages *= size
    pages[4, 0, : min(3, dim)] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: min(3, dim)]
    return pages.to(dtype)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 17),
    dim=st.integers(1, 40),
    nbits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    alike=st.sampled_from((0.0, 0.5, 0.99, 1.0)),
    size=st.sampled_from((1e-20, 1.0, 100.0, 1e30)),
    seed=st.integers(0, 3),
)
def test_error_stays_within_its_bound(tokens, dim, nbits, dtype, alike, size, seed):
    pages = pages_like(tokens, dim, dtype, alike, size, seed)
    members, bases = torch.tensor([0, 1, 2, 3, 4, 0, 0]), torch.tensor([1, 0, 0, 1, 2, 3, 4])
    delta = encode_delta(pages, pages, members, bases, nbits)
    error = decode_delta(delta, pages, bases).double() - clean(pages[members])
    bound = delta_tolerance(delta, pages, members)
    assert (torch.linalg.vector_norm(error, dim=2) <= bound.double()).all()


def clean(pages):
    """As the codec reads them: what is not finite is 0, the rest within its limit."""
    return torch.nan_to_num(pages.float(), 0, 0, 0).clamp(-1e37, 1e37).double()


@pytest.mark.parametrize("nbits", BITS)
def test_bytes(nbits):
    pages = torch.randn(3, 32, 128)
    delta = encode_delta(pages, pages, torch.tensor([1, 2]), torch.tensor([0, 0]), nbits)
    assert delta.nbytes == 2 * (32 * 128 * nbits // 8 + 32 * 2 + 2)


@pytest.mark.parametrize("nbits", BITS)
def test_a_copy_is_exact_and_a_multiple_nearly(nbits):
    pages = torch.randn(1, 16, 24)
    pages = torch.cat([pages, pages, pages * 3])
    members, bases = torch.tensor([1, 2]), torch.tensor([0, 0])
    delta = encode_delta(pages, pages, members, bases, nbits)
    read = decode_delta(delta, pages, bases)
    assert torch.equal(read[0], pages[0]), "the difference is 0"
    assert delta.gain.tolist() == [1.0, 3.0] and torch.equal(read[1], pages[2])


def test_more_bits_and_likeness_lose_less():
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 1, 32, 64, generator=g)
    members, bases = torch.tensor([1, 2]), torch.tensor([0, 0])
    pages = torch.cat([base, base + 0.05 * other, base + 0.5 * other])
    deltas = [encode_delta(pages, pages, members, bases, nbits) for nbits in BITS]
    lost = torch.stack([(decode_delta(delta, pages, bases) - pages[1:]).flatten(1).norm(dim=1) for delta in deltas])
    assert (lost[:-1] > 8 * lost[1:]).all() and (lost[:, 1] > 8 * lost[:, 0]).all()


def test_gain_leaves_no_more_than_the_page():
    """Against any base, even one that points the other way."""
    pages = torch.randn(2, 8, 16)
    pages = torch.cat([pages, -2 * pages[:1], 1e-9 * pages[:1]])
    members, bases = torch.tensor([1, 2, 0, 0]), torch.tensor([0, 0, 2, 3])
    delta = encode_delta(pages, pages, members, bases, 8)
    left = pages[members] - delta.gain.float()[:, None, None] * pages[bases]
    assert (left.flatten(1).norm(dim=1) <= pages[members].flatten(1).norm(dim=1) * 1.001).all()
    assert delta.gain[3] == LARGEST_GAIN


def test_bases_of_their_own_as_they_are_read():
    """The difference is taken to what the reader has, so a coarse base costs bits and no further error."""
    pages = torch.randn(2, 16, 32)
    bases = (pages[:1] * 4).round() / 4
    delta = encode_delta(pages, bases, torch.tensor([0]), torch.tensor([0]), 8)
    assert (decode_delta(delta, bases, torch.tensor([0])) - pages[:1]).abs().max() < 0.002


def test_one_page_depends_on_no_other():
    pages = torch.randn(6, 8, 20)
    members, bases = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 5])
    delta = encode_delta(pages, pages, members, bases, 4)
    alone = encode_delta(pages, pages, members[2:], bases[2:], 4)
    assert torch.equal(alone.codes[0], delta.codes[2]) and torch.equal(alone.gain[0], delta.gain[2])


def test_errors_name_the_argument():
    pages, one = torch.zeros(2, 4, 8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"nbits: expected one of \(4, 8, 12\), got 3"):
        encode_delta(pages, pages, one, one, 3)
    with pytest.raises(ValueError, match=r"bases: expected \[Q, 4, 8\] torch.float32, got \[2, 4, 7\]"):
        encode_delta(pages, pages[..., :7], one, one, 8)
    with pytest.raises(ValueError, match=r"base_of: expected \[M\] int64 as members, got \[2\]"):
        encode_delta(pages, pages, one, one.repeat(2), 8)
    with pytest.raises(ValueError, match=r"pages: expected \[P, T, D\] float32, float16 or bfloat16, got \(2, 4\)"):
        encode_delta(pages[..., 0], pages, one, one, 8)
