"""Which sealed tokens of a layer go once it holds more than its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from .compaction import compact
from .config import LayerConfig
from .exact_copies import ExactCopies
from .lanes import LanePages
from .merging import merged_values
from .observers import QueryWindow
from .ops.select import highest
from .pages import PageStore
from .policies.base import Candidates
from .tables import Tables
from .tiers import Tail
from .window import ExactWindow

# What decides before any score, in steps far above one; among tokens of one level the newer one stays.
_LEVEL = 1e12
_LARGEST = 1e11
GONE, FLOOR, NEAR, PINNED = -1, 1, 2, 3


class Holder(Protocol):
    """What a layer's storage tells of the tokens it holds."""

    pages: PageStore | LanePages
    tail: Tail | None
    copies: ExactCopies | None
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
        first_head: number of the first head in the whole model.
    """

    def __init__(
        self,
        config: LayerConfig,
        index: int,
        batch: int,
        heads: int,
        sliding_window: int | None,
        first_head: int = 0,
    ):
        assert config.eviction is not None
        self.config, self.settings, self.index = config, config.eviction, index
        self.heads, self.first_head, self.sliding_window = heads, first_head, sliding_window
        self.policy = self.settings.make_policy()
        self.budget: int | float | None = self.settings.budget
        self.window = QueryWindow(self.policy.window, heads, batch) if self.policy.capture == "window" else None
        self.prompts = [0] * batch  # tokens of each row's first pass
        self.evicted = False

    @property
    def wants_mass(self) -> bool:
        return self.policy.capture == "mass"

    def needs_our_attention(self, batch: int, layers_differ: bool) -> str | None:
        """Why a plain attention would be wrong, or None: it shows no queries, and one mask must do for all it reads."""
        if self.policy.needs_queries:
            return f"policy {self.policy.name!r} scores tokens with queries, which only the attention can hand over"
        if batch > 1:
            return "a policy evicts each row's own tokens and cannot see a batch's padding"
        sliding = self.sliding_window is not None
        if not self.settings.uniform_heads or sliding or self.settings.demote_to or layers_differ:
            return "heads or layers hold different tokens"
        return None

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
            visible = self.sliding_window + page
            tokens = visible if tokens is None else min(tokens, visible)
        exact = self.config.residual_length + page - 1 + (self.config.sink_length if self.sliding_window is None else 0)
        return None if tokens is None else max(tokens - exact, 0)

    def room(self, seen: int, held: int) -> int:
        """Sealed tokens that a lane may yet take before some must go."""
        limit = self.sealed_tokens(seen)
        return 1 << 30 if limit is None else max(limit - held, 0)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def evict(self, storage: Holder) -> None:
        """Bring every row that holds too much back to its budget, tier by tier."""
        pages = storage.pages
        assert isinstance(pages, LanePages)
        limits = [self.sealed_tokens(storage.seen_by(row)) for row in range(storage.batch)]
        for limit, rows in self._too_full(pages.held, limits).items():
            self._round(storage, pages, storage.tail, rows, limit)
        tiers = [] if storage.tail is None else storage.tail.chain()
        for tail, budget in zip(tiers, self.settings.tier_budgets, strict=True):
            if budget is None or tail.is_settled:
                continue
            limits = [_part(budget, storage.seen_by(row)) for row in range(storage.batch)]
            for limit, rows in self._too_full(tail.held(), limits).items():
                if tail.host:
                    tail.hold_to(rows, limit)
                else:
                    self._round(storage, tail.pages, tail.beyond, rows, limit)
            tail.settled = list(tail.pages.blocks)

    def _too_full(self, held: Sequence[int], limits: Sequence[int | None]) -> dict[int, list[int]]:
        """Rows whose lanes hold too much, by what a lane may hold; `held` has a number a lane, `limits` one a row."""
        alike: dict[int, list[int]] = {}
        for row, limit in enumerate(limits):
            own = held[row * self.heads : (row + 1) * self.heads]
            if limit is None:
                continue
            if sum(own) > limit * self.heads or self.settings.uniform_heads and max(own) > limit:
                alike.setdefault(limit, []).append(row)
        return alike

    def _target(self, limit: int, pages: LanePages) -> int:
        """Tokens to evict down to. Codecs that pack tokens together lose a little each time, so they go less often."""
        if all(codec.token_wise for codec in pages.codecs.values()):
            return limit
        return max(limit - max(limit // 8, pages.page_size), 0)

    def _round(self, storage: Holder, pages: LanePages, tail: Tail | None, rows: list[int], limit: int) -> None:
        """Let the rows' tokens in `pages` and in the tier below compete for `limit` places a lane in the upper one."""
        own = pages.table(rows)
        back = tail.candidates(rows) if tail is not None else own[:, :0]
        tables = Tables(pages, tail, own, back)
        first = self._by_lane([storage.first_position(row) for row in rows], tables.positions.device)

        def context() -> tuple[torch.Tensor, torch.Tensor]:
            keys, at = storage.exact_keys(rows)
            return keys, _counted_from(first, at)

        observers = self.window.of(rows) if self.window is not None else None
        if observers is not None:
            observers = replace(observers, positions=_counted_from(first, observers.positions))
        candidates = Candidates(
            _counted_from(first, tables.positions),
            self.heads,
            keys=lambda: tables.decode("key"),
            values=lambda: tables.decode("value"),
            context=context,
            mass=tables.masses() if self.wants_mass else None,
            observers=observers,
            layer=self.index,
            first_head=self.first_head,
        )
        target = self._target(limit, pages)
        order = self._order(storage, rows, self._scores(candidates), tables.positions, target)
        if pages is storage.pages:
            target = max(target, self._pinned(order, limit))
        clear = round(target * (1 - self.settings.hysteresis)) if self.settings.hysteresis else None
        competing = tables.without_rash_returns(order, clear)
        keep = self._highest(competing, len(rows), target) & (order > GONE * _LEVEL / 2)
        rewrite = merged_values(candidates, keep) if self.settings.merge else None
        if tail is None:
            compact(pages, rows, own, keep.cpu(), rewrite)
            pages.holes = False
        else:
            self._move(pages, tail, rows, tables, order, keep, storage.copies, pages is storage.pages)
        self.evicted = True

    def _move(
        self,
        pages: LanePages,
        tail: Tail,
        rows: list[int],
        tables: Tables,
        order: torch.Tensor,
        keep: torch.Tensor,
        copies: ExactCopies | None,
        is_first: bool,
    ) -> None:
        """What loses its place in the upper tier goes to the lower one, what wins one comes back."""
        stays = ~keep & (order > GONE * _LEVEL / 2) & (tables.positions >= 0)
        keep, stays = keep.cpu(), stays.cpu()
        down, back = tables.own.masked_fill(~stays, -1), tables.back.masked_fill(~keep, -1)
        tail.demote(pages, rows, down, copies)
        tail.promote(pages, rows, back, copies, is_first)
        if copies is not None and is_first:  # after those who come back have used theirs
            copies.keep(pages, rows, down, order.cpu())
        old = torch.where(keep & (tables.own >= 0), tables.own, -1)
        compact(pages, rows, *_with_arrivals(pages.table(rows), tables.own, old))
        pages.holes = False
        tail.settle(rows, *_with_arrivals(tail.pages.table(rows), tables.back, tables.back.masked_fill(~stays, -1)))

    def _scores(self, candidates: Candidates) -> torch.Tensor:
        scores = torch.nan_to_num(self.policy.score(candidates).double()).clamp(-_LARGEST, _LARGEST)
        if self.settings.chunk_size > 1:
            scores = _mean_of_chunks(scores, candidates.positions, self.settings.chunk_size)
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

        first = self._by_lane([storage.first_position(row) for row in rows], device)
        seen = self._by_lane([storage.seen_by(row) for row in rows], device)
        near = self._by_lane([self._recent(storage, row) for row in rows], device)
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
            prompts = self._by_lane([self.prompts[row] for row in rows], device)
            level[at < (prompts if settings.pin_prompt is True else prompts.clamp(max=int(settings.pin_prompt)))] = (
                PINNED
            )
        if self.sliding_window is not None:
            level[at < seen - self.sliding_window + 1] = GONE
        if not settings.uniform_heads:
            self._protect_floor(scores, level, present, target)
        protected = level * _LEVEL + positions
        return torch.where(level == 0, scores, protected).masked_fill_(~present, -math.inf)

    def _pinned(self, order: torch.Tensor, limit: int) -> int:
        """Pinned tokens of the fullest lane. Raises ValueError if they alone are more than the budget leaves."""
        if not self.settings.pin and not self.settings.pin_prompt:
            return 0
        pinned = int((order >= PINNED * _LEVEL).sum(1).max())
        if pinned > limit:
            name = "pin" if self.settings.pin else "pin_prompt"
            raise ValueError(
                f"{name}: expected at most {limit} tokens besides sinks and recent ones, for which the budget of layer "
                f"{self.index} has room, got {pinned}"
            )
        return pinned

    def _by_lane(self, numbers: list[int], device: torch.device) -> torch.Tensor:
        """A number a row -> `[L, 1]`."""
        return torch.tensor(numbers, device=device).repeat_interleave(self.heads)[:, None]

    def _recent(self, storage: Holder, row: int) -> int:
        """Sealed tokens of a row that are protected as recent ones."""
        tokens = self.tokens(storage.seen_by(row)) or 0
        return max(round(self.settings.recent * tokens) - storage.window.recent[row], 0)

    def _protect_floor(self, scores: torch.Tensor, level: torch.Tensor, present: torch.Tensor, target: int) -> None:
        """Every head keeps at least a part of its even share (Ada-KV)."""
        ranked = torch.where(level > 0, math.inf, scores).masked_fill(~present, -math.inf)
        best = highest(ranked, int(self.settings.head_floor * target))
        level.masked_fill_(best & (level == 0), FLOOR)

    def _highest(self, order: torch.Tensor, rows: int, target: int) -> torch.Tensor:
        """Booleans `[L, N]`: the `target` highest of each lane, or of a row's lanes together under "adaptive"."""
        pool = order if self.settings.uniform_heads else order.view(rows, -1)
        return highest(pool, target if self.settings.uniform_heads else target * self.heads).view_as(order)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        if self.window is not None:
            yield self.window.positions
            if self.window.queries is not None:
                yield self.window.queries

    def note_prompts(self, new: Sequence[int]) -> None:
        """Note how many tokens each row's first pass has."""
        self.prompts = [own or number for own, number in zip(self.prompts, new, strict=True)]

    def map_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self.prompts = [self.prompts[row] for row in rows]
        if self.window is not None:
            self.window.map_rows(rows)


def _part(budget: int | float, seen: int) -> int:
    """Tokens of a budget in tokens, or in parts of those seen."""
    return budget if isinstance(budget, int) else math.ceil(budget * seen)


def _counted_from(first: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Positions counted from each row's first token: a row behind padding is scored as it is alone. -1 stays."""
    return torch.where(positions < 0, positions, positions - first)


def _mean_of_chunks(scores: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Scores averaged over the candidates of each run of `size` positions."""
    chunks = positions.clamp(min=0) // size
    present = (positions >= 0).to(scores.dtype)
    shape = (scores.shape[0], int(chunks.max()) + 1)
    sums = scores.new_zeros(shape).scatter_add_(1, chunks, scores * present)
    counts = scores.new_zeros(shape).scatter_add_(1, chunks, present)
    return (sums / counts.clamp(min=1)).gather(1, chunks)


def _with_arrivals(now: torch.Tensor, before: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A store's table now, and which tokens in it stay: those in `kept`, and those that were not there `before`."""
    gone = before[(before >= 0) & (kept < 0)]
    return now, (now >= 0) & ~torch.isin(now, gone)
