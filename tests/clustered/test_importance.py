"""Pages that matter: found by attention or by size, and never coded much worse than the codec would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.clustered import importance
from hf_kvcompress.clustered.frozen import SharedSlab
from hf_kvcompress.clustered.importance import NEWEST_PAGES, important_pages, newest_queries
from hf_kvcompress.clustered.search import Pass

from .helpers import DIM, HEADS, PAGE, content, make_plain, make_store, put, read
from .test_cache import MODEL, cpac, read_prompt, repeating


def a_pass(pages: int = 40, queries: Any = None) -> Pass:
    keys, values = content(pages * PAGE, seed=3)
    return Pass([0], 0, pages * PAGE, {"key": keys[None], "value": values[None]}, None, queries)


def test_large_values_matter_where_no_queries_are_known() -> None:
    run = a_pass()
    run.exact["value"][:, 1, 5 * PAGE : 6 * PAGE] *= 2
    found = important_pages(run, PAGE)
    assert found.sum(2).tolist() == [[found[0, 0].sum(), found[0, 1].sum()]] and found.sum() <= 2 * (5 + NEWEST_PAGES)
    assert found[0, 1, 5] and found[:, :, -NEWEST_PAGES:].all()


def test_attention_decides_where_queries_are_known() -> None:
    """Heads of a group add up; a row's queries speak for its own pages."""
    run = a_pass()
    wanted = run.exact["key"][0, :, 8 * PAGE : 9 * PAGE].mean(1)  # [H, D]
    run.exact["value"][:, :, 20 * PAGE : 21 * PAGE] *= 9
    run.queries = [wanted.repeat_interleave(2, 0)[:, None].expand(2 * HEADS, 5, DIM) * 3]
    found = important_pages(run, PAGE)
    assert found[0, :, 8].all()
    run.queries = None
    assert important_pages(run, PAGE)[0, :, 20].all()


def test_the_newest_queries_of_each_row_are_scaled_and_no_padding() -> None:
    queries = torch.randn(2, 4, 50, DIM)
    kept = [torch.arange(50), torch.arange(40, 50)]
    first, second = newest_queries(queries, 0.5, kept)
    assert first is not None and second is not None
    assert torch.equal(first, queries[0, :, -32:] * 0.5) and torch.equal(second, queries[1, :, 40:] * 0.5)
    assert newest_queries(queries, 0.5, [torch.arange(50), torch.arange(0)])[1] is None


def test_the_attention_at_work_shows_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    look = importance._attention
    monkeypatch.setattr(importance, "_attention", lambda run: shown.append(run.queries) or look(run))
    cache = read_prompt(cpac(MODEL.config), repeating(2))
    assert len(shown) >= 2 and all(len(own) == 2 and own[0].shape == (4, 32, 64) for own in shown)
    assert all(layer.storage.pages.newest is None for layer in cache.layers)
    shown.clear()
    read_prompt(cpac(MODEL.config, use_importance_weighting=False), repeating(2))
    with torch.no_grad():
        MODEL(repeating(2), past_key_values=kvc.CPACCache(MODEL.config))  # a plain attention shows none
    assert not shown


def test_what_matters_is_read_better_than_the_codec_would_or_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in 0 bits is as good as the codec: enough for most pages, and for none that matters."""
    keys, values = content(40 * PAGE, seed=1)
    values[:, 20 * PAGE :] = values[:, : 20 * PAGE]
    plain, bits, worst = make_plain("int4"), {}, {}
    put(plain, [0], keys[None], values[None])
    for share in (1.0, 1 / 40):
        monkeypatch.setattr(importance, "SHARE", share)
        store = make_store("int4", level=3)
        put(store, [0], keys[None], values[None])
        pair = [(read(own, 0)[1][0] - values).square().unflatten(1, (-1, PAGE)).sum((2, 3)) for own in (store, plain)]
        shared = [slab.pools["value"] for slab in store.slabs if isinstance(slab, SharedSlab)]
        assert shared
        bits[share] = {group.nbits for pool in shared for group in pool.groups}
        worst[share] = float((pair[0] / pair[1])[:, 20:].max())
    assert 0 in bits[1 / 40] and 0 not in bits[1.0] and bits[1.0]
    assert worst[1.0] <= 0.7501 < worst[1 / 40] <= 1.0101
