"""Policies done the slow way: all tokens are kept, evicted ones hidden, and scores written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Lane:
    """What one key-value head knows when it must choose: its candidates, the exact tokens, and the newest queries."""

    keys: torch.Tensor  # [N, D], of candidates
    values: torch.Tensor  # [N, D]
    positions: list[int]
    near_keys: torch.Tensor  # [n, D], sinks and recent window
    near_positions: list[int]
    mass: torch.Tensor  # [N]
    queries: torch.Tensor  # [M, D], scaled
    query_positions: list[int]
    head: int = 0
    layer: int = 0
    groups: int = 1  # query heads, whose queries come one behind the other

    def attention(self) -> torch.Tensor:
        """`[M, N]`: what each query pays each candidate, exact tokens taking their share."""
        keys, at = torch.cat([self.keys, self.near_keys]), self.positions + self.near_positions
        rows = []
        for query, position in zip(self.queries, self.query_positions, strict=True):
            seen = [i for i, key_position in enumerate(at) if key_position <= position]
            weights = torch.zeros(len(at))
            weights[seen] = (keys[seen] @ query).softmax(0)
            rows.append(weights[: len(self.positions)])
        return torch.stack(rows)


Row = list[Lane]
Scores = list[torch.Tensor]


def pooled(scores: torch.Tensor, size: int = 5) -> torch.Tensor:
    near = size // 2
    return torch.stack([scores[max(i - near, 0) : i + near + 1].mean() for i in range(len(scores))])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def streaming(row: Row) -> Scores:
    return [torch.tensor(lane.positions, dtype=torch.float32) for lane in row]


def h2o(row: Row) -> Scores:
    return [lane.mass for lane in row]


def snapkv(row: Row) -> Scores:
    return [pooled(lane.attention().mean(0)) for lane in row]


def tova(row: Row) -> Scores:
    together = torch.stack([lane.attention().mean(0) for lane in row]).mean(0)
    return [together] * len(row)


def expected(row: Row) -> Scores:
    """The mean over queries of exp(score), to second order, times the value's norm."""
    scores = []
    for lane in row:
        weights = torch.zeros(len(lane.keys))
        for queries in lane.queries.chunk(lane.groups):
            logits = []
            for key in lane.keys:
                products = [float(query @ key) for query in queries]
                mean = sum(products) / len(products)
                logits.append(mean + sum((p - mean) ** 2 for p in products) / len(products) / 2)
            weights += torch.tensor(logits).softmax(0) / lane.groups
        scores.append(weights * torch.tensor([float(v.norm()) for v in lane.values]))
    return scores


def keydiff(row: Row) -> Scores:
    scores = []
    for lane in row:
        units = [key / key.norm() for key in (*lane.keys, *lane.near_keys)]
        anchor = torch.stack(units).mean(0)
        scores.append(torch.tensor([-cosine(key, anchor) for key in lane.keys]))
    return scores


def rkv(row: Row) -> Scores:
    scores = []
    for lane in row:
        count, redundancy = len(lane.keys), []
        for i, key in enumerate(lane.keys):
            redundancy.append(
                sum(cosine(key, other) for j, other in enumerate(lane.keys) if j != i) / max(count - 1, 1)
            )
        scores.append(0.1 * pooled(lane.attention().mean(0)) - 0.9 * torch.tensor(redundancy).softmax(0))
    return scores


def random(row: Row) -> Scores:
    """A hash of position, head and layer."""
    scores = []
    for lane in row:
        numbers = []
        for position in lane.positions:
            x = position * 2654435761 + lane.head * 40503 + lane.layer * 97
            for _ in range(2):
                x &= 0xFFFFFFFF
                x = (x ^ (x >> 16)) * 0x45D9F3B
            numbers.append(((x >> 8) & 0xFFFFFF) / 2**24)
        scores.append(torch.tensor(numbers))
    return scores


def importance(row: Row) -> Scores:
    """Two parts of value norm to one of attention mass, by rank; the learned part has no predictor here."""
    scores = []
    for lane in row:
        count = max(len(lane.keys) - 1, 1)

        def ranks(numbers: torch.Tensor, count: int = count) -> torch.Tensor:
            order = sorted(range(len(numbers)), key=lambda i: (float(numbers[i]), i))
            return torch.tensor([float(order.index(i)) for i in range(len(numbers))]) / count

        # In this order, with these weights: sums of ranks are often equal, and equal ones must be equal here as well.
        total = 0.4 / (0.4 + 0.2) * ranks(lane.values.norm(dim=-1))
        scores.append(total + 0.2 / (0.4 + 0.2) * ranks(lane.mass))
    return scores


