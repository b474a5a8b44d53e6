"""The tier in host memory: bounds that hold, and queries that choose their pages by themselves."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.host_tier import bounds_of
from hf_kvcompress.tiers import Tail

from ..conformance.factories import SMALL
from ..tiny_model import tiny_llama


def cache_with_tail(model: torch.nn.Module, length: int = 160) -> kvc.CompressedCache:
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(1))
    cache = kvc.CompressedCache(
        model.config, codec="int8", policy="h2o", budget=40, demote_to="cpu", fetch_pages=2, **SMALL
    )
    with kvc.enable(model), torch.no_grad():
        model(ids, past_key_values=cache)
        cache.commit()
    return cache


def tails(cache: kvc.CompressedCache) -> list[Tail]:
    return [layer.storage.tail for layer in cache.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_are_never_inside_what_they_bound(dtype: torch.dtype) -> None:
    """They are kept in bfloat16, so they are rounded outwards."""
    cache = cache_with_tail(tiny_llama().to(dtype))
    for tail in tails(cache):
        assert tail.pages.blocks
        for block in tail.pages.blocks:
            keys = tail.pages.codecs["key"].decode(tail.pages.packed(block, "key")).flatten(1, 3)
            pages = keys.unflatten(1, (-1, tail.pages.page_size))
            held = (block.positions >= 0).unflatten(1, (-1, tail.pages.page_size))[..., None]
            bounds = bounds_of(block)
            low, high = bounds.low.float()[:, :, None], bounds.high.float()[:, :, None]
            assert bool(((pages >= low) | ~held).all()) and bool(((pages <= high) | ~held).all())
            assert bool((bounds.high.float() - pages.amax(2) < 0.01 * pages.abs().amax() + 1e-6).all())


def test_what_a_token_reads_does_not_depend_on_those_behind_it() -> None:
    model = tiny_llama()
    cache = cache_with_tail(model)
    ids = torch.randint(0, 64, (1, 6), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 3:] = torch.randint(0, 64, (1, 3), generator=torch.Generator().manual_seed(3))
    with kvc.enable(model), torch.no_grad():
        one, two = (model(x, past_key_values=copy.deepcopy(cache)).logits for x in (ids, other))
        steps = copy.deepcopy(cache)
        steps.activate_past_recording()
        alone = model(ids[:, :1], past_key_values=steps).logits
    torch.testing.assert_close(one[:, :3], two[:, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(one[:, :1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(one[:, 3:], two[:, 3:], atol=1e-3)


def test_a_draft_that_is_taken_back_marks_no_page_as_read() -> None:
    model = tiny_llama()
    cache = cache_with_tail(model)
    cache.activate_past_recording()

    def hot() -> list[torch.Tensor]:
        return [bounds_of(block).hot.clone() for tail in tails(cache) for block in tail.pages.blocks]

    for tail in tails(cache):
        for block in tail.pages.blocks:
            bounds_of(block).hot.zero_()
    ids = torch.randint(0, 64, (1, 5), generator=torch.Generator().manual_seed(2))
    with kvc.enable(model), torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-5)
        assert not any(bool(own.any()) for own in hot())
        model(ids[:, :2], past_key_values=cache)
        cache.crop(-1)
        cache.commit()  # one token seals no page, so no round of eviction takes the marks back
    assert any(bool(own.any()) for own in hot())
