"""Operations on a lossy cache act on packed pages as on the decoded tensors, pages are packed once, bytes are true."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from .factories import LOSSY, PAGE, RESIDUAL, SINKS, Factory
from .state import (
    DIM,
    FULL,
    HEADS,
    LAYERS,
    SLIDING,
    Pairs,
    codecs,
    decoded,
    equal,
    errors,
    feed,
    feed_in_parts,
    held_bytes,
    packed_rows,
    random_pairs,
)
from .zoo import WINDOW

every_cache = pytest.mark.parametrize("factory", LOSSY, ids=lambda factory: factory.name)
LENGTH = 77
#: A codec with statistics may lose this much more if it must begin with the statistics of a first page alone.
CHUNKED_ERROR = 1.5


def filled(factory: Factory, rows: int = 3, config: Any = FULL) -> Any:
    cache = factory(config)
    feed_in_parts(cache, random_pairs(rows, LENGTH), [LENGTH - 10] + [1] * 10)
    return cache


def apply(pairs: Pairs, function: Any) -> Pairs:
    return [(function(keys), function(values)) for keys, values in pairs]


def assert_equal(cache: Any, expected: Pairs) -> None:
    """The cache decodes to this, and goes on as usual afterwards."""
    assert equal(decoded(cache), expected)
    rows, _, length, _ = expected[0][0].shape
    assert cache.get_seq_length() == length
    more = random_pairs(rows, 3 * PAGE, seed=5)
    feed(cache, more)
    sealed = length - RESIDUAL - PAGE  # at least these were packed before and must not have changed
    for held, before, new in zip(decoded(cache), expected, more, strict=True):
        for got, old, x in zip(held, before, new, strict=True):
            assert torch.equal(got[:, :, :sealed], old[:, :, :sealed])
            assert torch.equal(got[:, :, -RESIDUAL:], x[:, :, -RESIDUAL:])


# -- operations --------------------------------------------------------------------------------------------------------


@every_cache
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 2, 2]], ids=str)
def test_reorder(factory: Factory, order: list[int]) -> None:
    cache = filled(factory)
    expected = apply(decoded(cache), lambda x: x[order])
    cache.reorder_cache(torch.tensor(order))
    assert_equal(cache, expected)


@every_cache
def test_repeat_interleave(factory: Factory) -> None:
    cache = filled(factory, rows=2)
    expected = apply(decoded(cache), lambda x: x.repeat_interleave(3, dim=0))
    cache.batch_repeat_interleave(3)
    assert_equal(cache, expected)


@every_cache
@pytest.mark.parametrize("indices", [[2], [0, 2], [2, 1, 0, 0]], ids=str)
def test_select_indices(factory: Factory, indices: list[int]) -> None:
    cache = filled(factory)
    expected = apply(decoded(cache), lambda x: x[indices])
    cache.batch_select_indices(torch.tensor(indices))
    assert_equal(cache, expected)


@every_cache
@pytest.mark.parametrize("tokens", [0, 1, RESIDUAL, RESIDUAL + PAGE + 3, 2 * PAGE, LENGTH - SINKS - 1, LENGTH])
def test_crop(factory: Factory, tokens: int) -> None:
    """In the window, into a page, on a page's edge, to a little more than the sinks, to nothing."""
    cache = filled(factory)
    before = decoded(cache)
    cache.crop(-tokens)
    assert cache.is_croppable
    if tokens == LENGTH:
        assert cache.get_seq_length() == 0
        feed(cache, before)
        assert cache.get_seq_length() == LENGTH
    else:
        assert_cropped(cache, apply(before, lambda x: x[:, :, : LENGTH - tokens]))


def assert_cropped(cache: Any, expected: Pairs) -> None:
    assert equal(decoded(cache), expected)
    length = expected[0][0].shape[2]
    assert cache.get_seq_length() == length
    more = random_pairs(3, RESIDUAL, seed=5)
    feed(cache, more)
    for held, new in zip(decoded(cache), more, strict=True):
        for got, x in zip(held, new, strict=True):
            assert got.shape[2] == length + RESIDUAL
            assert torch.equal(got[:, :, length:], x)


