"""Which new pages are stored as references or as differences: those that come out smaller, at no more error."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from ..codecs.base import Packed
from .duplicates import find_duplicates
from .frozen import SharedSlab
from .pool import Members, narrow
from .residual import encode_page, member_bytes, plain_bytes
from .search import Choice, Pass, measure, proposals

if TYPE_CHECKING:
    from .store import ClusteredPages

PAGE_BYTES = 6  # of every page in a shared slab: where it is, and its statistics


def examine(store: ClusteredPages, run: Pass, number: int, low: int, tokens: int) -> None:
    """Look at the pages that a pass has just put into a slab, and share those where it pays."""
    twins = find_duplicates(store, run, number, low, tokens) if len(store.counts) > 1 else {}
    tries = list(proposals(store, run, number, low, tokens))
    chosen = {}
    for role in store.codecs:
        found = measure(store, run, role, number, low, tokens, tries) if tries else {}
        own = twins.get(role, {})
        chosen[role] = _choose(store, role, number, {at: c for at, c in found.items() if at not in own}, own)
    saved = sum(_saved(store, role, choices) for role, choices in chosen.items())
    saved += sum(plain_bytes(store.codecs[role], store.page_size) * len(own) for role, own in twins.items())
    involved = {number, *(choice.tried.slab for choices in chosen.values() for choice in choices.values())}
    if saved <= sum(_overhead(store, place) for place in involved):
        return
    for place in involved:
        store.share(place)
    for role, choices in chosen.items():
        _store(store, run, role, number, low, choices)
        pool = store.slabs[number].pools[role]  # type: ignore[attr-defined]
        for (row, page, head), twin in twins.get(role, {}).items():
            pool.table[row, head, page] = pool.table[twin, head, page]
    store.settle()


# -- choosing ----------------------------------------------------------------------------------------------------------


def _choose(
    store: ClusteredPages,
    role: str,
    number: int,
    found: dict[tuple[int, int, int], list[Choice]],
    twins: dict[tuple[int, int, int], int],
) -> dict[tuple[int, int, int], Choice]:
    """One choice a page, so that no base is a member and no cluster too large; page by page, as they came."""
    chosen: dict[tuple[int, int, int], Choice] = {}
    if not found:
        return chosen
    sizes, tables = _cluster_sizes(store, role)
    bases = {(twin, page, head) for (_, page, head), twin in twins.items()}  # in this slab, and staying as they are
    most = store.clusters.settings.max_cluster_size - 1
    for at in sorted(found, key=lambda a: (a[1], a[0], a[2])):
        if at in bases:
            continue
        for choice in sorted(found[at], key=lambda c: (c.nbits, c.error)):
            t = choice.tried
            own = [
                (t.base_row, p, choice.head)
                for p in ({t.base_page} if not t.offset else {t.base_page, t.base_page + 1})
            ]
            if t.slab == number and any(page in chosen or page in twins for page in own):
                continue
            reference = _is_reference(choice, number)
            key: Any = (t.slab, *own[0])
            if t.slab in tables:
                key = (t.slab, tables[t.slab][t.base_row][choice.head][t.base_page])
            if not reference and sizes[key] >= most:
                store.clusters.refused["cluster is full"] += 1
                continue
            sizes[key] += not reference
            if t.slab == number:
                bases.update(own)
            chosen[at] = choice
            break
    return chosen


def _is_reference(choice: Choice, number: int) -> bool:
    """The page reads another's entry as it is: nothing is stored for it."""
    t = choice.tried
    return choice.nbits == 0 and t.offset == 0 and t.shift == 0 and t.slab == number


def _cluster_sizes(store: ClusteredPages, role: str) -> tuple[Counter[Any], dict[int, list]]:
    """Members of every base page, by slab and entry, and the tables of shared slabs."""
    sizes: Counter[Any] = Counter()
    tables = {}
    for place, slab in enumerate(store.slabs):
        if isinstance(slab, SharedSlab):
            tables[place] = slab.pools[role].table.tolist()
            for group in slab.pools[role].groups:
                sizes.update((place - group.back, entry) for entry in group.base[:, 0].tolist())
    return sizes, tables


def _saved(store: ClusteredPages, role: str, choices: dict[tuple[int, int, int], Choice]) -> float:
    codec, page = store.codecs[role], store.page_size
    return sum(plain_bytes(codec, page) - member_bytes(codec, page, choice.nbits) for choice in choices.values())


def _overhead(store: ClusteredPages, place: int) -> float:
    """Bytes that making a slab a shared one adds."""
    slab = store.slabs[place]
    if isinstance(slab, SharedSlab):
        return 0.0
    pages = slab.capacity // store.page_size
    a_page = PAGE_BYTES + (2 if store.codecs["key"].wants_positions else 0)
    return 2.0 * len(store.counts) * store.heads * (pages * a_page + 4)


# -- storing -----------------------------------------------------------------------------------------------------------


def _store(
    store: ClusteredPages, run: Pass, role: str, number: int, low: int, chosen: dict[tuple[int, int, int], Choice]
) -> None:
    """Put chosen pages of a shared slab where they belong."""
    pool, page = store.slabs[number].pools[role], store.page_size  # type: ignore[attr-defined]
    begin, index = store.slabs[number].start, {row: i for i, row in enumerate(run.rows)}
    kinds = sorted(chosen.items(), key=lambda c: (c[1].nbits, c[1].tried.slab))
    for (nbits, place), own in groupby(kinds, key=lambda c: (c[1].nbits, c[1].tried.slab)):
        group = list(own)
        bases = store.slabs[place].pools[role].table  # type: ignore[attr-defined]
        members = []
        for at, choice in group:
            t = choice.tried
            if _is_reference(choice, number):
                pool.table[at[0], at[2], at[1]] = bases[t.base_row, choice.head, t.base_page]
            else:
                members.append(
                    (*at, t.base_row, choice.head, t.base_page, t.base_page + (t.offset > 0), t.offset, t.shift)
                )
        if not members:
            continue
        row, own_page, head, base_row, base_head, p0, p1, offset, shift = torch.tensor(
            members, device=store.device
        ).unbind(1)
        entries = [bases[base_row, base_head, p].long() for p in (p0, p1)]
        base = narrow(torch.stack([*entries, offset], dim=1))
        which = torch.tensor([index[r] for r in row.tolist()], device=store.device)
        tokens = (begin + own_page * page - run.start)[:, None] + torch.arange(page, device=store.device)
        x = run.exact[role][which[:, None], head[:, None], tokens].float()
        owners = pool.owners[row, head]
        span = store.slabs[place].pools[role].span(base, shift)  # type: ignore[attr-defined]
        packed: Packed = encode_page(x, span, None if nbits == 0 else pool.spread(owners), nbits)[0]
        made = Members(nbits, number - place, base, narrow(shift), owners, packed)
        pool.add_members(torch.stack([row, head, own_page], dim=1), made)
