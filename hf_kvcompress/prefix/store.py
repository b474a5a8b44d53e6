"""Where prefixes are kept: the tree in memory, bounded in bytes, with tiers below it. Safe for threads."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..chains import join
from ..config import expect
from ..saving import check, header_of, pack, unpack
from ..snapshots import Snapshot
from .hashing import Tokens, chain
from .ranking import PRIORITIES, Ranking, Usage
from .stats import EntryStats, PrefixStats
from .tiers import Tier
from .tree import Node, Origin, Tree

TOKENS = "prefix.tokens"


@dataclass
class Lease:
    """A node whose chain stays in memory until `PrefixStore.release`, and tokens of it that may be used."""

    node: Node | None
    tokens: int
    held: tuple[Node, ...] = ()

    def states(self) -> list[Snapshot]:
        """What `put_back` wants."""
        return [node.state for node in self.held if node.state is not None]


@dataclass(frozen=True)
class _Leaving:
    """An entry on its way to the tiers."""

    key: str
    tokens: Tokens
    chain: tuple[Snapshot, ...]
    origin: Origin
    usage: Usage
    croppable: bool


class PrefixStore:
    """Snapshots of caches by the tokens that they have read.

    Args:
        max_bytes: of the entries in memory.
        ranking: says which entry goes first.
        block_size: entries end at multiples of so many tokens.
        max_pinned: part of `max_bytes` that pinned entries may take.
        tiers: places below the memory, the nearest first; entries that leave the memory after a use go there.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        max_bytes: int,
        ranking: Ranking,
        block_size: int = 16,
        max_pinned: float = 0.5,
        tiers: Sequence[Tier] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_bytes, self.ranking, self.max_pinned, self.clock = max_bytes, ranking, max_pinned, clock
        self.tiers = list(tiers)
        self.tree = Tree(block_size)
        self.stats = PrefixStats()
        self._leaving: list[_Leaving] = []
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all entries in memory."""
        return self.tree.nbytes

    def hashes(self, root: str, tokens: Tokens) -> list[str]:
        """Names of the prefixes of `tokens` that end with a block."""
        return chain(root, tokens, self.tree.block_size)

    # -- finding -------------------------------------------------------------------------------------------------------

    def lease(self, root: str, tokens: Tokens, partial: bool) -> Lease:
        """The best cache to begin with, of at most one token less than there are; `release` it when it is copied.

        With `partial` one that goes on otherwise behind the common tokens is taken as well, if it can be cropped.
        """
        hashes = self.hashes(root, tokens)
        with self._lock:
            found = self._best(tokens, hashes, partial)
            if found.node is not None:
                found.held = tuple(found.node.chain())
                for node in found.held:
                    node.users += 1
                for node in found.node.path():
                    node.usage.use(self.clock(), self.ranking.half_life)
            return found

    def _best(self, tokens: Tokens, hashes: list[str], partial: bool) -> Lease:
        path, shared = self.tree.walk(tokens, hashes)
        most = min(shared, len(tokens) - 1)  # the last token is read anew, for its logits
        whole = [node for node in path if node.end <= most and node.state is not None]
        best = Lease(whole[-1], whole[-1].end) if whole else Lease(None, 0)
        if partial and path and most > best.tokens:
            below = _croppable(path[-1])
            if below is not None:
                return Lease(below, most)
        return best

    def release(self, lease: Lease) -> None:
        """Let go of a lease; a second time does nothing."""
        with self._lock:
            held, lease.held = lease.held, ()
            for node in held:
                node.users -= 1
            self._hold_to_bound()
        self._write_leaving()

    def known(self, root: str, tokens: Tokens) -> int:
        """Tokens that the tree has seen at the beginning of others: where an entry serves all of these."""
        hashes = self.hashes(root, tokens)
        with self._lock:
            return self.tree.walk(tokens, hashes)[1]

    def node(self, root: str, tokens: Tokens) -> Node | None:
        """The entry of exactly these tokens."""
        hashes = self.hashes(root, tokens)
        with self._lock:
            path, shared = self.tree.walk(tokens, hashes)
            found = path[-1] if path and shared == len(tokens) == path[-1].end else None
            return None if found is None or found.state is None else found

    # -- storing -------------------------------------------------------------------------------------------------------

    def put(
        self,
        tokens: Tokens,
        state: Snapshot,
        origin: Origin,
        base: Node | None,
        seconds: float,
        croppable: bool,
        priority: str = "normal",
    ) -> Lease:
        """Keep the state of a cache that has read `tokens` (whole blocks) and went on from a leased `base`, if given.

        Gives back a lease of the new entry, empty if it has no place, is there already, or its hash is another text's.
        """
        hashes = self.hashes(origin.root, tokens)
        with self._lock:
            now = self.clock()
            node = self.tree.node_at(tokens, hashes, now)
            if node is None:
                return Lease(None, 0)
            new = node.state is None
            if new:
                self.tree.put(node, state, origin, base, croppable)
                times = self.ranking.recall(node.key, now)
                node.usage = Usage(now, now, seconds, frequency=1.0, pins=node.usage.pins, times=times)
            node.usage.priority = max(priority, node.usage.priority, key=PRIORITIES.index)
            lease = Lease(node, node.end)
            if new and self._hold_to_bound(node):
                lease.held = tuple(node.chain())
                for one in lease.held:
                    one.users += 1
        self._write_leaving()
        return lease if lease.held else Lease(None, 0)

    def _hold_to_bound(self, newest: Node | None = None) -> bool:
        """Evict until the bytes are within the bound; False if the newest entry itself had to go."""
        while self.tree.nbytes > self.max_bytes:
            leaves = [node for node in self.tree.leaves() if node is not newest]
            if leaves:
                self._evict(self.ranking.first_to_go(leaves, self.clock()))
            elif newest is None or newest.children or newest.users or newest.usage.pins:
                return True  # all that is left is in use: the bound holds again when it is released
            else:
                self._evict(newest)
                return False
        return True

    def _evict(self, node: Node) -> None:
        states = tuple(one.state for one in node.chain() if one.state is not None)
        if self.tiers and node.usage.hits and node.origin is not None:
            leaving = (node.key, node.all_tokens(), states, node.origin, node.usage, node.croppable)
            self._leaving.append(_Leaving(*leaving))
        self.stats.evicted()
        self.ranking.remember(node.key, node.usage)
        self.tree.remove(node)
        node.state = None

    # -- pins ----------------------------------------------------------------------------------------------------------

    def pin(self, root: str, tokens: Tokens, by: int) -> None:
        """Pin or unpin the entry of exactly these tokens. Raises ValueError if pins would exceed their part."""
        with self._lock:
            node = self.node(root, tokens)
            if node is None:
                raise expect("prefix_id", "a prefix that is in memory", "one that is not")
            pinned = {one for one in self.tree.nodes() if one.usage.pins} | ({node} if by > 0 else set())
            total = sum(one.nbytes for one in {above for one in pinned for above in one.path()})
            if by > 0 and total > self.max_pinned * self.max_bytes:
                most = f"pins of at most {self.max_pinned:g} of {self.max_bytes:,} bytes"
                raise expect("prefix_id", most, f"{total:,} bytes with this one")
            node.usage.pins = max(node.usage.pins + by, 0)

    # -- tiers ---------------------------------------------------------------------------------------------------------

    def fetch(self, origin: Origin, tokens: Tokens, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Bring the longest prefix that a tier has into memory, if it is longer than what is there."""
        hashes = self.hashes(origin.root, tokens[: len(tokens) - 1])
        keys = hashes[self.known(origin.root, tokens) // self.tree.block_size :][::-1]
        for tier in self.tiers:
            key = tier.find(keys)
            data = tier.get(key) if key is not None else None
            if key is None or data is None:
                continue
            try:
                header, tensors = unpack(data, f"{tier.name}, entry {key}")
                check(header, config, dtype, f"{tier.name}, entry {key}", origin.calibration)
            except ValueError as error:
                warnings.warn(f"{error}; it is deleted", RuntimeWarning, stacklevel=4)
                tier.delete(key)
                continue
            own = tuple(tensors.pop(TOKENS).tolist())
            if own != tokens[: len(own)]:
                self.tree.collisions += 1
                continue
            state = Snapshot(header["layers"], {name: tensor.to(device) for name, tensor in tensors.items()})
            self.stats.fetched(len(own))
            self.release(self.put(own, state, origin, None, header["seconds"], header["croppable"]))
            return

    def persist(self, root: str, tokens: Tokens) -> None:
        """Write the entry of exactly these tokens to every tier that lacks it."""
        with self._lock:
            node = self.node(root, tokens)
            if node is None or node.origin is None or not self.tiers:
                return
            states = tuple(one.state for one in node.chain() if one.state is not None)
            self._leaving.append(_Leaving(node.key, tokens, states, node.origin, node.usage, node.croppable))
        self._write_leaving()

    def _write_leaving(self) -> None:
        """Write to the tiers what has left the memory, without holding the lock."""
        while self._leaving:
            try:
                entry = self._leaving.pop()
            except IndexError:  # another thread was faster
                return
            wanting = [tier for tier in self.tiers if tier.find([entry.key]) is None]
            if not wanting:
                continue
            state, origin = join(entry.chain), entry.origin
            extra = {"seconds": entry.usage.seconds, "croppable": entry.croppable}
            header = {**header_of(state, origin.settings, origin.model, origin.calibration), **extra}
            data = pack(header, {**state.tensors, TOKENS: torch.tensor(entry.tokens)})
            for tier in wanting:
                tier.put(entry.key, data)

    # -- what is there -------------------------------------------------------------------------------------------------

    def entries(self) -> list[EntryStats]:
        """Every entry in memory, the one used last first."""
        now = self.clock()
        with self._lock:
            nodes = [node for node in self.tree.nodes() if node.state is not None]
            told = [EntryStats.of(node, now, self.ranking.half_life) for node in nodes]
        return sorted(told, key=lambda entry: entry.idle_seconds)

    def clear(self) -> None:
        """Forget everything in memory that is neither in use nor pinned; tiers keep what they have."""
        with self._lock:
            while leaves := self.tree.leaves():
                for node in leaves:
                    self.tree.remove(node)
                    node.state = None


def _croppable(node: Node) -> Node | None:
    """The nearest cache at or below a node that can go back to fewer tokens."""
    waiting = [node]
    while waiting:
        node = waiting.pop(0)
        if node.state is not None and node.croppable:
            return node
        waiting += node.children.values()
    return None
