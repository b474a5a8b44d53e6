"""Any sequence of seals, row operations and crops: what was sealed is read again, bit for bit; nothing is leaked."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.clustered.frozen import SharedSlab

from .helpers import FIRST, PAGE, ROTARY, check, content, make_plain, make_store, put, read

ROWS = 3
seals = st.tuples(st.just("seal"), st.integers(1, 12), st.integers(0, 1 << 16), st.booleans())
maps = st.tuples(st.just("map"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
crops = st.tuples(st.just("crop"), st.integers(0, ROWS - 1), st.integers(0, 6))


class Model:
    """The same tokens in a list a row, exact, and as they were read first."""

    def __init__(self) -> None:
        self.exact = [torch.empty(2, 2, 0, 32) for _ in range(ROWS)]  # keys before rotation and values
        self.known = [(torch.empty(1, 2, 0, 32), torch.empty(1, 2, 0, 32)) for _ in range(ROWS)]

    def fresh(self, row: int, pages: int, seed: int, repeat: bool) -> torch.Tensor:
        """New tokens for a row; with `repeat` most are those of a place in another row or this one."""
        tokens = pages * PAGE
        new = torch.stack(content(tokens, seed))
        source = self.exact[seed % ROWS]
        if repeat and source.shape[2] > PAGE:
            start = seed % (source.shape[2] - PAGE)
            copied = source[:, :, start : start + tokens]
            skip = seed % 3
            part = copied[:, :, : max(tokens - skip, 0)]
            new[:, :, skip : skip + part.shape[2]] = part + (0.002 * torch.randn_like(part) if seed % 2 else 0)
        return new


@pytest.mark.parametrize("codec", ["int8", "eqrot4", "kivi4"])
@given(operations=st.lists(st.one_of(seals, seals, maps, crops), min_size=2, max_size=9))
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_whatever_happens(codec: str, operations: list) -> None:
    store, model = make_store(codec, ROWS), Model()
    for kind, *what in operations:
        if kind == "seal":
            pages, seed, repeat = what
            row = seed % ROWS
            alike = [r for r in range(ROWS) if store.counts[r] == store.counts[row]] if seed % 5 == 0 else [row]
            new = torch.stack([model.fresh(r, pages, seed, repeat) for r in alike])  # all rows the same: exact twins
            put(store, alike, new[:, 0], new[:, 1])
            for index, r in enumerate(alike):
                model.exact[r] = torch.cat([model.exact[r], new[index]], dim=2)
                held, before = read(store, r), model.known[r]
                for now, old in zip(held, before, strict=True):
                    assert torch.equal(now[:, :, : old.shape[2]], old)
                model.known[r] = held
                at = torch.arange(FIRST + store.counts[r] - new.shape[3], FIRST + store.counts[r])
                newest = [x[0, :, -new.shape[3] :] for x in held]
                for got, x in zip((ROTARY.undo(newest[0], at), newest[1]), new[index], strict=True):
                    assert (got - x).norm() < (0.2 if codec != "int8" else 0.02) * x.norm()
        elif kind == "map":
            (rows,) = what
            store.map_rows(torch.tensor(rows))
            model.exact, model.known = [model.exact[r] for r in rows], [model.known[r] for r in rows]
        else:
            row, pages = what
            left = max(store.counts[row] - pages * PAGE, 0)
            store.truncate(row, left)
            model.exact[row] = model.exact[row][:, :, :left]
            model.known[row] = tuple(x[:, :, :left] for x in model.known[row])
        check(store)
        for row in range(ROWS):
            if store.counts[row]:
                for now, old in zip(read(store, row), model.known[row], strict=True):
                    assert torch.equal(now, old)


@pytest.mark.parametrize("most", [2, 3, 8])
@pytest.mark.parametrize("block", [2 * PAGE, 2 * PAGE + 3])
def test_a_member_is_no_base_and_a_base_no_member(most: int, block: int) -> None:
    keys, values = (x.repeat(1, 9, 1)[None, :, : 9 * block // PAGE * PAGE] for x in content(block, 4))
    store = make_store("eqrot4", max_cluster_size=most, top_k_similar=16)
    put(store, [0], keys, values)
    check(store)
    assert store.contents()["differences"] >= 8
    at = torch.arange(FIRST, FIRST + keys.shape[2])
    got = read(store, 0)
    for found, x in zip((ROTARY.undo(got[0], at), got[1]), (keys, values), strict=True):
        assert (found - x).norm() < 0.2 * x.norm()
    sizes: Counter = Counter()
    for place, slab in enumerate(store.slabs):
        for group in slab.pools["value"].groups if isinstance(slab, SharedSlab) else ():
            sizes.update((place - group.back, entry) for entry in group.base[:, 0].tolist())
    assert 1 <= max(sizes.values()) <= most - 1


@pytest.mark.parametrize("local", [False, True])
def test_a_sliding_layer_drops_members_with_their_bases(local: bool) -> None:
    keys, values = content(64, 1)
    keys, values = (torch.cat([x, x, content(256, 2)[0]], dim=1)[None] for x in (keys, values))
    store = make_store("eqrot4", local=local)
    put(store, [0], keys, values)
    assert store.shares
    before = read(store, 0)
    if local:
        store.drop_before(128)
        check(store)
        assert not store.shares and store.slabs[0].start == 128
        got = store.decode("key", store.slabs[0], 128)
        assert torch.equal(got, before[0][:, :, 128:256])


@pytest.mark.parametrize("codec", ["int8", "eqrot4", "eqrot2", "kivi2"])
def test_what_repeats_nothing_is_stored_as_a_page_store_does(codec: str) -> None:
    keys, values = (x[None] for x in content(600, 3))
    store, plain = make_store(codec), make_plain(codec)
    for start, end in ((0, 400), (400, 408), (408, 600)):
        for own in (store, plain):
            put(own, [0], keys[:, :, start:end], values[:, :, start:end])
    assert not store.shares
    for a, b in zip(read(store, 0), read(plain, 0), strict=True):
        assert torch.equal(a, b)
    assert store.used_bytes() == plain.used_bytes()
    assert store.index.nbytes <= 600 * 8 / 8


def test_statistics_go_with_their_rows() -> None:
    keys, values = (torch.stack([x, 3 * x]) for x in content(40, 5))
    keys, values = (torch.cat([x, x], dim=2) for x in (keys, values))
    store = make_store("eqrot4", batch=2)
    put(store, [0, 1], keys, values)
    assert store.shares
    before = [slab.packed("key") for slab in store.slabs]
    store.map_rows(torch.tensor([1, 0]))
    for slab, old in zip(store.slabs, before, strict=True):
        for name, tensor in slab.packed("key").items():
            assert torch.equal(tensor, old[name][[1, 0]] if isinstance(slab, SharedSlab) else tensor)
            assert not torch.equal(old[name][0], old[name][1])
