"""What pages are like, which ones are alike, and how far apart two of them are.

Looking for similar pages never holds a number for every pair of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import kernels
from .library import register
from .numeric import clean_
from .packing import pack
from .quantize import DTYPES

SKETCH = 64
MOST_NEAREST = 16
_TOKEN_SHIFT = 7  # as in the kernel
_NUMBERS = 1 << 24  # that the reference holds at once
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class PageFeatures:
    """Features `[P, 2 D + 1 + S]` float32 and their parts."""

    all: torch.Tensor
    dim: int

    @property
    def mean(self) -> torch.Tensor:
        return self.all[:, : self.dim]

    @property
    def std(self) -> torch.Tensor:
        return self.all[:, self.dim : 2 * self.dim]

    @property
    def norm(self) -> torch.Tensor:
        return self.all[:, 2 * self.dim]

    @property
    def sketch(self) -> torch.Tensor:
        """Random projections: their cosines estimate those of the pages, token by token."""
        return self.all[:, 2 * self.dim + 1 :]


@dataclass(frozen=True)
class PairSums:
    """Of pairs of pages x, y: squared norms, inner product and squared distance, `[M]` float32 each."""

    x: torch.Tensor
    y: torch.Tensor
    product: torch.Tensor
    distance: torch.Tensor

    @property
    def cosine(self) -> torch.Tensor:
        """0 where a page is 0."""
        size = self.x.sqrt() * self.y.sqrt()
        return torch.where(size > 0, self.product / size, 0.0)

    @property
    def relative_l2(self) -> torch.Tensor:
        """`|x - y| / |x|`, inf where only x is 0."""
        return torch.where(self.distance > 0, (self.distance / self.x).sqrt(), 0.0)


@register("Tensor pages, Tensor(a!) out, int sketch, int seed")
def features_into(pages: torch.Tensor, out: torch.Tensor, sketch: int, seed: int) -> None:
    """`page_features` by the kernel, into `out` `[P, 2 D + 1 + sketch]`."""
    count, tokens, dim = pages.shape
    if count == 0:
        return
    kernel = kernels.load("page_features.cu", "page_features")
    kernel((count,), 128, [pages.contiguous(), out, tokens, dim, sketch, seed, DTYPES[pages.dtype]], like=pages)


@register("Tensor pages, Tensor others, Tensor pairs, Tensor(a!) sums")
def pairs_into(pages: torch.Tensor, others: torch.Tensor, pairs: torch.Tensor, sums: torch.Tensor) -> None:
    """`pair_sums` by the kernel, into `sums` `[M, 4]`."""
    if len(pairs) == 0:
        return
    kernel = kernels.load("page_features.cu", "page_pairs")
    args: list[kernels.Argument] = [
        pages.contiguous(),
        others.contiguous(),
        pairs.contiguous(),
        sums,
        pages[0].numel(),
        DTYPES[pages.dtype],
    ]
    kernel((len(pairs),), 128, args, like=pages)


@register("Tensor rows, Tensor pool, Tensor(a!) values, Tensor(b!) found, bool own, bool earlier, bool hamming")
def nearest_into(
    rows: torch.Tensor,
    pool: torch.Tensor,
    values: torch.Tensor,
    found: torch.Tensor,
    own: bool,
    earlier: bool,
    hamming: bool,
) -> None:
    """The rows of a pool that are nearest to each row, `[Q, k]`: inner products of float32 or bits of int32 words."""
    if len(rows) == 0:
        return
    kernel = kernels.load("page_nearest.cu", "page_nearest", HAMMING=int(hamming))
    args: list[kernels.Argument] = [
        rows.contiguous(),
        pool.contiguous(),
        values,
        found,
        len(rows),
        len(pool),
        rows.shape[1],
    ]
    kernel((-(-len(rows) // 64),), (16, 16), [*args, values.shape[1], 0 if own else -1, int(earlier)], like=rows)


def page_features(pages: torch.Tensor, sketch: int = SKETCH, seed: int = 0) -> PageFeatures:
    """Mean and standard deviation of every channel, norm and sketch of pages `[P, T, D]`; non-finite numbers are 0."""
    _check_pages("pages", pages)
    count, tokens, dim = pages.shape
    out = torch.empty(count, 2 * dim + 1 + sketch, device=pages.device)
    if kernels.serves(pages):
        features_into(pages, out, sketch, seed)
        return PageFeatures(out, dim)
    signs, place = _projection(tokens, dim, sketch, seed, pages.device)
    step = max(_NUMBERS // (tokens * dim), 1)
    for start in range(0, count, step):
        x = clean_(pages[start : start + step].to(torch.float32, copy=True))
        part = out[start : start + step]
        part[:, :dim], part[:, dim : 2 * dim] = x.mean(1), x.std(1, unbiased=False)
        part[:, 2 * dim] = torch.linalg.vector_norm(x, dim=(1, 2))
        projected = x.new_zeros(len(x), sketch)
        part[:, 2 * dim + 1 :] = projected.index_add_(1, place, x.flatten(1) * signs) if sketch else projected
    return PageFeatures(out, dim)


def sign_bits(sketch: torch.Tensor) -> torch.Tensor:
    """Signs of sketches `[P, S]`, 8 a byte: `[P, 4 * ceil(S / 32)]` uint8, as `nearest_signs` takes them."""
    padded = torch.nn.functional.pad((sketch >= 0).byte(), (0, -sketch.shape[1] % 32))
    return pack(padded, 1)[0]


def nearest(
    features: torch.Tensor, k: int, pool: torch.Tensor | None = None, earlier: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` rows of `pool` with the highest cosine for each row of `features` `[Q, F]`: values and rows `[Q, k]`.

    Without a pool each row is compared with all others, or with `earlier` with those before it. The most similar come
    first, of equal ones the lower row; where there are fewer than k, values are -inf and rows -1. A row of zeros has
    cosine 0 with all.
    """
    rows = torch.nn.functional.normalize(features.float(), dim=1)
    others = rows if pool is None else torch.nn.functional.normalize(pool.float(), dim=1)
    _check_nearest(rows, others, k, pool is None, earlier)
    return _nearest(rows, others, k, pool is None, earlier, hamming=False)


