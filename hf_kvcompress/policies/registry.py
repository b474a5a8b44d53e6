"""Policies by name. A new policy is one file and one line of `POLICIES`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from .base import Policy
from .expected import ExpectedAttentionPolicy
from .h2o import H2OPolicy
from .importance import ImportancePolicy
from .keydiff import KeyDiffPolicy
from .learned import LearnedPolicy
from .random import RandomPolicy
from .rkv import RKVPolicy
from .snapkv import SnapKVPolicy
from .streaming import StreamingPolicy
from .tova import TOVAPolicy
from .video import VideoPolicy

POLICIES: dict[str, type[Policy]] = {
    "streaming": StreamingPolicy,
    "h2o": H2OPolicy,
    "snapkv": SnapKVPolicy,
    "tova": TOVAPolicy,
    "expected": ExpectedAttentionPolicy,
    "keydiff": KeyDiffPolicy,
    "rkv": RKVPolicy,
    "random": RandomPolicy,
    "learned": LearnedPolicy,
    "video": VideoPolicy,
    "importance": ImportancePolicy,
}


def make_policy(policy: str | Policy, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy called `policy`, with its own settings in `options`; a policy of your own is taken as it is.

    Raises ValueError naming the argument, what was expected and what came.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        near = get_close_matches(str(policy), POLICIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)} or a Policy, got {policy!r}{hint}")
    if not isinstance(options, Mapping | None):
        raise ValueError(f"policy_options: expected a mapping of the policy's own settings, got {options!r}")
    known = [name for name in signature(POLICIES[policy]).parameters if name not in ("args", "kwargs")]
    for name in options or {}:
        if name not in known:
            expected = " or ".join(known) or "none"
            raise ValueError(f"policy_options: expected {expected} for policy {policy!r}, got {name!r}")
    try:
        return POLICIES[policy](**(options or {}))
    except TypeError as error:
        raise ValueError(f"policy_options: {str(error).split(') ', 1)[-1]} for policy {policy!r}") from None
