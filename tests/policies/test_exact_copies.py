"""What the first level held comes back bit for bit, while the limit lets copies stay."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import hf_kvcompress as kvc
from hf_kvcompress.measure import tensor_bytes
from hf_kvcompress.reading import lane_stores

from ..conformance.factories import SMALL
from ..conformance.state import DIM, FULL, HEADS, LAYERS, decoded, equal, feed, random_pairs

pytestmark = pytest.mark.filterwarnings("ignore:importance:UserWarning")
TOKENS = 400
#: bytes of a token and lane in the first level: keys and values, position and mass
EXACT_TOKEN = 2 * DIM * 4 + 8
LEVELS = {"identity": ("identity", "int8", "int4"), "int8": ("int8", "int4", "int2"), "eqrot4": ("eqrot4", "eqrot2")}


def make(levels: tuple[str, ...], keep: Any, config: Any = FULL, **more: Any) -> Any:
    own = {"levels": levels, "shares": (0.3,) * (len(levels) - 1), "min_length": 16, "keep_exact": keep}
    return kvc.HierarchicalCache(config, **{**own, **SMALL, **more})


def read(pages: Any, lane: int) -> dict[int, torch.Tensor]:
    """What every token of a lane is read as, by position: keys and values `[2 * D]`."""
    row, head = lane // pages.heads, lane % pages.heads
    table = pages.table([row])
    both = torch.cat([pages.decode(role, table)[head] for role in ("key", "value")], dim=1)
    positions = pages.look_up("positions", table, -1)[head].tolist()
    return {at: own for at, own in zip(positions, both, strict=True) if at >= 0}


class Trace(RuleBasedStateMachine):
    """Passes of any length, any attention, rows taken and repeated, copies and files; the model is what level 0 held.

    `held` has, by layer and lane, what a token was read as when it was last seen in the first level, by position.
    """

    @initialize(name=st.sampled_from(sorted(LEVELS)), pages=st.sampled_from([0, 2, 1000]), seed=st.integers(0, 99))
    def begin(self, name: str, pages: int, seed: int) -> None:
        self.limit = pages * SMALL["page_size"] * EXACT_TOKEN * HEADS * 2
        self.cache = make(LEVELS[name], self.limit)
        self.rows, self.seen, self.moved = 2, 0, 0
        self.pairs = random_pairs(2, TOKENS, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.held: dict[tuple[int, int], dict[int, Any]] = {}
        self.first: dict[tuple[int, int], set[int]] = {}  # positions in the first level, and those with copies
        self.with_copies: dict[tuple[int, int], set[int]] = {}
        self.read(60)

    @rule(tokens=st.sampled_from([1, 7, 8, 24, 40]))
    def read(self, tokens: int) -> None:
        end = min(self.seen + tokens, TOKENS)
        if end == self.seen:
            return
        mask = torch.ones(self.rows, end, dtype=torch.long)
        feed(self.cache, [tuple(x[:, :, self.seen : end] for x in pair) for pair in self.pairs], mask)
        self.cache.commit()
        self.seen = end

    @rule()
    def attend_elsewhere(self) -> None:
        for layer in self.cache.layers:
            for _, pages, _ in lane_stores(layer.storage):
                for block in pages.blocks:
                    block.mass = torch.rand(block.mass.shape, generator=self.generator) * 1e3
        self.read(8)

    @rule(order=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def reorder(self, order: list[int]) -> None:
        rows = torch.tensor([min(row, self.rows - 1) for row in order])
        self.cache.batch_select_indices(rows)
        self.pairs = [tuple(x[rows] for x in pair) for pair in self.pairs]
        self.rows = len(rows)
        for table in (self.held, self.first):
            moved = {
                (layer, row * HEADS + head): copy.copy(table[layer, int(old) * HEADS + head])
                for layer in range(LAYERS)
                for row, old in enumerate(rows)
                for head in range(HEADS)
            }
            table.clear()
            table.update(moved)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "file"]))
    def copied(self, how: str) -> None:
        before = decoded(self.cache)
        if how == "file":
            path = Path(self.folder) / "cache"
            self.cache.save(path)
            self.cache = kvc.HierarchicalCache.load(path, FULL)
        else:
            self.cache = copy.deepcopy(self.cache) if how == "deepcopy" else pickle.loads(pickle.dumps(self.cache))
        assert equal(decoded(self.cache), before)

    @rule()
    def reset(self) -> None:
        if self.seen > 200:
            self.cache.reset()
            self.held.clear()
            self.first.clear()
            self.with_copies.clear()
            self.seen = 0
            self.read(60)

    @invariant()
    def nothing_is_lost_doubled_or_changed(self) -> None:
        if not hasattr(self, "cache") or not self.seen:
            return
        for index, layer in enumerate(self.cache.layers):
            storage = layer.storage
            copies = storage.copies
            if copies is not None:
                assert sum(t.nbytes for block in copies.pages.blocks for t in block.tensors()) <= self.limit
            for lane in range(self.rows * HEADS):
                row, key = lane // HEADS, (index, lane)
                tiers = [read(pages, lane) for _, pages, _ in lane_stores(storage)]
                begin = storage.window.sinks[row]
                everywhere = sorted(at for tier in tiers for at in tier)
                assert everywhere == list(range(begin, begin + storage.pages.counts[row]))
                kept = read(copies.pages, lane) if copies is not None else {}
                held, before = self.held.setdefault(key, {}), self.first.get(key, set())
                for at, own in kept.items():
                    assert at not in tiers[0] and torch.equal(held.setdefault(at, own), own)
                for at, own in tiers[0].items():
                    comes_back = at not in before and at in self.with_copies.get(key, set())
                    if at in before or comes_back:
                        assert torch.equal(held[at], own), "a token is otherwise than it was in the first level"
                    Trace.returned += comes_back
                    held[at] = own
                self.first[key], self.with_copies[key] = set(tiers[0]), set(kept)

    folder, returned = "", 0


def test_a_random_trace(tmp_path: Path) -> None:
    Trace.folder, Trace.returned = str(tmp_path), 0
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    quick = settings(
        max_examples=12, stateful_step_count=12, deadline=None, phases=[Phase.generate], suppress_health_check=checks
    )
    run_state_machine_as_test(Trace, settings=quick)
    assert Trace.returned > 100


def test_copies_serve_the_levels_in_between_and_are_counted() -> None:
    """A token that moves twice is packed from what it was; bytes are told apart, and 0 keeps none."""
    pairs, errors = random_pairs(1, 300), {}
    for keep in (0, "1MB"):
        cache = make(("identity", "int4", "int3"), keep)
        for start in range(0, 300, 20):
            part = [tuple(x[:, :, start : start + 20] for x in pair) for pair in pairs]
            feed(cache, part, torch.ones(1, start + 20, dtype=torch.long))
        storage = cache.layers[0].storage
        lowest = read(storage.tail.beyond.pages, 0)
        exact = torch.stack([torch.cat([x[0, 0, at] for x in pairs[0]]) for at in lowest])
        errors[keep] = float((torch.stack(list(lowest.values())) - exact).norm() / exact.norm())
        stats = cache.stats()
        assert (stats["exact_copies"] > 100) == (stats["exact_copy_bytes"] > 0) == bool(keep)
        if keep:
            held = tensor_bytes([layer.storage.copies for layer in cache.layers])
            assert stats["exact_copy_bytes"] == held <= LAYERS * 2**20
            rest = tensor_bytes([{**vars(layer.storage), "copies": None} for layer in cache.layers])
            assert cache.nbytes == held + rest
    assert errors["1MB"] < 0.97 * errors[0]


def test_a_step_back_forgets_copies_in_the_old_codes() -> None:
    cache = make(LEVELS["eqrot4"], "1MB", quality_guard=1e-6)
    feed(cache, random_pairs(1, 200), torch.ones(1, 200, dtype=torch.long))
    for end in range(201, 260):
        feed(cache, random_pairs(1, 1, seed=end), torch.ones(1, end, dtype=torch.long))
    assert cache.events
    storage = cache.layers[0].storage
    assert storage.copies.pages.codecs is not None and storage.copies.pages.codecs == storage.pages.codecs


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"keep_exact": "lots"}, "keep_exact: expected bytes such as '64MB', got 'lots'"),
        ({"keep_exact": -1}, "keep_exact: expected bytes, as a whole number"),
        ({"keep_exact": True}, "keep_exact: expected bytes, as a whole number"),
        ({"keep_exact": 1000, "levels": ("kivi4", "kivi2")}, "keep_exact: expected 0 beside kivi4"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kvc.HierarchicalCache(FULL, **settings)


def test_auto_keeps_none_where_the_model_is_in_host_memory() -> None:
    cache = kvc.HierarchicalCache(FULL, **SMALL)
    feed(cache, random_pairs(1, 200), torch.ones(1, 200, dtype=torch.long))
    assert cache.settings.default.eviction.keep_exact == "auto" and cache.layers[0].storage.copies is None