def nearest_signs(
    signs: torch.Tensor, k: int, pool: torch.Tensor | None = None, earlier: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest`, by the bits that differ between rows of packed signs `[Q, F]` uint8; fewer are nearer.

    Returns the distances `[Q, k]` int32, -1 where there is no row, and the rows.
    """
    if signs.dtype != torch.uint8 or signs.shape[1] % 4:
        raise ValueError(f"signs: expected [Q, 4 * n] uint8, got {list(signs.shape)} {signs.dtype}")
    words = signs.contiguous().view(torch.int32)
    others = words if pool is None else pool.contiguous().view(torch.int32)
    _check_nearest(words, others, k, pool is None, earlier)
    values, rows = _nearest(words, others, k, pool is None, earlier, hamming=True)
    return torch.where(rows < 0, -1, -values).to(torch.int32), rows


def pair_sums(pages: torch.Tensor, pairs: torch.Tensor, others: torch.Tensor | None = None) -> PairSums:
    """Exact comparison of the pages `[P, T, D]` at `pairs[:, 0]` with those of `others` at `pairs[:, 1]`.

    pairs: `[M, 2]` int64; others: the same pages by default.
    """
    others = pages if others is None else others
    _check_pages("pages", pages)
    if others.shape[1:] != pages.shape[1:] or others.dtype != pages.dtype:
        raise ValueError(f"others: expected pages like {list(pages.shape)}, got {list(others.shape)} {others.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs: expected [M, 2] int64, got {list(pairs.shape)} {pairs.dtype}")
    sums = torch.empty(len(pairs), 4, device=pages.device)
    numbers = pages.shape[1] * pages.shape[2]
    if kernels.serves(pages):
        pairs_into(pages, others, pairs, sums)
        return PairSums(*sums.unbind(1))
    step = max(_NUMBERS // numbers, 1)
    for start in range(0, len(pairs), step):
        own = pairs[start : start + step]
        x = clean_(pages[own[:, 0]].flatten(1).to(torch.float32, copy=True))
        y = clean_(others[own[:, 1]].flatten(1).to(torch.float32, copy=True))
        apart = (x - y).square_().sum(1)
        sums[start : start + step] = torch.stack([(x * x).sum(1), (y * y).sum(1), (x * y).sum(1), apart], dim=1)
    return PairSums(*sums.unbind(1))


def _projection(
    tokens: int, dim: int, sketch: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sign `[T * D]` of every number of a page, and which sum it goes to."""
    place = torch.arange(tokens * dim, device=device)
    h = (place * 0x9E3779B1 & _MASK) ^ (seed & _MASK)
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK
    signs = 1.0 - 2.0 * ((h ^ h >> 16) & 1)
    return signs, (place % dim + _TOKEN_SHIFT * (place // dim)) % max(sketch, 1)


def _nearest(
    rows: torch.Tensor, others: torch.Tensor, k: int, own: bool, earlier: bool, hamming: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    count, pool = len(rows), len(others)
    values = torch.full((count, k), -torch.inf, device=rows.device)
    found = torch.full((count, k), -1, dtype=torch.int32, device=rows.device)
    if kernels.serves(rows):
        nearest_into(rows, others, values, found, own, earlier, hamming)
        return values, found
    at = torch.arange(pool, device=rows.device)
    step = max(_NUMBERS // (max(pool, 1) * (rows.shape[1] if hamming else 1)), 1)
    for start in range(0, count, step):
        part = rows[start : start + step]
        scores = -_differing(part[:, None] ^ others).float() if hamming else part @ others.mT
        if own:
            self_at = torch.arange(start, start + len(part), device=rows.device)[:, None]
            scores.masked_fill_(at >= self_at if earlier else at == self_at, -torch.inf)
        best = scores.sort(dim=1, descending=True, stable=True)
        some = min(k, pool)
        values[start : start + step, :some] = best.values[:, :some]
        none = best.values[:, :some] == -torch.inf
        found[start : start + step, :some] = best.indices[:, :some].to(torch.int32).masked_fill_(none, -1)
    return values, found


def _differing(words: torch.Tensor) -> torch.Tensor:
    """Bits set in all int32 words of the last axis."""
    x = words.long() & _MASK
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101 & _MASK) >> 24).sum(-1)


def _check_pages(name: str, pages: torch.Tensor) -> None:
    if pages.dim() != 3 or pages.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected [P, T, D] float32, float16 or bfloat16, got {list(pages.shape)} {pages.dtype}"
        )


def _check_nearest(rows: torch.Tensor, pool: torch.Tensor, k: int, own: bool, earlier: bool) -> None:
    if not 1 <= k <= MOST_NEAREST:
        raise ValueError(f"k: expected 1 to {MOST_NEAREST}, got {k!r}")
    if pool.shape[1] != rows.shape[1]:
        raise ValueError(f"pool: expected {rows.shape[1]} columns, got {pool.shape[1]}")
    if earlier and not own:
        raise ValueError("earlier: expected False with a pool, whose rows are not in the features' order, got True")
