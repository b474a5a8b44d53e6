"""Gathering packed tokens: the reference against tokens moved one by one. Codecs: tests/codecs/test_gather.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.ops.gather import Layout, gather_tokens
from hf_kvcompress.ops.packing import pack, unpack

PAGE = 8
CHANNELS = 3


def run(shape, bits, g):
    """Numbers `[m, T, CHANNELS]` and the fields that hold them in each layout."""
    codes = torch.randint(0, 2**bits, (*shape, CHANNELS), generator=g, dtype=torch.uint8)
    paged = codes.movedim(-1, 1).unflatten(-1, (-1, PAGE))
    fields = {"plain": codes, "last": codes.movedim(-1, 1).clone(), "bits": pack(paged, bits)[0].flatten(2)}
    return codes, {**fields, "one": codes[..., 0].int()}


@settings(max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.sampled_from((PAGE, 2 * PAGE))), min_size=1, max_size=3),
    bits=st.sampled_from((1, 2, 4)),
    data=st.data(),
)
def test_every_layout_holds_the_same_tokens(sizes, bits, data):
    g = torch.Generator().manual_seed(0)
    runs = [run(size, bits, g) for size in sizes]
    dense = torch.cat([codes.flatten(0, 1) for codes, _ in runs])
    picks = data.draw(st.lists(st.integers(-1, len(dense) - 1), min_size=2 * PAGE, max_size=2 * PAGE))
    index = torch.tensor(picks).view(2, PAGE)
    layouts = {
        "plain": Layout(),
        "last": Layout(tokens_last=True),
        "bits": Layout(8 // bits, tokens_last=True),
        "one": Layout(absent=-7),
    }
    got = gather_tokens([fields for _, fields in runs], layouts, index, PAGE)
    there = index >= 0
    assert torch.equal(got["plain"][there], dense[index[there]])
    assert torch.equal(got["last"].movedim(1, -1)[there], dense[index[there]])
    codes = unpack((got["bits"].unflatten(-1, (-1, PAGE * bits // 8)),), bits, PAGE).flatten(2)
    assert torch.equal(codes.movedim(1, -1)[there], dense[index[there]])
    assert torch.equal(got["one"], torch.where(there, dense[index, 0].int(), -7))


def test_part_of_a_page_is_refused():
    with pytest.raises(ValueError, match="index: expected a multiple of 8 columns, got 12"):
        gather_tokens([{"x": torch.zeros(1, 8)}], {"x": Layout()}, torch.zeros(1, 12, dtype=torch.long), PAGE)
