"""What every lossy cache must keep to: causality, ragged rows, independence, and attention over what is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from .factories import EVICTING, EVICTING_FEW, LOSSY, PAGE, RESIDUAL, SINKS, Factory
from .generation import MODES, NEW_TOKENS, PADDED_LENGTHS, Outcome, rows_alone
from .helpers import BY_NAME, KVCOMPRESS, TOLERANCE, assert_same, attention, maker
from .prompts import text_ids
from .state import FULL, LAYERS, decoded, equal, feed, feed_in_parts, packed_rows, random_pairs
from .zoo import Entry

MOST = LOSSY + EVICTING_FEW
every_cache = pytest.mark.parametrize("factory", LOSSY, ids=lambda factory: factory.name)


def on(*names: str, attentions: tuple[str, ...] = (KVCOMPRESS,), mode: str = "greedy", factories: Any = MOST):
    """These caches on these models under these attentions, where they can do this way of generating."""
    cases = [
        pytest.param(factory, BY_NAME[name], attention_name, id=f"{factory.name}-{name}-{attention_name}")
        for factory in factories
        for name in names
        for attention_name in attentions
        if factory.runs_on(name) and factory.runs_under(attention_name, mode)
    ]
    return pytest.mark.parametrize("factory, entry, attention_name", cases)


# -- rows --------------------------------------------------------------------------------------------------------------


@on("llama", "gemma3", "deepseek_v3", "whisper", mode="left_padded", factories=LOSSY + EVICTING)
def test_row_of_a_padded_batch_gives_the_logits_of_the_row_alone(
    factory: Factory, entry: Entry, attention_name: str
) -> None:
    with attention(entry, attention_name) as model:
        batch = MODES["left_padded"](entry, model, maker(entry, factory))
        alone = rows_alone(entry, model, maker(entry, factory))
    for row in range(len(PADDED_LENGTHS)):
        own = Outcome(batch.tokens[row : row + 1, -NEW_TOKENS:], batch.logits[:, row : row + 1])
        assert_same(own, Outcome(alone[row].tokens[:, -NEW_TOKENS:], alone[row].logits))


@every_cache
@pytest.mark.parametrize("sizes", [[70], [9, 40, 21], [50] + [1] * 20], ids=["at_once", "chunks", "decoding"])
def test_row_of_a_padded_batch_stores_bit_for_bit_what_the_row_alone_stores(factory: Factory, sizes: list[int]) -> None:
    """Padding takes no slot: pages and sinks count real tokens. A row may begin after the first chunk."""
    tokens, lengths = sum(sizes), (70, 47, 58)
    pairs = random_pairs(len(lengths), tokens)
    mask = torch.zeros(len(lengths), tokens, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, tokens - length :] = 1
    batch = factory(FULL)
    feed_in_parts(batch, pairs, sizes, mask)
    for row, length in enumerate(lengths):
        alone = factory(FULL)
        feed_in_parts(alone, *_without_padding(pairs, row, length, sizes))
        for in_batch, by_itself in zip(packed_rows(batch, row), packed_rows(alone, 0), strict=True):
            torch.testing.assert_close(in_batch, by_itself, rtol=0, atol=0)
        for held, own in zip(decoded(batch), decoded(alone), strict=True):
            for in_batch, by_itself in zip(held, own, strict=True):
                assert torch.equal(in_batch[row : row + 1, :, -length:], by_itself)


def _without_padding(pairs, row: int, length: int, sizes: list[int]):
    """The same tokens of one row, cut where the batch was cut."""
    own = [(keys[row : row + 1, :, -length:], values[row : row + 1, :, -length:]) for keys, values in pairs]
    padding, cut = sum(sizes) - length, []
    for size in sizes:
        skipped = min(padding, size)
        padding -= skipped
        if size > skipped:
            cut.append(size - skipped)
    return own, cut, torch.ones(1, length, dtype=torch.long)


# -- causality and independence ----------------------------------------------------------------------------------------


@on("llama", "gemma3", attentions=("sdpa", KVCOMPRESS))
def test_the_last_token_of_a_chunk_changes_no_earlier_logit(
    factory: Factory, entry: Entry, attention_name: str
) -> None:
    text = text_ids(1, 60, seed=4)
    logits = []
    with attention(entry, attention_name) as model:
        for change in (0, 1):
            cache, found = maker(entry, factory)(), []
            for start, end in ((0, 33), (33, 52), (52, 60)):
                ids = text[:, start:end].clone()
                ids[:, -1] += change
                found.append(model(ids, past_key_values=copy.deepcopy(cache)).logits[0, :-1])
                model(text[:, start:end], past_key_values=cache)
            logits.append(torch.cat(found))
    assert (logits[0] - logits[1]).abs().max().item() <= 1e-6


@on("llama", "gemma3", attentions=("sdpa", KVCOMPRESS))
def test_the_prompt_sees_itself_exactly(factory: Factory, entry: Entry, attention_name: str) -> None:
    text = text_ids(1, 60, seed=4)
    expected = entry.model(text, use_cache=False).logits
    with attention(entry, attention_name) as model:
        logits = model(text, past_key_values=maker(entry, factory)()).logits
    assert (logits - expected).abs().max().item() <= TOLERANCE


@on("llama", "gemma3", attentions=("sdpa", KVCOMPRESS))
def test_two_interleaved_caches_equal_two_separate_ones(factory: Factory, entry: Entry, attention_name: str) -> None:
    texts = text_ids(1, 50, seed=1), text_ids(1, 50, seed=2)
    parts = ((0, 31), (31, 40), (40, 41), (41, 42), (42, 50))
    with attention(entry, attention_name) as model:
        separate = []
        for text in texts:
            cache = maker(entry, factory)()
            separate.append([model(text[:, a:b], past_key_values=cache).logits for a, b in parts])
        caches = [maker(entry, factory)() for _ in texts]
        for index, (a, b) in enumerate(parts):
            for text, cache, expected in zip(texts, caches, separate, strict=True):
                assert torch.equal(model(text[:, a:b], past_key_values=cache).logits, expected[index])


@on(
    "llama",
    "gemma3",
    "gemma2",
    "gpt_oss",
    attentions=("plain",),
    factories=[f for f in MOST if not f.learns],
)
def test_packed_pages_attend_like_their_decoded_tensors(factory: Factory, entry: Entry, attention_name: str) -> None:
    """Our attention over packed pages, and the plain one over what they decode to."""
    text = text_ids(1, 60, seed=6)
    logits = []
    for name in (entry.attentions[0], KVCOMPRESS):
        with attention(entry, name) as model:
            cache = maker(entry, factory)()
            model(text[:, :45], past_key_values=cache)
            parts = [model(text[:, at : at + 1], past_key_values=cache).logits for at in range(45, 52)]
            logits.append(torch.cat([*parts, model(text[:, 52:], past_key_values=cache).logits], dim=1))
    assert (logits[0] - logits[1]).abs().max().item() <= 1e-4


@every_cache
def test_layers_do_not_mix(factory: Factory) -> None:
    """Feeding one layer more changes nothing in the other."""
    pairs = random_pairs(1, 60)
    cache = factory(FULL)
    feed(cache, pairs)
    before = decoded(cache)
    cache.update(*random_pairs(1, 30, seed=8)[0], 0)
    after = decoded(cache)
    assert after[0][0].shape[2] == 90
    assert equal(before[1:], after[1:]) and len(after) == LAYERS


@every_cache
def test_sinks_and_recent_tokens_stay_exact(factory: Factory) -> None:
    pairs = random_pairs(2, 75)
    cache = factory(FULL)
    feed_in_parts(cache, pairs, [50] + [1] * 25)
    for held, made in zip(decoded(cache), pairs, strict=True):
        for got, x in zip(held, made, strict=True):
            assert torch.equal(got[:, :, :SINKS], x[:, :, :SINKS])
            assert torch.equal(got[:, :, -RESIDUAL:], x[:, :, -RESIDUAL:])
            assert not torch.equal(got[:, :, SINKS : SINKS + PAGE], x[:, :, SINKS : SINKS + PAGE])
