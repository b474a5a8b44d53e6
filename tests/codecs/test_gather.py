"""Tokens taken out of packed runs without being packed again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_codecs import PAIRS, draw, make

PAGE = 16
TOKEN_WISE = [(name, role) for name, role in PAIRS if make(name, role, 64).token_wise]


def lines(codec, sizes, seed=0):
    """Packed runs `[m, T, ...]` with one statistic for all, and all their tokens decoded, `[tokens, D]`."""
    runs = [draw("channels", (*size, codec.dim), torch.float32, seed + i) for i, size in enumerate(sizes)]
    segment = codec.begin_segment(torch.cat([run.flatten(0, 1) for run in runs]))
    parts, dense = [], []
    for run in runs:
        own = {name: t.expand(len(run), *t.shape) for name, t in segment.items()}
        parts.append(codec.encode(run, own))
        dense.append(codec.decode({**parts[-1], **own}).flatten(0, 1))
    return segment, parts, torch.cat(dense)


@pytest.mark.parametrize(("name", "role"), TOKEN_WISE)
@settings(max_examples=8)
@given(
    dim=st.sampled_from((8, 20, 64, 96)),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.sampled_from((PAGE, 3 * PAGE))), min_size=1, max_size=3),
    out=st.tuples(st.integers(1, 3), st.sampled_from((PAGE, 2 * PAGE))),
    data=st.data(),
)
def test_gathered_tokens_are_the_same_tokens(name, role, dim, sizes, out, data):
    """Any tokens in any order, repeats too: as they decode, and as packing them next to each other would store them."""
    codec = make(name, role, dim, page_size=PAGE, group_size=PAGE)
    segment, parts, dense = lines(codec, sizes)
    before = [{field: t.clone() for field, t in part.items()} for part in parts]
    picks = data.draw(st.lists(st.integers(0, len(dense) - 1), min_size=out[0] * out[1], max_size=out[0] * out[1]))
    index = torch.tensor(picks).view(out)
    picked = codec.gather(parts, index)
    assert picked.keys() == {field for field, kind in codec.fields.items() if kind.tokens is not None}
    for field, kind in codec.fields.items():
        if kind.tokens is not None:
            assert picked[field].dtype == kind.dtype
            assert picked[field].shape == kind.stored_shape((out[0],), out[1])
    own = {field: t.expand(out[0], *t.shape) for field, t in segment.items()}
    assert torch.equal(codec.decode({**picked, **own}), dense[index])
    for part, kept in zip(parts, before, strict=True):
        assert all(torch.equal(part[field], kept[field]) for field in kept), "what is read stays as it is"


@pytest.mark.parametrize(("name", "role"), TOKEN_WISE)
def test_gathering_everything_in_order_changes_no_byte(name, role):
    codec = make(name, role, 64, page_size=PAGE, group_size=PAGE)
    _, parts, dense = lines(codec, [(2, 2 * PAGE), (2, 2 * PAGE)])
    picked = codec.gather(parts, torch.arange(len(dense)).view(4, 2 * PAGE))
    for field, got in picked.items():
        assert torch.equal(got, torch.cat([part[field] for part in parts]))


@pytest.mark.parametrize(("name", "role"), TOKEN_WISE)
def test_gathered_tokens_are_read_without_decoding(name, role):
    """Products with gathered codes equal those with what they decode to."""
    codec = make(name, role, 64, page_size=PAGE, group_size=PAGE)
    segment, parts, dense = lines(codec, [(3, 4 * PAGE)])
    index = torch.randperm(len(dense))[: 4 * PAGE].view(2, 2 * PAGE)
    picked = {field: t[:, None, None] for field, t in codec.gather(parts, index).items()}
    packed = {**picked, **{field: t.expand(2, 1, 1, *t.shape) for field, t in segment.items()}}
    if role == "key":
        queries = torch.randn(2, 1, 4, 64)
        torch.testing.assert_close(
            codec.scores(queries, packed)[:, 0], queries[:, 0] @ dense[index].mT, rtol=1e-4, atol=2e-2
        )
    else:
        weights = torch.randn(2, 1, 4, 2 * PAGE).softmax(-1)
        mixed = codec.finish(codec.mix(weights, packed))[:, 0]
        torch.testing.assert_close(mixed, weights[:, 0] @ dense[index], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "role"), [pair for pair in PAIRS if pair not in TOKEN_WISE])
def test_tokens_that_were_packed_together_are_refused(name, role):
    codec = make(name, role, 64, page_size=PAGE, group_size=PAGE)
    _, parts, _ = lines(codec, [(1, PAGE)])
    with pytest.raises(ValueError, match=f"codec: expected one that packs every token by itself, got {codec.name}"):
        codec.gather(parts, torch.zeros(1, PAGE, dtype=torch.long))
