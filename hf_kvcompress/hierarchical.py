"""Tiers of precision by importance: what matters stays exact, the rest moves to fewer bits and may come back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .cache import CompressedCache
from .codecs.registry import make_codec, parse
from .config import expect
from .policies.settings import HOST

ENABLE, RATIO, LEVELS = (f"HF_KVCOMPRESS_{name}" for name in ("ENABLE", "RATIO", "LEVELS"))
#: four bits by equalised rotation: groups of plain `int4` cost a 270M model 15 % of its perplexity, these 0.2 %
LADDER = ("identity", "int8", "eqrot4", "eqrot2")
_EXACT = 16.0  # bits of a number that the ratio is counted from


def level_bits(levels: Sequence[str], dim: int = 128, segment: int = 2048) -> list[float]:
    """Bits a number of each level, statistics of a full segment included; host memory costs the device nothing."""
    bits = []
    for name in levels:
        if name == HOST:
            bits.append(0.0)
            continue
        roles = (make_codec(name, role, dim, page_size=64, dtype=torch.bfloat16) for role in ("key", "value"))  # type: ignore
        bits.append(sum(codec.bits(segment) for codec in roles) / 2)
    return bits


def share_tokens_by_ratio(bits: Sequence[float], ratio: float) -> list[float]:
    """Parts of the tokens for levels with these bits, rising or falling evenly, whose mean is `ratio` times 16 bits.

    Each level holds `exp(x)` times the one above it; x follows from the ratio. A ratio beyond the first or last level
    gives all tokens to that one.
    """
    target = ratio * _EXACT

    def shares(x: float) -> list[float]:
        weights = [math.exp(x * level - max(0.0, x * (len(bits) - 1))) for level in range(len(bits))]
        return [weight / sum(weights) for weight in weights]

    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        mean = sum(part * b for part, b in zip(shares(middle), bits, strict=True))
        low, high = (middle, high) if mean > target else (low, middle)
    return shares((low + high) / 2)


class HierarchicalCache(CompressedCache):
    """Levels of precision by importance, with promotion and demotion; nothing is ever dropped.

    The first level holds sinks, the recent window and what scores highest; each level below takes what the one above
    has no room for, in fewer bits, and hands back what has become important: at most a page of a head a round, and only
    tokens that are clear of the boundary by `hysteresis`. Scores are those of the policy "importance". Texts of up to
    `min_length` tokens stay in the first level. Needs `enable(model)` as long as attention has a weight.

    Args:
        levels: a codec for each level, the last may be "cpu" (host memory); by default as many of `identity`, `int8`,
            `eqrot4`, `eqrot2` as HF_KVCOMPRESS_LEVELS says (3).
        ratio: bytes aimed at, as a part of 16 bits a number, by default HF_KVCOMPRESS_RATIO (0.5). It decides
        shares: parts of the tokens seen for all levels but the last, if they are not given.
        weights: of magnitude, learned and attention in the importance, 0.4, 0.4 and 0.2 by default.
        predictor: weights that `kvcompress train-policy` wrote, for the learned part.
        hysteresis: part of a level's places that tokens from below do not compete for.
        min_length: tokens up to which everything stays in the first level.
        keep_exact: bytes of host memory ("8MB") that each layer may take for exact copies of what it demotes, so that
            what is promoted is what the first level held, bit for bit. "auto": 8 MB on a device, nothing on CPU, where
            a copy takes what demoting has saved.

    HF_KVCOMPRESS_ENABLE=0 leaves all tokens in the first level.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        levels: Sequence[str] | None = None,
        ratio: float | None = None,
        shares: Sequence[float] | None = None,
        weights: Mapping[str, float] | None = None,
        predictor: str | Path | None = None,
        hysteresis: float = 0.05,
        min_length: int = 128,
        keep_exact: int | str = "auto",
        **settings: Any,
    ):
        levels = LADDER[: _levels_from_environment()] if levels is None else tuple(levels)
        if not levels or levels[0] == HOST:
            raise expect("levels", "one codec or more, the first of them no host memory", levels)
        for name in levels:
            if name != HOST:
                parse(name, "levels")
        ratio = _ratio_from_environment() if ratio is None else ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise expect("ratio", "a number above 0 and up to 1", ratio)
        if shares is None:
            shares = share_tokens_by_ratio(level_bits(levels), ratio)[:-1]
        elif len(shares) != len(levels) - 1 or min(shares, default=0.5) <= 0 or sum(shares) >= 1:
            raise expect("shares", f"{len(levels) - 1} parts above 0 with a sum below 1", shares)
        own: dict[str, Any] = {"codec": levels[0]}
        if len(levels) > 1 and os.environ.get(ENABLE, "1") not in ("0", "false", "False"):
            options = {"weights": weights, "predictor": predictor}
            own |= {
                "policy": "importance",
                "policy_options": {name: option for name, option in options.items() if option is not None},
                "budget": float(shares[0]),
                "demote_to": levels[1:],
                "demote_budget": (*map(float, shares[1:]), None),
                "max_tokens": min_length,
                "hysteresis": hysteresis,
                "keep_exact": keep_exact,
            }
        super().__init__(config, **{**own, **settings})

    @property
    def levels(self) -> tuple[str, ...]:
        """A codec for each level; the last may be "cpu"."""
        default = self.settings.default
        return (default.keys, *(default.eviction.tiers if default.eviction is not None else ()))

    @property
    def shares(self) -> tuple[Any, ...]:
        """Parts of the tokens seen for all levels but the last."""
        eviction = self.settings.default.eviction
        return () if eviction is None else (eviction.budget, *eviction.tier_budgets[:-1])


def _levels_from_environment() -> int:
    text = os.environ.get(LEVELS, "3")
    if not text.isdecimal() or not 1 <= int(text) <= len(LADDER):
        raise expect(LEVELS, f"a whole number from 1 to {len(LADDER)}", text)
    return int(text)


def _ratio_from_environment() -> float:
    text = os.environ.get(RATIO, "0.5")
    try:
        return float(text)
    except ValueError:
        raise expect(RATIO, "a number above 0 and up to 1", text) from None
