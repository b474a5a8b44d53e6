"""Shared pages used packed give what they give decoded: products of a few numbers are turned, not the pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.clustered import attending
from hf_kvcompress.clustered.attending import FEW, Shared
from hf_kvcompress.clustered.frozen import SharedSlab
from hf_kvcompress.rotary import Rotary

from ..calibrated import calibration_of
from ..conformance.factories import SMALL
from .helpers import DIM, HEADS, PAGE, ROTARY, content, make_store, put
from .test_cache import MODEL, cpac, random_ids, read_prompt, repeating, shares


def check(pages: Any, at_least: int = 1) -> dict[str, set[int]]:
    """Compare every shared slab; returns the bits and the distances to their bases of what was compared."""
    seen: dict[str, set[int]] = {"bits": set(), "back": set()}
    checked = 0
    for slab in pages.slabs:
        if not isinstance(slab, SharedSlab):
            continue
        filled = min(max(pages.counts) - slab.start, slab.capacity)
        for tokens in {filled, max(filled - 3, 1)}:
            for role, pool in slab.pools.items():
                shared = Shared(pages, slab, role, tokens)
                dense = pages.decode(role, slab, tokens)
                there = (shared.table >= 0).repeat_interleave(PAGE, 1)[:, :tokens].view(*dense.shape[:2], 1, -1)
                if not shared.is_read_packed:
                    continue
                if role == "key":
                    q = torch.randn(*dense.shape[:2], 3, dense.shape[-1])
                    got, expected = shared.scores(q) * there, q @ dense.mT * there
                else:
                    p = torch.rand(*dense.shape[:2], 3, tokens) * there
                    got, expected = shared.mix(p), p @ dense
                assert (got - expected).norm() <= 2e-6 * expected.norm() + 1e-6
                checked += 1
                seen["bits"] |= {group.nbits for group in pool.groups}
                seen["back"] |= {group.back for group in pool.groups}
    assert checked >= at_least
    return seen


@pytest.mark.parametrize("codec", ["int4", "eqrot4", "eqrot2", "turbo3", "kivi4"])
@pytest.mark.parametrize("scaling", [1.0, 1.3], ids=["rope", "yarn"])
def test_differences_and_spans_in_other_slabs(codec: str, scaling: float) -> None:
    rotary = Rotary(ROTARY.frequencies, scaling=scaling)
    store = make_store(codec, batch=2, rotary=rotary, level=3)
    both = [content(800, seed) for seed in (1, 2)]
    keys, values = (torch.stack([pair[i] for pair in both]) for i in (0, 1))
    for x in (keys, values):
        x[:, :, 410:790] = x[:, :, 10:390] + 0.02 * torch.randn(2, HEADS, 380, DIM)
    put(store, [0, 1], keys[:, :, :600], values[:, :, :600], rotary)
    put(store, [0], keys[:1, :, 600:], values[:1, :, 600:], rotary)  # the other row has no page there
    seen = check(store, 4)
    assert seen["back"] - {0} and seen["bits"] & {1, 2, 3}


def test_rows_that_read_pages_with_many_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row refers to pages of several others: more statistics in a lane than get a run of their own."""
    texts = [random_ids(1, 64, seed=seed) for seed in range(4)]
    begin = random_ids(4, 16, seed=9)
    rows = [texts[:1] + texts[1:2] + texts[2:3], texts[:1] + texts[3:4] + texts[2:3], texts[1:4], texts[3:4] * 3]
    ids = torch.cat([begin, torch.stack([torch.cat(row, dim=1)[0] for row in rows])], dim=1)
    cache = read_prompt(cpac(MODEL.config, codec="eqrot4", frame="unrotated", use_importance_weighting=False), ids)
    assert shares(cache) > 50
    for owners in (2, 1):
        monkeypatch.setattr(attending, "_OWNERS", owners)
        check(cache.layers[0].storage.pages)
    template = random_ids(1, 120, seed=5).repeat(3, 1)
    template[:, 90:] = random_ids(3, 30, seed=6)
    cache = read_prompt(cpac(MODEL.config, codec="eqrot4", residual_length=1), template)
    pool = cache.layers[0].storage.pages.slabs[0].pools["key"]
    assert len(pool.plain_statistics[pool.table[1, 0].clamp(min=0).long()].unique()) == 2
    check(cache.layers[0].storage.pages)


@pytest.mark.parametrize("keys", ["pca4", "pca2"])
def test_codecs_that_must_know_positions(keys: str) -> None:
    settings = {**SMALL, "keys": keys, "values": "eqrot4", "calibration": calibration_of(MODEL)}
    cache = read_prompt(kvc.CPACCache(MODEL.config, **settings), repeating(2))
    assert check(cache.layers[0].storage.pages)["bits"]


def test_a_decode_step_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries use the packed pages; many, and differences with a gain, are decoded as before."""
    cache = read_prompt(cpac(MODEL.config, use_importance_weighting=False), repeating(2))
    pages = cache.layers[0].storage.pages
    decoded: list[int] = []
    monkeypatch.setattr(SharedSlab, "decode", lambda *given: decoded.append(1))
    for slab in pages.slabs:
        if isinstance(slab, SharedSlab):
            run, filled = pages.run_of(slab, slab.capacity), slab.capacity
            assert run["key"].scores(torch.randn(2, 2, FEW, 64), {}).shape == (2, 2, FEW, filled)
            assert run["value"].mix(torch.rand(2, 2, FEW, filled), {}).shape == (2, 2, FEW, 64)
            assert not decoded
            with pytest.raises(AttributeError):
                run["key"].scores(torch.randn(2, 2, FEW + 1, 64), {})
            assert decoded.pop()
