"""Settings of eviction in one layer: validated, frozen, JSON-ready."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .base import Policy
from .registry import make_policy

UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
HOST = "cpu"
_OR = {"budget": ", tokens or a ratio"}


def parse_bytes(text: str, name: str = "budget") -> int:
    """Bytes of "64MB", "1.5 GB" ...: powers of 1024. Raises ValueError, with `name`, for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{name}: expected bytes such as '64MB'{_OR.get(name, '')}, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper() + "B"])


def _refuse(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got!r}")


def _ranges(pin: object) -> Sequence[object]:
    if isinstance(pin, str) or not isinstance(pin, Sequence):
        raise _refuse("pin", "a list of ranges (start, end)", pin)
    return pin


def _range(pair: object) -> tuple[int, int]:
    expected = "ranges (start, end) of whole numbers with 0 <= start < end"
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(number) is int for number in pair):
        raise _refuse("pin", expected, pair)
    start, end = pair
    if not 0 <= start < end:
        raise _refuse("pin", expected, (start, end))
    return start, end


@dataclass(frozen=True)
class EvictionConfig:
    """Which tokens one layer keeps.

    Args:
        policy: name of the score (or a `Policy`); the highest scores stay.
        policy_options: the policy's own settings.
        budget: tokens kept by a key-value head on average, sinks and recent window included (whole number), or their
            part of the tokens seen (0 to 1); None keeps all.
        budget_bytes: bytes that the layer may hold in all; the tokens follow from it once the batch is known.
        max_tokens: nothing is evicted from a row before it has seen more.
        recent: part of the budget that belongs to the newest tokens, whatever their score.
        head_budget: "uniform", or "adaptive": the heads of a layer compete for one budget (Ada-KV, arXiv 2407.11550).
        head_floor: part of its even share that every head keeps under "adaptive".
        chunk_size: tokens in a row that are scored together, by their mean (ChunkKV, arXiv 2502.00299).
        merge: fold an evicted value into the surviving token whose key is most similar (CaM, D2O).
        pin: ranges of tokens `(start, end)`, counted from a row's first, that always stay.
        pin_prompt: the first pass (True) or its first tokens (a number) always stay.
        boundary: part of the tokens seen, at the beginning and at the end, that stays whatever its score.
        demote_to: instead of being deleted, tokens move to this codec, or to host memory ("cpu"), and may come back; a
            sequence of codecs, the last of which may be "cpu", is as many tiers.
        demote_budget: tokens a head holds there at most, or their part of the tokens seen; None is no limit. One for
            every tier where there are several.
        hysteresis: part of a tier's places that tokens from below do not compete for, so that none go to and fro.
        fetch_pages: pages of the host tier that a pass reads, those with the highest bound on their scores.
        keep_exact: bytes of host memory ("8MB") that each layer may take for copies of what it demotes, in the codes
            of the first level, so that what comes back has lost nothing; the oldest go first. "auto": 8 MB where the
            model is not in host memory itself, else nothing.
    """

    policy: str | Policy = "h2o"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | float | None = None
    budget_bytes: int | None = None
    max_tokens: int = 0
    recent: float = 0.25
    head_budget: str = "uniform"
    head_floor: float = 0.2
    chunk_size: int = 1
    merge: bool = False
    pin: tuple[tuple[int, int], ...] = ()
    pin_prompt: bool | int = False
    boundary: float = 0.0
    demote_to: str | Sequence[str] | None = None
    demote_budget: int | float | None | Sequence[int | float | None] = None
    hysteresis: float = 0.0
    fetch_pages: int = 4
    keep_exact: int | str = 0

    def __post_init__(self) -> None:
        policy = self.make_policy()
        object.__setattr__(self, "pin", tuple(_range(pair) for pair in _ranges(self.pin)))
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float | None):
            raise _refuse("budget", "tokens (a whole number), a ratio between 0 and 1, or None", self.budget)
        most = 1 if isinstance(self.budget, float) else math.inf
        if self.budget is not None and not 0 < self.budget <= most:
            raise _refuse("budget", "tokens (a whole number above 0) or a ratio above 0 and up to 1", self.budget)
        for name in ("recent", "head_floor", "hysteresis"):
            part = getattr(self, name)
            if not isinstance(part, int | float) or not 0 <= part <= 1:
                raise _refuse(name, "a number from 0 to 1", part)
        if not isinstance(self.boundary, int | float) or not 0 <= self.boundary < 0.5:
            raise _refuse("boundary", "a number from 0 to below 0.5", self.boundary)
        if self.head_budget not in ("uniform", "adaptive"):
            raise _refuse("head_budget", "'uniform' or 'adaptive'", self.head_budget)
        if self.head_budget == "adaptive" and policy.shared:
            raise _refuse("head_budget", f"'uniform' for policy {policy.name!r}, whose heads agree", self.head_budget)
        for name, least in (("max_tokens", 0), ("chunk_size", 1), ("fetch_pages", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _refuse(name, f"a whole number of at least {least}", value)
        if not isinstance(self.pin_prompt, int) or self.pin_prompt < 0:
            raise _refuse("pin_prompt", "True, False or a whole number of tokens", self.pin_prompt)
        if self.merge and self.demote_to is not None:
            raise _refuse("merge", "False beside demote_to, which loses no token to be merged", self.merge)
        self._check_tiers()
        if isinstance(self.keep_exact, str) and self.keep_exact != "auto":
            object.__setattr__(self, "keep_exact", parse_bytes(self.keep_exact, "keep_exact"))
        kept = self.keep_exact
        if kept != "auto" and (isinstance(kept, bool) or not isinstance(kept, int) or kept < 0):
            raise _refuse("keep_exact", "bytes, as a whole number or such as '8MB', or 'auto'", kept)

    def _check_tiers(self) -> None:
        tiers, budgets = self.demote_to, self.demote_budget
        if isinstance(tiers, Sequence) and not isinstance(tiers, str):
            object.__setattr__(self, "demote_to", tuple(tiers))
        if isinstance(budgets, Sequence) and not isinstance(budgets, str):
            object.__setattr__(self, "demote_budget", tuple(budgets))
            if len(budgets) != len(self.tiers):
                raise _refuse("demote_budget", f"one for each of {len(self.tiers)} tiers", budgets)
        if HOST in self.tiers[:-1]:
            raise _refuse("demote_to", f"{HOST!r} as the last tier only", tiers)
        for budget in self.tier_budgets:
            whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
            if budget is not None and not whole and not (isinstance(budget, float) and 0 < budget <= 1):
                expected = "a whole number of at least 1, a part of the tokens above 0 and up to 1, or None"
                raise _refuse("demote_budget", expected, budget)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Codecs of the tiers below the first, or "cpu"."""
        if self.demote_to is None:
            return ()
        return (self.demote_to,) if isinstance(self.demote_to, str) else tuple(self.demote_to)

    @property
    def tier_budgets(self) -> tuple[int | float | None, ...]:
        """Tokens a head, or their part, of each of `tiers`."""
        if isinstance(self.demote_budget, Sequence):
            return tuple(self.demote_budget)
        return (self.demote_budget,) * len(self.tiers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a policy of your own stands there by its name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["policy"] = self.policy if isinstance(self.policy, str) else self.policy.name
        for name in ("demote_to", "demote_budget"):
            own[name] = list(own[name]) if isinstance(own[name], tuple) else own[name]
        return {**own, "policy_options": dict(self.policy_options), "pin": [list(pair) for pair in self.pin]}

    def make_policy(self) -> Policy:
        return make_policy(self.policy, self.policy_options)

    @property
    def uniform_heads(self) -> bool:
        """All heads of a row hold equally many tokens."""
        return self.head_budget == "uniform"