@every_cache
def test_crop_of_a_sliding_window_that_records_its_past(factory: Factory) -> None:
    cache = factory(SLIDING)
    cache.activate_past_recording()
    pairs = random_pairs(2, LENGTH)
    feed_in_parts(cache, pairs, [40, 20, 10, 7])
    before = decoded(cache)
    cache.crop(-7)
    assert cache.get_seq_length() == LENGTH - 7
    visible = WINDOW - 1 - 7
    after = decoded(cache)
    for held, old in zip(after, before, strict=True):
        for got, x in zip(held, old, strict=True):
            assert got.shape[2] == WINDOW - 1
            assert torch.equal(got[:, :, -visible:], x[:, :, -visible - 7 : -7])


@every_cache
def test_reset_starts_from_nothing(factory: Factory) -> None:
    cache, fresh = filled(factory), filled(factory)
    cache.reset()
    assert cache.get_seq_length() == 0
    feed_in_parts(cache, random_pairs(3, LENGTH), [LENGTH - 10] + [1] * 10)
    assert equal(decoded(cache), decoded(fresh))


@every_cache
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_hold_the_same_and_go_their_own_way(factory: Factory, copied: Any) -> None:
    cache = filled(factory)
    before = decoded(cache)
    other = copied(cache)
    assert type(other) is type(cache) and equal(decoded(other), before)
    assert other.nbytes == cache.nbytes
    feed(other, random_pairs(3, 3 * PAGE, seed=5))
    other.batch_select_indices(torch.tensor([0]))
    assert equal(decoded(cache), before)
    feed(cache, random_pairs(3, 3 * PAGE, seed=5))
    other_again = apply(decoded(cache), lambda x: x[:1])
    assert equal(decoded(other), other_again)


# -- the same pages however they came ----------------------------------------------------------------------------------


