"""Rows of a padded batch whose prompts are longer than a sliding window: the first tokens of each are never packed."""

import pytest
import torch

import hf_kvcompress as kvc

from .conformance.state import SLIDING, decoded, feed, random_pairs
from .conformance.zoo import WINDOW


@pytest.mark.parametrize("codec", ["eqrot4", "eqrot2", "kivi2", "int8"])
def test_rows_that_begin_to_pack_at_different_tokens_store_what_they_store_alone(codec):
    tokens, lengths = 700, (700, 560, 430)  # each row skips other segments than the one before
    pairs, mask = random_pairs(len(lengths), tokens), torch.zeros(len(lengths), tokens, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, tokens - length :] = 1
    small = {"page_size": 8, "group_size": 8, "residual_length": 8}
    batch = kvc.CompressedCache(SLIDING, codec=codec, **small)
    feed(batch, pairs, mask)
    for row, length in enumerate(lengths):
        alone = kvc.CompressedCache(SLIDING, codec=codec, **small)
        own = [(keys[row : row + 1, :, -length:], values[row : row + 1, :, -length:]) for keys, values in pairs]
        feed(alone, own, torch.ones(1, length, dtype=torch.long))
        for held, by_itself in zip(decoded(batch), decoded(alone), strict=True):
            for in_batch, one in zip(held, by_itself, strict=True):
                assert not in_batch[row].isnan().any()
                seen = slice(-(WINDOW - 1), None)  # what the next query sees
                assert torch.equal(in_batch[row : row + 1, :, seen], one[:, :, seen])
