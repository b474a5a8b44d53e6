"""Rows of a cache that evicts: independent of padding and of each other, selected, copied and counted as they are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_kvcompress as kvc

from ..conformance.factories import EVICTING, EVICTING_FEW, PAGE, SMALL, TIGHT, Factory
from ..conformance.state import (
    DIM,
    FULL,
    HEADS,
    SLIDING,
    Held,
    Pairs,
    feed,
    feed_in_parts,
    held,
    held_bytes,
    random_pairs,
)

every_cache = pytest.mark.parametrize("factory", EVICTING, ids=lambda factory: factory.name)
few_caches = pytest.mark.parametrize("factory", EVICTING_FEW, ids=lambda factory: factory.name)
LENGTH = 70


def filled(factory: Factory, rows: int = 3, config: Any = FULL) -> Any:
    cache = factory(config)
    feed_in_parts(cache, random_pairs(rows, LENGTH), [LENGTH - 9, 1, 8])
    return cache


def assert_same_row(one: list[Held], other: list[Held], exactly: bool = True, shift: int = 0) -> None:
    """Equal positions (`shift` apart), keys and values; mass too, up to rounding if not `exactly`."""
    for a, b in zip(one, other, strict=True):
        moved = torch.where(b.positions < 0, b.positions, b.positions + shift)
        assert a.positions.tolist() == moved.tolist()
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        if a.mass is not None:
            rounding = 0 if exactly else 1e-4
            torch.testing.assert_close(a.mass, b.mass, rtol=rounding, atol=rounding)


def assert_rows(cache: Any, rows: list[list[Held]]) -> None:
    for row, expected in enumerate(rows):
        assert_same_row(held(cache, row), expected)


# -- padding -----------------------------------------------------------------------------------------------------------


@every_cache
@pytest.mark.parametrize("sizes", [[9, 40, 1, 1, 19]], ids=str)
def test_a_padded_row_keeps_what_it_keeps_alone(factory: Factory, sizes: list[int]) -> None:
    """Padding takes no slot and moves no boundary; each row is judged by its own scores. A row may begin late."""
    lengths = (70, 47, 58)
    pairs = random_pairs(len(lengths), sum(sizes))
    mask = torch.stack([torch.arange(sum(sizes)) >= sum(sizes) - length for length in lengths]).long()
    batch = factory(FULL)
    feed_in_parts(batch, pairs, sizes, mask)
    for row, length in enumerate(lengths):
        alone, padding = factory(FULL), sum(sizes) - length
        feed_in_parts(alone, *without_padding(pairs, row, padding, sizes))
        found = held(batch, row)
        assert_same_row(found, held(alone), exactly=False, shift=padding)
        assert all(min(layer.of_head(head)) >= padding for layer in found for head in range(len(layer.positions)))


def without_padding(pairs: Pairs, row: int, padding: int, sizes: list[int]) -> tuple[Pairs, list[int]]:
    """The same tokens of one row, cut where the batch was cut."""
    own, cut = [tuple(x[row : row + 1, :, padding:] for x in pair) for pair in pairs], []
    for size in sizes:
        skipped = min(padding, size)
        padding -= skipped
        cut += [size - skipped] * (size > skipped)
    return own, cut


@few_caches
def test_a_batch_of_equal_rows_equals_the_rows_alone(factory: Factory) -> None:
    pairs = random_pairs(2, LENGTH)
    batch = factory(FULL)
    feed_in_parts(batch, pairs, [40, 30])
    for row in range(2):
        alone = factory(FULL)
        feed_in_parts(alone, [tuple(x[row : row + 1] for x in pair) for pair in pairs], [40, 30])
        assert_same_row(held(batch, row), held(alone), exactly=False)


# -- selecting and copying ---------------------------------------------------------------------------------------------

OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select_by_mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
}


@few_caches
@pytest.mark.parametrize("operation, order", OPERATIONS.values(), ids=list(OPERATIONS))
def test_rows_move_as_they_are_and_go_on_as_before(factory: Factory, operation: Any, order: list[int]) -> None:
    cache, untouched = filled(factory), filled(factory)
    operation(cache)
    assert_rows(cache, [held(untouched, row) for row in order])
    assert cache.nbytes == held_bytes(cache)
    more = random_pairs(3, 3 * PAGE, seed=5)
    feed(untouched, more)
    feed(cache, [tuple(x[order] for x in pair) for pair in more])
    for row, old in enumerate(order):
        assert_same_row(held(cache, row), held(untouched, old), exactly=False)


@few_caches
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_hold_the_same_and_go_their_own_way(factory: Factory, copied: Any) -> None:
    cache = filled(factory)
    before = [held(cache, row) for row in range(3)]
    other = copied(cache)
    assert type(other) is type(cache) and other.nbytes == cache.nbytes
    assert_rows(other, before)
    more = random_pairs(3, 3 * PAGE, seed=5)
    feed(other, more)
    changed = [held(other, row) for row in range(3)]
    assert_rows(cache, before)
    feed(cache, more)
    assert_rows(cache, changed)


@few_caches
def test_reset_starts_from_nothing(factory: Factory) -> None:
    cache = filled(factory)
    expected = [held(cache, row) for row in range(3)]
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    feed_in_parts(cache, random_pairs(3, LENGTH), [LENGTH - 9, 1, 8])
    assert_rows(cache, expected)


@few_caches
def test_interleaved_caches_do_not_interact(factory: Factory) -> None:
    pairs = [random_pairs(1, LENGTH, seed) for seed in (1, 2)]
    separate = [filled_with(factory(FULL), own) for own in pairs]
    together = [factory(FULL), factory(FULL)]
    for start, end in ((0, 40), (40, 41), (41, 70)):
        for cache, own in zip(together, pairs, strict=True):
            feed(cache, [tuple(x[:, :, start:end] for x in pair) for pair in own])
    for cache, alone in zip(together, separate, strict=True):
        assert_same_row(held(cache), held(alone))


def filled_with(cache: Any, pairs: Pairs) -> Any:
    feed_in_parts(cache, pairs, [40, 1, 29])
    return cache


@few_caches
def test_what_is_read_stands_where_it_was(factory: Factory) -> None:
    """Keys and values as a dense tensor of all positions, zeros where a head holds nothing."""
    cache = filled(factory, rows=2)
    dense = [keys_and_values[:2] for keys_and_values in cache]
    for row in range(2):
        for kept, (keys, values) in zip(held(cache, row), dense, strict=True):
            assert keys.shape == values.shape == (2, HEADS, LENGTH, DIM)
            for head in range(HEADS):
                at, here = kept.of_head(head), kept.positions[head] >= 0
                assert torch.equal(keys[row, head, at], kept.keys[head, here])
                assert torch.equal(values[row, head, at], kept.values[head, here])
                gone = sorted(set(range(LENGTH)) - set(at))
                if factory.name not in ("demoting", "to-host", "three-tiers"):
                    assert gone and not keys[row, head, gone].any()


# -- bytes -------------------------------------------------------------------------------------------------------------


def passes(rows: int) -> Iterator[tuple[Pairs, torch.Tensor]]:
    length = 0
    for tokens in (1, 19, 50):
        length += tokens
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, :7] = 0
        yield random_pairs(rows, tokens), mask


@few_caches
@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_nbytes_is_what_the_tensors_hold(factory: Factory, config: Any) -> None:
    cache = factory(config)
    for pairs, mask in passes(2):
        feed(cache, pairs, mask)
        assert cache.nbytes == held_bytes(cache)
        stats = cache.stats()
        assert stats["nbytes"] == sum(layer.bytes_held for layer in stats.layers)
        assert 0 <= stats["slack_bytes"] < stats["nbytes"]
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes == held_bytes(cache)
    for layer in cache.layers:
        assert layer.dense("key").shape[2] > 0
    assert cache.nbytes == held_bytes(cache), "reading leaves nothing behind"


@pytest.mark.parametrize("codec", ["identity", "eqrot4"])
def test_a_cache_without_a_config_keeps_what_one_with_it_keeps(codec: str) -> None:
    cache, other = (kvc.CompressedCache(own, codec=codec, policy="h2o", budget=TIGHT, **SMALL) for own in (None, FULL))
    for pairs, mask in passes(2):
        for one in (cache, other):
            feed(one, pairs, mask)
        assert_rows(cache, [held(other, row) for row in range(2)])
    assert cache.nbytes == other.nbytes