@every_cache
@pytest.mark.parametrize(
    "sizes", [[1] * 90, [37, 1, 20, 32], [5, 85], [30] * 3], ids=["tokens", "odd", "short_long", "even"]
)
def test_chunks_store_the_pages_of_one_piece(factory: Factory, sizes: list[int]) -> None:
    pairs = random_pairs(2, sum(sizes))
    whole, chunked = factory(FULL), factory(FULL)
    feed(whole, pairs)
    feed_in_parts(chunked, pairs, sizes)
    assert [layer.pages for layer in whole.stats().layers] == [layer.pages for layer in chunked.stats().layers]
    if factory.learns:
        assert (errors(chunked, pairs) <= CHUNKED_ERROR * errors(whole, pairs) + 1e-6).all()
        return
    assert equal(decoded(whole), decoded(chunked))
    for row in range(2):
        for one, other in zip(packed_rows(whole, row), packed_rows(chunked, row), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("factory", [f for f in LOSSY if f.learns], ids=lambda factory: factory.name)
@pytest.mark.parametrize("sizes", [[100] * 7, [256, 256, 188], [140] + [1] * 560], ids=["100", "256", "decoding"])
def test_chunks_cost_at_most_a_tenth_in_divergence(factory: Factory, sizes: list[int]) -> None:
    """Codecs with statistics, at the page and window sizes people use: KL of the attention weights."""
    pairs, queries = random_pairs(1, 700), torch.randn(1, HEADS, 64, DIM) / 2
    lost = []
    for parts in ([700], sizes):
        cache = factory(FULL, page_size=64, group_size=64, residual_length=32, sink_length=4)
        feed_in_parts(cache, pairs, parts)
        lost.append(
            sum(_divergence(queries, made, held) for (made, _), (held, _) in zip(pairs, decoded(cache), strict=True))
        )
    assert lost[1] <= 1.1 * lost[0]


def _divergence(queries: torch.Tensor, keys: torch.Tensor, held: torch.Tensor) -> float:
    exact, lossy = ((queries @ k.mT / DIM**0.5).log_softmax(-1) for k in (keys, held))
    return (exact.exp() * (exact - lossy)).sum(-1).mean().item()


@every_cache
@pytest.mark.parametrize("first", [1, 60], ids=["token_by_token", "prompt"])
def test_every_page_is_packed_once(factory: Factory, first: int) -> None:
    """Counted in the codec: as many tokens were packed as are sealed, whatever else happens to the cache."""
    pairs = random_pairs(2, 120)
    cache = factory(FULL)
    part = [(keys[:, :, :1], values[:, :, :1]) for keys, values in pairs]
    feed(cache, part)
    packed: dict[tuple[int, str], int] = {}
    for index, role, codec in codecs(cache):
        codec.encode = _counted(codec.encode, packed, (index, role))
    rest = [(keys[:, :, 1:], values[:, :, 1:]) for keys, values in pairs]
    feed_in_parts(cache, rest, [first] + [1] * (119 - first))
    decoded(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-3)
    decoded(cache)
    sealed = {layer.layer: layer.tokens_sealed for layer in cache.stats().layers}
    assert all(count > 0 for count in sealed.values())
    for (index, _), tokens in packed.items():
        assert tokens == sealed[index]
    assert len(packed) == 2 * LAYERS


def _counted(encode: Any, packed: dict, key: Any) -> Any:
    def counting(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        packed[key] = packed.get(key, 0) + x[..., 0].numel() // HEADS  # [B, H, 1, T, D]: tokens of all rows
        return encode(x, *args, **kwargs)

    return counting


# -- bytes -------------------------------------------------------------------------------------------------------------


@every_cache
@pytest.mark.parametrize("config", [FULL, SLIDING, None], ids=["full", "sliding", "no_config"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_nbytes_is_what_the_tensors_hold(factory: Factory, config: Any, padded: bool) -> None:
    if config is None and factory.needs_config:
        with pytest.raises(ValueError, match="config"):
            factory(config)
        return
    cache = factory(config)
    for tokens in (1, 19, 50):
        feed(cache, random_pairs(2, tokens), _mask(cache.get_seq_length() + tokens) if padded else None)
        assert cache.nbytes == held_bytes(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.nbytes == held_bytes(cache)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.nbytes == held_bytes(cache)
    decoded(cache)
    assert cache.nbytes == held_bytes(cache), "reading leaves nothing behind"


def _mask(tokens: int) -> torch.Tensor:
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :7] = 0
    return mask


@every_cache
@pytest.mark.parametrize("tokens", [100, 700, 1500])
def test_bytes_do_not_exceed_the_formula_by_more_than_the_stated_slack(factory: Factory, tokens: int) -> None:
    """Formula: exact tokens in the model's dtype, sealed ones at the codec's bits. Slack: see below."""
    cache = factory(FULL)
    feed(cache, random_pairs(1, tokens))
    stats = cache.stats()
    exact_token = HEADS * 2 * DIM * 4
    for layer, held in zip(stats.layers, cache.layers, strict=True):
        exact = (layer.tokens_stored - layer.tokens_sealed) * exact_token
        bits = sum(codec.bits(128) for _, _, codec in (c for c in codecs(cache) if c[0] == layer.layer))
        statistics = sum(
            field.bits_per_token(1) / 8 * HEADS
            for _, _, codec in (c for c in codecs(cache) if c[0] == layer.layer)
            for field in codec.fields.values()
            if field.tokens is None
        )
        formula = exact + layer.tokens_sealed * HEADS * DIM * bits / 8 + statistics  # the last segment may be short
        slab = 512 * HEADS * DIM * bits / 8  # room for pages is made 512 tokens at a time
        window = (SINKS + RESIDUAL + 2 * PAGE) * exact_token  # room of the exact window
        assert layer.bytes_used <= formula + 1024
        assert layer.bytes_held <= formula + slab + window + 1024, f"layer {layer.layer} of {held}"
    assert stats["nbytes"] == cache.nbytes == sum(layer.bytes_held for layer in stats.layers)
