"""Spans that a new page could be stored by: proposed by the index of repeats and by features, and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from .frozen import SharedSlab
from .importance import important_pages
from .repeats import Span
from .residual import BITS, encode_page, member_bytes, plain_bytes
from .settings import IMPORTANT, NO_MORE

if TYPE_CHECKING:
    from .store import ClusteredPages

_SAMPLE = 2048  # tokens of a pass that its mean is taken of


@dataclass(frozen=True)
class Try:
    """Page `page` of a slab, of the pass's row `row`, by the span `shift` tokens before it, which is in slab `slab`."""

    row: int
    page: int
    slab: int
    base_row: int
    base_page: int
    offset: int
    shift: int


@dataclass
class Choice:
    """A proposal that would do, for one head."""

    nbits: int
    error: float
    head: int
    tried: Try


@dataclass
class Pass:
    """What is being sealed: rows, their first token, exact keys and values `[R, H, T, D]`, the queries' mean square.

    queries: the pass's newest ones of each row, `[Hq, n, D]` and scaled, if the attention at work shows them.
    """

    rows: list[int]
    start: int
    tokens: int
    exact: dict[str, torch.Tensor]
    query_ms: torch.Tensor | None
    queries: list[torch.Tensor] | None = None
    _important: torch.Tensor | None = None
    _means: dict[str, torch.Tensor] = field(default_factory=dict)
    _similar: list[list[list[int]]] | None = None

    def mean(self, store: ClusteredPages, role: str) -> torch.Tensor:
        """Mean before the rotation, `[R, H, 1, D]`."""
        if role not in self._means:
            step = -(-self.tokens // _SAMPLE)
            at = torch.arange(self.start, self.start + self.tokens, step, device=store.device)
            self._means[role] = unrotated(store, role, self.exact[role][:, :, ::step].float(), at).mean(2, keepdim=True)
        return self._means[role]

    def important(self, store: ClusteredPages, low: int, tokens: int) -> torch.Tensor:
        """Which pages of the tokens from number `low` on are important, `[R, H, n]`."""
        page = store.page_size
        if self._important is None:
            self._important = important_pages(self, page)
            if not store.clusters.settings.importance:
                self._important = torch.zeros_like(self._important)
        first = (low - self.start) // page
        return self._important[:, :, first : first + tokens // page]

    def similar(self, store: ClusteredPages) -> list[list[list[int]]]:
        """Earlier pages of the pass that are like each of its pages, by row and page."""
        pages = self.tokens // store.page_size
        if self._similar is None:
            self._similar = [[[] for _ in range(pages)] for _ in self.rows]
            if pages > 1 and store.clusters.level > 1:
                for row, found in enumerate(self._similar):
                    for role in ("key", "value"):
                        self._look(store, role, row, found)
        return self._similar

    def _look(self, store: ClusteredPages, role: str, row: int, found: list[list[int]]) -> None:
        at = torch.arange(self.start, self.start + self.tokens, device=store.device)
        x = unrotated(store, role, self.exact[role][row : row + 1].float(), at) - self.mean(store, role)[row]
        pages = x[0].transpose(0, 1).flatten(1).unflatten(0, (-1, store.page_size))  # [P, page, H * D]
        for page, like in enumerate(store.clusters.tracker.similar(pages.contiguous())[1].tolist()):
            found[page] += [other for other in like if other >= 0 and other not in found[page]]


def unrotated(store: ClusteredPages, role: str, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """`x` `[..., T, D]` of these token numbers before the rotary embedding, but for one turn common to all."""
    return x if role == "value" or store.rotary is None else store.rotary.undo(x, at)


# -- proposals ---------------------------------------------------------------------------------------------------------


def proposals(store: ClusteredPages, run: Pass, number: int, low: int, tokens: int) -> Iterator[Try]:
    page, most, begin = store.page_size, store.clusters.settings.top_k_similar, store.slabs[number].start
    similar = run.similar(store)
    for index, row in enumerate(run.rows):
        first = store.first + low
        for j, spans in enumerate(store.index.spans(row, first, first + tokens, page, most)):
            at = low + j * page
            like = [(row, store.first + run.start + p * page) for p in similar[index][(at - run.start) // page]]
            for span in dict.fromkeys([*spans, *like][:most]):
                made = _placed(store, span, number, at)
                if made is None:
                    continue
                place, base_row, base_page, offset, shift = made
                # Between rows models differ in whether padding counts as a position: the error will tell.
                padded = store.begins(row) - store.begins(base_row)
                for own in sorted({shift, shift + padded}):
                    yield Try(index, (at - begin) // page, place, base_row, base_page, offset, own)


def _placed(store: ClusteredPages, span: Span, number: int, at: int) -> tuple[int, int, int, int, int] | None:
    """Slab, row, page and offset of a span, and how far it is moved; None if it is not held in one slab."""
    row, page = span[0], store.page_size
    start = span[1] - store.first
    if row >= len(store.counts):
        return None
    for place in range(number if store.local else 0, number + 1):
        slab = store.slabs[place]
        if slab.start <= start and start + page <= min(slab.end, store.counts[row]):
            return place, row, (start - slab.start) // page, (start - slab.start) % page, at - start
    return None


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    store: ClusteredPages, run: Pass, role: str, number: int, low: int, tokens: int, tries: list[Try]
) -> dict[tuple[int, int, int], list[Choice]]:
    """What would do for the pages at (row, page of the slab, head)."""
    page, slab = store.page_size, store.slabs[number]
    rows = torch.tensor(run.rows, device=store.device)
    inside, first = low - slab.start, (low - slab.start) // page
    exact = run.exact[role][:, :, low - run.start : low - run.start + tokens].float().unflatten(2, (-1, page))
    plain = store.decode_from(role, slab, inside, inside + tokens)[rows].unflatten(2, (-1, page))
    weights = run.query_ms[:, :, None, None] if role == "key" and run.query_ms is not None else None
    tolerance = torch.where(run.important(store, low, tokens), IMPORTANT, NO_MORE)
    allowed_error = _error(plain - exact, weights) * tolerance
    spread = slab.packed(role).get("spread")  # [B, H, 1, D]
    found: dict[tuple[int, int, int], list[Choice]] = {}
    for place, own in groupby(sorted(tries, key=lambda t: t.slab), key=lambda t: t.slab):
        group = list(own)
        row, j, base_row, base_page, offset, shift = torch.tensor(
            [(t.row, t.page - first, t.base_row, t.base_page, t.offset, t.shift) for t in group], device=store.device
        ).unbind(1)
        span, is_plain = _spans(store, role, place, base_row, base_page, offset)  # [c, H, page, D], [c, H]
        move = store.moves[role]
        if move is not None:
            span = move(span.flatten(0, 1), shift.repeat_interleave(store.heads)).view_as(span)
        x = exact[row, :, j]
        at = (low + j[:, None] * page + torch.arange(page, device=store.device))[:, None]
        mean = run.mean(store, role)[row]
        cosine = torch.nn.functional.cosine_similarity(
            (unrotated(store, role, x, at) - mean).flatten(2),
            (unrotated(store, role, span, at) - mean).flatten(2),
            dim=2,
        )
        like = cosine >= store.clusters.settings.threshold(store.clusters.level)
        left = (is_plain & like).flatten().nonzero()[:, 0]
        limit = allowed_error[row, :, j].flatten()
        flat = [t.flatten(0, 1) for t in (x, span)]
        own_spread = None if spread is None else spread[rows[row]].flatten(0, 1).float()
        own_weights = None if weights is None else weights[row, :, 0].flatten(0, 1)
        for nbits in _ladder(store, role):
            if not len(left):
                break
            s = None if own_spread is None else own_spread[left]
            _, read = encode_page(flat[0][left], flat[1][left], s, nbits)
            error = _error(read - flat[0][left], None if own_weights is None else own_weights[left])
            good = error <= limit[left]
            for place_of, e in zip(left[good].tolist(), error[good].tolist(), strict=True):
                tried, head = group[place_of // store.heads], place_of % store.heads
                at_page = (run.rows[tried.row], tried.page, head)
                found.setdefault(at_page, []).append(Choice(nbits, e, head, tried))
            left = left[~good]
    return found


def _spans(
    store: ClusteredPages, role: str, place: int, row: torch.Tensor, page: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans `[c, H, page, D]` of a slab as they decode, and whether all of them is plain, `[c, H]`."""
    slab, size = store.slabs[place], store.page_size
    pages = slab.capacity // size
    begin, end = int(page.min()), min(int(page.max()) + 2, pages)
    tile = store.decode_from(role, slab, begin * size, end * size)  # [B, H, n, D]
    at = ((page - begin) * size + offset)[:, None] + torch.arange(size, device=store.device)
    span = tile.transpose(1, 2)[row[:, None], at].transpose(1, 2)
    if not isinstance(slab, SharedSlab):
        return span, torch.ones(len(row), store.heads, dtype=torch.bool, device=store.device)
    last = torch.where(offset > 0, page + 1, page).clamp(max=pages - 1)
    plain = slab.pools[role].is_plain
    return span, plain[row, :, page] & plain[row, :, last]


def _error(difference: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What is lost of pages `[..., page, D]`: of keys, as their queries see it."""
    squares = difference.square()
    return (squares if weights is None else squares * weights).sum((-1, -2))


def _ladder(store: ClusteredPages, role: str) -> list[int]:
    """Bits that are worth trying, fewest first."""
    settings, plain = store.clusters.settings, plain_bytes(store.codecs[role], store.page_size)
    least = settings.least_ratio(store.clusters.level)
    bits = [b for b in BITS if b <= settings.delta_bits]
    return [b for b in bits if member_bytes(store.codecs[role], store.page_size, b) * least <= plain]
