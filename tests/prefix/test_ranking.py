"""Who goes first, pins, priorities, and a random trace in a small memory against the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.prefix.cache import PrefixCache
from hf_kvcompress.prefix.ranking import GHOSTS, Ranking, Usage

from .helpers import TOLERANCE, by_itself, by_store, prefix_cache, text


@dataclass(eq=False)
class Entry:
    name: str
    usage: Usage
    nbytes: int = 100


def _used(name: str, times: list[float], nbytes: int = 100, seconds: float = 1.0) -> Entry:
    entry = Entry(name, Usage(times[0], times[0], seconds), nbytes)
    for time in times:
        entry.usage.use(time, half_life=100)
    return entry


def _order(ranking: Ranking, entries: list[Entry], now: float) -> list[str]:
    left, gone = list(entries), []
    while left:
        first = ranking.first_to_go(left, now)
        left.remove(first)
        gone.append(first.name)
    return gone


def test_lru_looks_at_the_last_use_and_lfu_forgets() -> None:
    entries = [_used("often, long ago", [0] * 9), _used("twice", [800, 900]), _used("just now", [1000])]
    assert _order(Ranking("lru", 100), entries, 1000) == ["often, long ago", "twice", "just now"]
    assert _order(Ranking("lfu", 100), entries, 1000) == ["often, long ago", "twice", "just now"]
    assert _order(Ranking("lfu", 1e9), entries, 1000)[-1] == "often, long ago"
    entries[1].usage.use(999, 100)
    assert _order(Ranking("lfu", 100), entries, 1000) == ["often, long ago", "just now", "twice"]


def test_adaptive_weighs_recency_frequency_and_cost_a_byte() -> None:
    entries = [
        _used("recent", [1000], nbytes=10_000, seconds=1),
        _used("frequent", [930, 931, 932, 933], nbytes=10_000, seconds=1),
        _used("costly", [700], nbytes=100, seconds=5),
    ]
    for weights, last in (
        ({"recency_weight": 1, "frequency_weight": 0, "size_weight": 0}, "recent"),
        ({"recency_weight": 0, "frequency_weight": 1, "size_weight": 0}, "frequent"),
        ({"recency_weight": 0, "frequency_weight": 0, "size_weight": 2}, "costly"),
    ):
        ranking = Ranking("adaptive", 100)
        ranking.configure(weights)
        assert _order(ranking, entries, 1000)[-1] == last
        assert sum(ranking.weights.values()) == pytest.approx(1)
    low = _used("low", [1000])
    low.usage.priority = "low"
    high = _used("high", [0])
    high.usage.priority = "high"
    assert _order(Ranking("lru", 100), [high, *entries, low], 1000)[0] == "low"
    assert _order(Ranking("lru", 100), [high, *entries, low], 1000)[-1] == "high"


def test_adaptive_multiplies_its_parts_by_the_power_of_their_weights() -> None:
    """With weights of .6 and .4 an entry of 8 times the cost a byte may be 1 + 3 half-lives old, and not much more."""
    ranking = Ranking("adaptive", 100)
    ranking.configure({"recency_weight": 0.6, "frequency_weight": 0, "size_weight": 0.4})
    new = _used("new", [1000], seconds=1)
    limit = 100 * (8 ** (0.4 / 0.6) - 1)
    for age, first in ((limit * 0.99, "new"), (limit * 1.01, "costly")):
        assert _order(ranking, [new, _used("costly", [1000 - age], seconds=8)], 1000)[0] == first
    unknown = _used("took no time", [1000], seconds=0)
    assert _order(Ranking("adaptive", 100), [new, unknown], 1000)[0] == "took no time"


def test_old_entries_are_told_apart() -> None:
    """After many half-lives a power of two would be 0 for both."""
    entries = [_used("once", [20.0]), _used("thrice", [10.0, 10.0, 10.0])]
    assert _order(Ranking("adaptive", 1), entries, 1e6) == ["once", "thrice"]


def test_uses_are_remembered_when_an_entry_comes_back() -> None:
    ranking = Ranking("adaptive", 100)
    ranking.remember("a", _used("a", [1, 2, 3, 4]).usage)
    assert ranking.recall("a", 9) == (3, 4, 9) and ranking.recall("a", 9) == (9,)
    for number in range(GHOSTS + 1):
        ranking.remember(str(number), _used("b", [number]).usage)
    assert ranking.recall("0", 1e4) == (1e4,) and ranking.recall("1", 1e4) == (1, 1e4)
    store = prefix_cache(eviction_policy="adaptive", max_cache_size_gb=_room(1.2), clock=Clock())
    for _ in range(3):
        by_store(store, text(64, 1) + [1], steps=0)
    store.add_prefix(text(64, 2))  # puts the other one out
    assert [len(node.usage.times) for node in store.store.tree.nodes()] == [1]
    store.add_prefix(text(64, 1))
    assert [len(node.usage.times) for node in store.store.tree.nodes()] == [3]


def test_bad_weights_are_named() -> None:
    store = PrefixCache()
    store.configure_adaptive({"recency_weight": 0.4, "frequency_weight": 0.3, "size_weight": 0.3})
    assert store.store.ranking.policy == "adaptive"
    for weights, message in (
        ({"recency": 1}, "weights: expected one of .* did you mean 'recency_weight'"),
        ({"size_weight": -1}, "size_weight: expected a number of at least 0"),
        (dict.fromkeys(("recency_weight", "frequency_weight", "size_weight"), 0), "weights: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            store.configure_adaptive(weights)


# -- in the store ------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    now: float = field(default=0.0)

    def __call__(self) -> float:
        self.now += 1
        return self.now


def _entry_bytes() -> int:
    store = prefix_cache()
    store.add_prefix(text(64))
    return store.nbytes


def _room(entries: float) -> float:
    return entries * _entry_bytes() / 2**30


def test_the_bound_holds_and_the_right_entry_goes() -> None:
    store = prefix_cache(max_cache_size_gb=_room(3.2), clock=Clock())
    names = [store.add_prefix(text(64, seed)) for seed in range(3)]
    by_store(store, text(64, 0) + [1], steps=0)  # the oldest is used again
    store.add_prefix(text(64, 9))
    assert store.nbytes <= store.store.max_bytes and len(store) == 3
    assert [store.store.node(store.reader.origin.root, store.prefix_tokens(n)) is not None for n in names] == [1, 0, 1]
    assert store.store.stats.evictions == 1


def test_leaves_go_before_what_they_continue() -> None:
    store = prefix_cache(max_cache_size_gb=_room(3.5), clock=Clock())
    system = text(64)
    store.add_prefix(system)
    for seed in range(1, 8):
        by_store(store, system + text(33, seed), steps=0)
        assert store.nbytes <= store.store.max_bytes
    tokens = [entry.tokens for entry in store.store.entries()]
    assert 64 in tokens and tokens.count(96) >= 1  # the system text is never a leaf


def test_pins_hold_and_are_bounded() -> None:
    store = prefix_cache(max_cache_size_gb=_room(4.2), clock=Clock())
    names = [store.add_prefix(text(64, seed)) for seed in range(3)]
    store.pin(names[0])
    store.pin(names[1])
    with pytest.raises(ValueError, match=r"prefix_id: expected pins of at most 0.5 of [\d,]+ bytes, got '[\d,]+ bytes"):
        store.pin(names[2])
    for seed in range(3, 9):
        store.add_prefix(text(64, seed))
    pinned = [entry for entry in store.store.entries() if entry.pinned]
    assert len(pinned) == 2 and store.nbytes <= store.store.max_bytes
    store.unpin(names[0])
    for seed in range(9, 14):
        store.add_prefix(text(64, seed))
    with pytest.raises(ValueError, match="prefix_id: expected a prefix that is in memory"):
        store.pin(names[0])


def test_warm_entries_go_last() -> None:
    store = prefix_cache(max_cache_size_gb=_room(3.2), clock=Clock())
    (warm,) = store.warm_cache([text(64, 1)], priority="high")
    for seed in range(2, 9):
        store.add_prefix(text(64, seed))
    assert store.store.node(store.reader.origin.root, store.prefix_tokens(warm)) is not None


def test_an_entry_that_can_never_fit_is_not_kept() -> None:
    store = prefix_cache(max_cache_size_gb=_room(0.5))
    prefix_id = store.add_prefix(text(64))
    assert len(store) == 0 and store.nbytes == 0 and store.store.tree.root.children == {}
    assert store.generate_with_prefix(prefix_id, text(5, 1), max_tokens=3, do_sample=False).shape == (1, 3)


def test_what_is_copied_stays() -> None:
    store = prefix_cache(max_cache_size_gb=_room(1.2))
    store.add_prefix(text(64))
    lease = store.store.lease(store.reader.origin.root, (*text(64), 1), partial=True)
    store.add_prefix(text(64, 2))
    assert lease.node is not None and lease.node.state is not None
    store.store.release(lease)
    store.store.release(lease)
    assert lease.node.users == 0 and store.nbytes <= store.store.max_bytes


@settings(max_examples=15)
@given(data=st.data())
def test_random_traces_answer_as_the_model_does(data: st.DataObject) -> None:
    """Prompts from a few beginnings, in a memory for few of them: every answer right, every byte accounted for."""
    policy = data.draw(st.sampled_from(["lru", "lfu", "adaptive"]))
    room = _room(data.draw(st.sampled_from([0.8, 1.7, 3.5])))
    store = prefix_cache(eviction_policy=policy, max_cache_size_gb=room, partial=data.draw(st.booleans()))
    pieces = [text(24, seed) for seed in range(4)]
    for _ in range(data.draw(st.integers(3, 8))):
        parts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        ids = [token for part in parts for token in pieces[part]][: data.draw(st.integers(1, 96))]
        got, _ = by_store(store, ids, steps=1)
        assert (got - by_itself(store, ids, [], steps=1)).abs().max() <= TOLERANCE
        tree = store.store.tree
        nodes = list(tree.nodes())
        assert tree.nbytes == sum(node.nbytes for node in nodes) <= store.store.max_bytes
        for node in nodes:
            assert node.parent is not None and node.parent.children[node.hashes[0]] is node
            assert node.start == node.parent.end and len(node.hashes) * 16 == len(node.tokens) and node.users == 0
            assert node.state is not None or len(node.children) > 1
            assert node.base is None or node.base in node.path()
