"""A cache that loses nothing gives what DynamicCache gives: every model, every way of generating, every attention."""

from __future__ import annotations

import pytest

from .factories import CORE, EXACT, Factory
from .generation import MODES, NEW_TOKENS, PADDED_LENGTHS, rows_alone
from .helpers import KVCOMPRESS, assert_same, attention, attentions, maker, reference, reference_rows, self_attention
from .zoo import ENTRIES, Entry

FEW_MODES = ("greedy", "beams", "left_padded", "second_turn", "chunk_loop", "prompt_lookup")


def cases() -> list:
    """All modes for `full` factories, a few for the rest; never what DynamicCache itself cannot do."""
    found = []
    for factory, entry in pairs():
        every_attention = factory.full and entry.name in CORE
        for mode in MODES if factory.full else FEW_MODES:
            for name in attentions(entry) if every_attention else (entry.attentions[0], KVCOMPRESS):
                if entry.can(mode) and factory.runs_under(name, mode):
                    identity = f"{factory.name}-{entry.name}-{mode}-{name}"
                    found.append(pytest.param(factory, entry, mode, name, id=identity))
    return found


def pairs() -> list[tuple[Factory, Entry]]:
    return [(factory, entry) for factory in EXACT for entry in ENTRIES if factory.runs_on(entry.name)]


def padded_cases() -> list:
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in pairs() if pair[1].can("rows_alone")]


@pytest.mark.parametrize("factory, entry, mode, attention_name", cases())
def test_tokens_and_logits_equal_dynamic_cache(factory: Factory, entry: Entry, mode: str, attention_name: str) -> None:
    expected = reference(entry.name, mode, attention_name)
    with attention(entry, attention_name) as model:
        ours = MODES[mode](entry, model, maker(entry, factory))
    assert_same(ours, expected)


@pytest.mark.parametrize("factory, entry", padded_cases())
def test_rows_of_a_padded_batch_equal_the_rows_alone(factory: Factory, entry: Entry) -> None:
    for name in (entry.attentions[0], KVCOMPRESS):
        if not factory.runs_under(name, "left_padded"):
            continue
        expected = reference_rows(entry.name, name)
        with attention(entry, name) as model:
            batch = MODES["left_padded"](entry, model, maker(entry, factory))
            alone = rows_alone(entry, model, maker(entry, factory))
        for row in range(len(PADDED_LENGTHS)):
            assert_same(alone[row], expected[row])
            own = type(batch)(batch.tokens[row : row + 1, -NEW_TOKENS:], batch.logits[:, row : row + 1])
            assert_same(own, type(batch)(expected[row].tokens[:, -NEW_TOKENS:], expected[row].logits))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_model_seals_pages(entry: Entry) -> None:
    """Guards the suite itself: with these prompts every model's cache holds sealed pages."""
    caches = []
    make = maker(entry, EXACT[0])
    with attention(entry, KVCOMPRESS) as model:
        MODES["greedy"](entry, model, lambda: caches.append(make()) or caches[-1])
    assert self_attention(caches[0]).stats()["compressed_pages"] > 0


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.can("reset")], ids=lambda entry: entry.name)
def test_model_and_cache_state_do_not_leak_between_runs(entry: Entry) -> None:
    """A cache that is reset, and a second cache on the same model, start from nothing."""
    expected = reference(entry.name, "greedy", KVCOMPRESS)
    cache = maker(entry, EXACT[0])()
    with attention(entry, KVCOMPRESS) as model:
        assert_same(MODES["greedy"](entry, model, lambda: cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_same(MODES["greedy"](entry, model, lambda: cache), expected)
