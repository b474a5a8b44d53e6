"""What the conformance tests share: running a way of generating under an attention, and comparing outcomes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

import hf_kvcompress as kvc

from .factories import KVCOMPRESS, Factory
from .generation import MODES, MakeCache, Outcome, rows_alone
from .zoo import ENTRIES, Entry

TOLERANCE = 1e-5
BY_NAME = {entry.name: entry for entry in ENTRIES}


def attentions(entry: Entry) -> tuple[str, ...]:
    """Plain attentions of a model and ours."""
    return (*entry.attentions, KVCOMPRESS)


@contextmanager
def attention(entry: Entry, name: str) -> Iterator[Any]:
    """The entry's model under a plain attention, or under ours."""
    model = entry.model
    if name == KVCOMPRESS:
        with kvc.enable(model):
            yield model
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def dynamic_cache(entry: Entry) -> Any:
    """What `generate` would make by itself."""
    config = entry.model.config
    if entry.kind == "encoder_decoder":
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def maker(entry: Entry, factory: Factory, **settings: Any) -> MakeCache:
    """`make()` for the ways of generating: an empty cache of this kind, inside an EncoderDecoderCache where needed."""
    config = entry.model.config

    def make() -> Any:
        cache = factory(config, **settings)
        if entry.kind != "encoder_decoder":
            return cache
        cross = factory(config, **settings) if entry.cross == "same" else DynamicCache(config=config)
        return EncoderDecoderCache(cache, cross)

    return make


@functools.cache
def reference(entry_name: str, mode: str, attention_name: str) -> Outcome:
    """What DynamicCache gives; ours is compared with the model's own default attention."""
    entry = BY_NAME[entry_name]
    with attention(entry, entry.attentions[0] if attention_name == KVCOMPRESS else attention_name) as model:
        return MODES[mode](entry, model, lambda: dynamic_cache(entry))


@functools.cache
def reference_rows(entry_name: str, attention_name: str) -> list[Outcome]:
    """What DynamicCache gives for each row of the left-padded batch by itself."""
    entry = BY_NAME[entry_name]
    with attention(entry, entry.attentions[0] if attention_name == KVCOMPRESS else attention_name) as model:
        return rows_alone(entry, model, lambda: dynamic_cache(entry))


def assert_same(ours: Outcome, expected: Outcome, tolerance: float = TOLERANCE) -> None:
    """Equal tokens and logits within `tolerance`."""
    assert ours.logits.shape == expected.logits.shape
    assert not ours.logits.isnan().any()
    error = (ours.logits - expected.logits).abs().max().item()
    assert error <= tolerance, f"logits differ by {error:.2e}, at most {tolerance:.0e} expected"
    torch.testing.assert_close(ours.tokens, expected.tokens, rtol=0, atol=0)


def self_attention(cache: Any) -> Any:
    """Our cache inside an EncoderDecoderCache, or the cache itself."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
