"""Gathering packed tokens by the kernel: the bytes that torch gathers, for every codec that packs tokens singly."""

import pytest
import torch

from hf_kvcompress import CompressedCache
from hf_kvcompress.compaction import compact
from hf_kvcompress.ops import kernels
from hf_kvcompress.ops.gather import Layout, gather_into, gather_tokens

from ..codecs.test_gather import TOKEN_WISE, lines, make
from .mutants import caught

PAGE = 16
SIZES = [(2, PAGE), (1, 3 * PAGE), (3, 2 * PAGE)]  # lines and tokens of three parts


def packed(name, role, dim):
    """Parts with positions and mass beside the codec's fields, how they lie, and how many tokens there are."""
    codec = make(name, role, dim, page_size=PAGE, group_size=PAGE)
    with kernels.emulate(None):
        _, parts, dense = lines(codec, SIZES)
    g = torch.Generator().manual_seed(0)
    for part, size in zip(parts, SIZES, strict=True):
        part["positions"] = torch.randint(0, 999, size, generator=g, dtype=torch.int32)
        part["mass"] = torch.rand(size, generator=g)
    layouts = {**codec.layouts, "positions": Layout(absent=-1), "mass": Layout(absent=0.0)}
    return codec, parts, layouts, len(dense)


def pick(tokens, shape, seed=0):
    return torch.randint(0, tokens, shape, generator=torch.Generator().manual_seed(seed))


def check(parts, layouts, index):
    with kernels.emulate(None):
        expected = gather_tokens(parts, layouts, index, PAGE)
    got = gather_tokens(parts, layouts, index, PAGE)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].is_contiguous()
        assert torch.equal(got[name], tensor), name
    return got


@pytest.mark.parametrize(("name", "role"), TOKEN_WISE)
@pytest.mark.parametrize("dim", [20, 64])
def test_bytes_are_torchs(name, role, dim, emulated):
    codec, parts, layouts, tokens = packed(name, role, dim)
    index = pick(tokens, (3, 2 * PAGE))
    got = check(parts, layouts, index)
    assert emulated.launches == ["gather_tokens"], "one launch for all fields and parts"
    alone = codec.gather([{name: part[name] for name in codec.layouts} for part in parts], index)
    assert all(torch.equal(alone[name], got[name]) for name in codec.layouts)


@pytest.mark.parametrize("role", ["key", "value"])
def test_places_without_a_token(role, emulated):
    _, parts, layouts, tokens = packed("int3", role, 24)
    index = pick(tokens, (4, PAGE))
    index[0, 3:] = index[1, ::2] = index[2] = -1
    index[3] = tokens - 1
    got = gather_tokens(parts, layouts, index, PAGE)
    assert (got["positions"][index < 0] == -1).all() and (got["mass"][index < 0] == 0).all()
    filled = index[3:]
    again = gather_tokens(parts, layouts, filled, PAGE)
    assert all(torch.equal(again[name], got[name][3:]) for name in layouts)
    for name in ("positions", "mass"):
        every = torch.cat([part[name].flatten() for part in parts])
        assert torch.equal(got[name][index >= 0], every[index[index >= 0]])


def test_into_parts_of_given_tensors(emulated):
    _, parts, layouts, tokens = packed("eqrot4", "value", 20)
    index = pick(tokens, (2, PAGE))
    expected = gather_tokens(parts, layouts, index, PAGE)
    room = {name: torch.zeros(5, *t.shape[1:], dtype=t.dtype) for name, t in expected.items()}
    gather_tokens(parts, layouts, index, PAGE, out={name: t[2:4] for name, t in room.items()})
    for name, t in room.items():
        assert torch.equal(t[2:4], expected[name]) and not t[[0, 1, 4]].any()


def test_no_lines(emulated):
    _, parts, layouts, _ = packed("int4", "key", 20)
    got = gather_tokens(parts, layouts, torch.zeros(0, PAGE, dtype=torch.long), PAGE)
    assert all(len(t) == 0 for t in got.values()) and not emulated.launches


def test_every_schedule(scheduled):
    _, parts, layouts, tokens = packed("int3", "value", 20)
    check(parts, layouts, pick(tokens, (2, PAGE)))


def store(name, seed=0):
    """The packed pages of a cache that has sealed some tokens of two rows."""
    cache = CompressedCache(codec=name, page_size=PAGE, group_size=PAGE, residual_length=8, policy="h2o", budget=10_000)
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, 100, 20, generator=g) for _ in range(2))
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    layer.commit()
    return layer.storage.pages


@pytest.mark.parametrize(("name", "options"), [("eqrot3", {}), ("int4", {"head_budget": "adaptive", "boundary": 0.1})])
def test_rounds_of_eviction_are_the_same(name, options, emulated):
    """Selection and gathering by kernels, from the first token on."""
    found = []
    for emulator in (None, emulated):
        with kernels.emulate(emulator):
            sizes = {"page_size": PAGE, "group_size": PAGE, "residual_length": 8, "sink_length": 2}
            cache = CompressedCache(codec=name, policy="keydiff", budget=70, **sizes, **options)
            g = torch.Generator().manual_seed(0)
            for _ in range(3):
                keys, values = (torch.randn(1, 2, 50, 20, generator=g) for _ in range(2))
                cache.update(keys, values, 0)
                cache.layers[0].commit()
        found.append(cache.layers[0].storage.pages)
    assert {"select_tokens", "gather_tokens"} <= set(emulated.launches)
    with kernels.emulate(None):
        tables = [pages.table([0]) for pages in found]
        for read in (lambda pages, table: pages.look_up("positions", table, -1), lambda p, t: p.decode("key", t)):
            assert torch.equal(*map(read, found, tables))


@pytest.mark.parametrize("name", ["int4", "kivi2"])
def test_compaction_is_the_same(name, emulated):
    pages = []
    for emulator in (None, emulated):
        with kernels.emulate(None):
            own = store(name)
            table = own.table([0, 1])
        keep = torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[1] = False
        with kernels.emulate(emulator):
            compact(own, [0, 1], table, keep)
        pages.append(own)
    assert "gather_tokens" in emulated.launches
    for block, other in zip(pages[0].blocks, pages[1].blocks, strict=True):
        assert block.counts == other.counts
        present = block.positions >= 0
        assert torch.equal(block.positions, other.positions) and torch.equal(block.mass, other.mass)
        assert present.any()
    with kernels.emulate(None):
        table = pages[0].table([0, 1])
        for role in ("key", "value"):
            assert torch.equal(pages[0].decode(role, table), pages[1].decode(role, table))


def test_op_is_traced(emulated):
    fields = [torch.zeros(1, PAGE, 3), torch.zeros(2, PAGE, 3)]
    args = (pick(3 * PAGE, (2, PAGE)), fields, [torch.zeros(2, PAGE, 3)], [1], [False], [-1], PAGE)
    torch.library.opcheck(gather_into, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("after", "old", "new"),
    [
        ("place[t] = (int)", "__syncthreads();", ""),
        ("int middle", "token <", "token <="),
        ("size_t at = ", "in_page - old * step", "in_page"),
        ("byte |=", "* bits / 8", "* bits / 4"),
    ],
)
def test_planted_bugs_are_caught(after, old, new):
    with kernels.emulate(None):
        _, parts, layouts, tokens = packed("int4", "value", 20)
    index = pick(tokens, (3, 2 * PAGE))
    index[0, 0] = 2 * PAGE  # the first token of the second part
    assert caught(lambda: check(parts, layouts, index), "gather_tokens.cu", after, old, new)
