"""Rounding keys with error feedback: what it gains, and that rows stay independent of each other."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import causal_mask_function

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.masks import kvcompress_mask

CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)


def draw(batch, tokens, seed=0):
    """Queries that lie mostly in a few directions, as real ones do, and keys with unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4, 6, 64, generator=generator)
    queries = torch.randn(batch, 4, tokens, 6, generator=generator) @ directions
    queries = queries + 0.3 * torch.randn(batch, 4, tokens, 64, generator=generator)
    spread = torch.rand(2, 1, 64, generator=generator) * 3 + 0.2
    keys = torch.randn(batch, 2, tokens, 64, generator=generator) * spread + spread
    return queries, keys, torch.randn(batch, 2, tokens, 64, generator=generator)


@pytest.mark.parametrize("name, gain", [("eqrot3", 0.8), ("eqrot2", 0.8)])
def test_scores_of_such_queries_are_closer(name, gain):
    queries, keys, _ = draw(1, 512)
    codec = make_codec(name, "key", 64)
    own = queries.view(1, 2, -1, 64)
    segment = codec.begin_segment(keys[:, :, None], own.square().mean(2)[:, :, None])
    moment = own.mT @ own / own.shape[2]
    errors = []
    for given in (moment, None):
        decoded = codec.decode({**segment, **codec.encode(keys[:, :, None], segment, given)})[:, :, 0]
        errors.append(float((own @ (decoded - keys).mT).norm()))
    assert errors[0] < gain * errors[1]


class Module(torch.nn.Module):
    num_key_value_groups, is_causal, layer_idx = 2, True, 0


def stored(queries, keys, values, pads):
    """The packed pages of one layer after a prompt whose rows begin with `pads` padding tokens."""
    cache, (batch, _, tokens, _) = kvc.CompressedCache(CONFIG, preset="tiny"), keys.shape
    padding = torch.arange(tokens)[None] >= torch.tensor(pads)[:, None]
    mask = kvcompress_mask(
        batch_size=batch, q_length=tokens, kv_length=tokens, q_offset=cache.get_query_offset(0), kv_offset=0,
        mask_function=causal_mask_function, attention_mask=padding, device="cpu",
    )  # fmt: skip
    kvcompress_attention(Module(), queries, *cache.update(keys, values, 0), mask)
    return cache


def test_a_padded_row_is_stored_as_it_is_alone():
    queries, keys, values = draw(3, 300)
    pads = [0, 41, 130]
    batch = stored(queries, keys, values, pads).layers[0].storage
    for row, pad in enumerate(pads):
        only = [x[row : row + 1, :, pad:] for x in (queries, keys, values)]
        alone = stored(*only, [0]).layers[0].storage
        count = alone.pages.counts[0]
        assert batch.pages.counts[row] == count > 100
        for ours, own in zip(batch.pages.read_row(row, 0, count), alone.pages.read_row(0, 0, count), strict=True):
            assert torch.equal(ours, own)


def test_queries_are_let_go_once_the_pass_is_stored():
    cache = stored(*draw(1, 300), [0])
    assert cache.layers[0].storage.queries.newest is None


def test_degenerate_queries_and_keys_stay_finite():
    codec = make_codec("eqrot2", "key", 64)
    for keys in (torch.zeros(1, 1, 1, 64, 64), torch.ones(1, 1, 1, 64, 64), torch.full((1, 1, 1, 64, 64), 1e30)):
        for moment in (
            torch.zeros(1, 1, 64, 64),
            torch.full((1, 1, 64, 64), 1e-30),
            torch.eye(64).expand(1, 1, 64, 64) * 1e20,
        ):
            segment = codec.begin_segment(keys)
            assert codec.decode({**segment, **codec.encode(keys, segment, moment)}).isfinite().all()
