"""Bit packing in planes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcompress.ops.packing import PLANES, pack, padded, plane_sizes, unpack


def draw(shape, nbits, seed):
    return torch.randint(0, 2**nbits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(
    nbits=st.sampled_from(sorted(PLANES)),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    n=st.integers(1, 70),
    first=st.booleans(),
    seed=st.integers(0, 9),
)
def test_round_trip(nbits, shape, n, first, seed):
    shape, dim = ([n, *shape], 0) if first else ([*shape, n], -1)
    codes = draw(shape, nbits, seed)
    planes = pack(codes, nbits, dim=dim)
    assert tuple(p.shape[dim] for p in planes) == plane_sizes(n, nbits)
    assert all(p.dtype == torch.uint8 for p in planes)
    assert torch.equal(unpack(planes, nbits, n, dim=dim), codes)


@pytest.mark.parametrize("nbits", sorted(PLANES))
def test_takes_nbits_and_no_more(nbits):
    planes = pack(draw((7, 64), nbits, 0), nbits)
    assert sum(p.numel() for p in planes) * 8 == 7 * 64 * nbits
    assert [p.shape[-1] * 8 // 64 for p in planes] == list(PLANES[nbits])


def test_padding_is_reported():
    assert padded(20) == 24
    assert plane_sizes(20, 3) == (6, 3)


@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_byte_j_holds_elements_j_plus_multiples(nbits):
    codes = draw((64,), nbits, 1)
    (plane,) = pack(codes, nbits)
    for j, byte in enumerate(plane.tolist()):
        for i in range(8 // nbits):
            assert byte >> (nbits * i) & (2**nbits - 1) == codes[j + i * len(plane)]


def test_three_bits_are_the_high_two_and_the_low_one():
    codes = draw((3, 40), 3, 2)
    high, low = pack(codes, 3)
    assert torch.equal(unpack((high,), 2, 40), codes >> 1)
    assert torch.equal(unpack((low,), 1, 40), codes & 1)


def test_not_contiguous():
    codes = draw((48, 6), 4, 3)
    assert torch.equal(pack(codes.t(), 4)[0], pack(codes.t().contiguous(), 4)[0])
    wide = pack(codes, 4, dim=0)[0].repeat(1, 2)[:, ::2]
    assert torch.equal(unpack((wide,), 4, 48, dim=0), codes.repeat(1, 2)[:, ::2])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"nbits: expected one of \[1, 2, 3, 4, 5, 6, 7, 8\], got 9"):
        pack(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="codes: expected dtype torch.uint8, got torch.int64"):
        pack(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="planes: expected 2 for nbits=3, got 1"):
        unpack((torch.zeros(2, dtype=torch.uint8),), 3, 8)
    with pytest.raises(ValueError, match=r"planes\[0\]: expected 4 bytes along dim -1, got 3"):
        unpack((torch.zeros(3, dtype=torch.uint8),), 4, 8)