SCORES: dict[str, Callable[[Row], Scores]] = {
    function.__name__: function
    for function in (streaming, h2o, snapkv, tova, expected, keydiff, rkv, random, importance)
}
#: newest queries that each policy asks
WINDOWS = {"snapkv": 64, "tova": 1, "expected": 64, "rkv": 8}


class DenseLayer:
    """One row of one layer: keys and values `[H, T, D]` of all tokens, and which of them each head still has.

    Args:
        policy: name in `SCORES`.
        budget: tokens a head may hold; all if None.
        sinks, residual, page, recent: as the cache has them.
        adaptive: heads share one budget, each with at least `floor` of its part.
    """

    def __init__(
        self,
        policy: str,
        budget: int | None,
        sinks: int,
        residual: int,
        page: int,
        recent: float = 0.25,
        adaptive: bool = False,
        floor: float = 0.2,
        layer: int = 0,
    ):
        self.policy, self.budget, self.layer = policy, budget, layer
        self.sinks, self.residual, self.page, self.recent = sinks, residual, page, recent
        self.adaptive, self.floor = adaptive, floor
        self.keys = self.values = self.queries = torch.empty(0)

    def step(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend with queries `[Hq, q, D]`, keys and values `[H, q, D]` more, then evict; returns `[q, Hq, D]`."""
        scaled = queries * queries.shape[-1] ** -0.5
        if self.keys.numel() == 0:
            self.keys, self.values, self.queries = keys[:, :0], values[:, :0], scaled[:, :0]
            self.kept, self.mass = torch.zeros(len(keys), 0, dtype=torch.bool), torch.zeros(len(keys), 0)
        start, new, (heads, groups) = self.keys.shape[1], keys.shape[1], (len(keys), len(queries) // len(keys))
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        self.queries = torch.cat([self.queries, scaled], 1)
        self.kept = torch.cat([self.kept, torch.ones(heads, new, dtype=torch.bool)], 1)
        self.mass = torch.cat([self.mass, torch.zeros(heads, new)], 1)
        length = start + new
        causal = torch.arange(length)[None] <= torch.arange(start, length)[:, None]
        out = []
        for query_head in range(len(queries)):
            head = query_head // groups
            hidden = ~(causal & self.kept[head])
            weights = (scaled[query_head] @ self.keys[head].mT).masked_fill(hidden, -math.inf).softmax(-1)
            self.mass[head] += weights.sum(0)
            out.append(weights @ self.values[head])
        self._evict(length, heads, groups)
        return torch.stack(out, dim=1)

    def _evict(self, length: int, heads: int, groups: int) -> None:
        sealed_end = self.sinks + max((length - self.sinks - self.residual) // self.page * self.page, 0)
        if self.budget is None:
            return
        limit = self.budget - self.sinks - self.residual - (self.page - 1)
        sealed = torch.zeros(length, dtype=torch.bool)
        sealed[self.sinks : sealed_end] = True
        candidates = [(self.kept[head] & sealed).nonzero()[:, 0] for head in range(heads)]
        if sum(len(own) for own in candidates) <= limit * heads:
            return
        exact = [*range(min(self.sinks, length)), *range(sealed_end, length)]
        near = max(round(self.recent * self.budget) - (length - sealed_end), 0)
        window = WINDOWS.get(self.policy, 1)
        asked = list(range(max(length - window, 0), length))
        row = [
            Lane(
                self.keys[head, own],
                self.values[head, own],
                own.tolist(),
                self.keys[head, exact],
                exact,
                self.mass[head, own],
                self.queries[head * groups : (head + 1) * groups, asked].flatten(0, 1),
                asked * groups,
                head,
                self.layer,
                groups,
            )
            for head, own in enumerate(candidates)
        ]
        ranked = []
        for head, (own, scores) in enumerate(zip(candidates, SCORES[self.policy](row), strict=True)):
            protected = set(own[len(own) - near :].tolist()) if near else set()
            order = [(at in protected, float(x), head, at) for at, x in zip(own.tolist(), scores, strict=True)]
            if self.adaptive:  # the best of each head come before all others
                best = sorted(order, reverse=True)[: int(self.floor * limit)]
                order = [(rank[0] or rank in best, *rank[1:]) for rank in order]
            ranked.append(order)
        pools = [[rank for order in ranked for rank in order]] if self.adaptive else ranked
        for order in pools:
            for *_, head, position in sorted(order, reverse=True)[limit * (heads if self.adaptive else 1) :]:
                self.kept[head, position] = False
