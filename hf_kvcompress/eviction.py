"""Which sealed tokens of a layer go once it holds more than its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from .compaction import compact
from .config import LayerConfig
from .lanes import LanePages
from .observers import QueryWindow
from .pages import PageStore
from .policies.base import Candidates
from .window import ExactWindow

# What decides before any score, in steps far above one; among tokens of one level the newer one stays.
_LEVEL = 1e12
_LARGEST = 1e11
GONE, FLOOR, NEAR, PINNED = -1, 1, 2, 3


class Holder(Protocol):
    """What a layer's storage tells of the tokens it holds."""

    pages: PageStore | LanePages
    window: ExactWindow

    @property
    def batch(self) -> int: ...

    def seen_by(self, row: int) -> int: ...

    def first_position(self, row: int) -> int: ...

    def exact_keys(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]: ...


class Evictor:
    """Scores, protects and drops the tokens of one layer.

    Sinks and the recent window are no candidates. What is sealed is held to the budget less what those can take at
    most, so the budget holds after every update.

    Args:
        config: the layer's settings; `config.eviction` is set.
        index: the layer's number.
        batch, heads: B and H.
        sliding_window: tokens that a query sees, or None.
    """

    def __init__(self, config: LayerConfig, index: int, batch: int, heads: int, sliding_window: int | None):
        assert config.eviction is not None
        self.config, self.settings, self.index = config, config.eviction, index
        self.heads, self.sliding_window = heads, sliding_window
        self.policy = self.settings.make_policy()
        self.budget: int | float | None = self.settings.budget
        self.window = QueryWindow(self.policy.window, heads, batch) if self.policy.capture == "window" else None
        self.prompts = [0] * batch  # tokens of each row's first pass
        self.evicted = False

    @property
    def wants_mass(self) -> bool:
        return self.policy.capture == "mass"

    # -- budget --------------------------------------------------------------------------------------------------------

    def tokens(self, seen: int) -> int | None:
        """Tokens that a lane may hold in all when its row has seen `seen`; None for all of them."""
        if self.budget is None or seen <= self.settings.max_tokens:
            return None
        if isinstance(self.budget, int):
            return self.budget
        return max(math.ceil(self.budget * seen), self.config.least_budget)

    def sealed_tokens(self, seen: int) -> int | None:
        """Sealed tokens that a lane may hold, so that with sinks and a full window it stays within the budget."""
        tokens, page = self.tokens(seen), self.config.tokens_per_page
        if self.sliding_window is not None:  # older ones are seen no more
            tokens = min(tokens or self.sliding_window, self.sliding_window) + page
        exact = self.config.residual_length + page - 1 + (self.config.sink_length if self.sliding_window is None else 0)
        return None if tokens is None else max(tokens - exact, 0)

    def room(self, seen: int, held: int) -> int:
        """Sealed tokens that a lane may yet take before some must go."""
        limit = self.sealed_tokens(seen)
        return 1 << 30 if limit is None else max(limit - held, 0)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def evict(self, storage: Holder) -> None:
        """Bring every row that holds too much back to its budget."""
        pages = storage.pages
        assert isinstance(pages, LanePages)
        alike: dict[int, list[int]] = {}
        held = pages.held
        for row in range(storage.batch):
            limit = self.sealed_tokens(storage.seen_by(row))
            if limit is None:
                continue
            own = held[row * self.heads : (row + 1) * self.heads]
            if sum(own) > limit * self.heads or self.settings.uniform_heads and max(own) > limit:
                alike.setdefault(self._target(limit, pages), []).append(row)
        for target, rows in alike.items():
            self._round(storage, pages, rows, target)

    def _target(self, limit: int, pages: LanePages) -> int:
        """Tokens to evict down to. Codecs that pack tokens together lose a little each time, so they go less often."""
        if all(codec.token_wise for codec in pages.codecs.values()):
            return limit
        return max(limit - max(limit // 8, pages.page_size), 0)

    def _round(self, storage: Holder, pages: LanePages, rows: list[int], target: int) -> None:
        table = pages.table(rows)
        positions = pages.look_up("positions", table, -1).long()
        scores = self._scores(storage, pages, rows, table, positions)
        order = self._order(storage, rows, scores, positions, target)
        keep = self._highest(order, len(rows), target) & (positions >= 0)
        compact(pages, rows, table, keep.cpu())
        self.evicted = True

    def _scores(
        self,
        storage: Holder,
        pages: LanePages,
        rows: list[int],
        table: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        candidates = Candidates(
            positions,
            self.heads,
            keys=lambda: pages.decode("key", table),
            values=lambda: pages.decode("value", table),
            context=lambda: storage.exact_keys(rows),
            mass=pages.look_up("mass", table, 0.0) if self.wants_mass else None,
            observers=self.window.of(rows) if self.window is not None else None,
            layer=self.index,
        )
        scores = torch.nan_to_num(self.policy.score(candidates).double()).clamp(-_LARGEST, _LARGEST)
        if self.settings.chunk_size > 1:
            scores = _mean_of_chunks(scores, positions, self.settings.chunk_size)
        return scores

    def _order(
        self,
        storage: Holder,
        rows: list[int],
        scores: torch.Tensor,
        positions: torch.Tensor,
        target: int,
    ) -> torch.Tensor:
        """Scores `[L, N]` with what is protected above all others, pins highest, and what must go below."""
        settings, device = self.settings, positions.device

        def by_lane(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, device=device).repeat_interleave(self.heads)[:, None]

        first = by_lane([storage.first_position(row) for row in rows])
        seen = by_lane([storage.seen_by(row) for row in rows])
        near = by_lane([self._recent(storage, row) for row in rows])
        present = positions >= 0
        level = torch.zeros_like(scores)
        from_end = present.sum(1, keepdim=True) - torch.arange(positions.shape[1], device=device)
        level[from_end <= near] = NEAR
        at = positions - first
        if settings.boundary:
            span = (settings.boundary * seen).clamp(max=target // 2)
            level[(at < span) | (at >= seen - span)] = NEAR
        for start, end in settings.pin:
            level[(at >= start) & (at < end)] = PINNED
        if settings.pin_prompt:
            prompts = by_lane([self.prompts[row] for row in rows])
            level[at < (prompts if settings.pin_prompt is True else prompts.clamp(max=int(settings.pin_prompt)))] = (
                PINNED
            )
        if self.sliding_window is not None:
            level[at < seen - self.sliding_window + 1] = GONE
        if not settings.uniform_heads:
            self._protect_floor(scores, level, present, target)
        protected = level * _LEVEL + positions
        return torch.where(level == 0, scores, protected).masked_fill_(~present, -math.inf)

    def _recent(self, storage: Holder, row: int) -> int:
        """Sealed tokens of a row that are protected as recent ones."""
        tokens = self.tokens(storage.seen_by(row)) or 0
        return max(round(self.settings.recent * tokens) - storage.window.recent[row], 0)

    def _protect_floor(self, scores: torch.Tensor, level: torch.Tensor, present: torch.Tensor, target: int) -> None:
        """Every head keeps at least a part of its even share (Ada-KV)."""
        number = min(int(self.settings.head_floor * target), scores.shape[1])
        if number:
            best = torch.where(level > 0, math.inf, scores).masked_fill(~present, -math.inf).topk(number, dim=1).indices
            floor = torch.zeros_like(level).scatter_(1, best, FLOOR)
            level.copy_(torch.maximum(level, floor * (level == 0)))

    def _highest(self, order: torch.Tensor, rows: int, target: int) -> torch.Tensor:
        """Booleans `[L, N]`: the `target` highest of each lane, or of a row's lanes together under "adaptive"."""
        pool = order if self.settings.uniform_heads else order.view(rows, -1)
        number = min(target if self.settings.uniform_heads else target * self.heads, pool.shape[1])
        keep = torch.zeros_like(pool, dtype=torch.bool)
        return keep.scatter_(1, pool.topk(number, dim=1).indices, True).view_as(order)

    def note_prompts(self, new: Sequence[int]) -> None:
        """Note how many tokens each row's first pass has."""
        self.prompts = [own or number for own, number in zip(self.prompts, new, strict=True)]

    def map_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self.prompts = [self.prompts[row] for row in rows]
        if self.window is not None:
            self.window.map_rows(rows)


def _mean_of_chunks(scores: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Scores averaged over the candidates of each run of `size` positions."""
    chunks = positions.clamp(min=0) // size
    present = (positions >= 0).to(scores.dtype)
    shape = (scores.shape[0], int(chunks.max()) + 1)
    sums = scores.new_zeros(shape).scatter_add_(1, chunks, scores * present)
    counts = scores.new_zeros(shape).scatter_add_(1, chunks, present)
    return (sums / counts.clamp(min=1)).gather(1, chunks)
