"""Names of prefixes: a chain of hashes over blocks of token ids, rooted in everything that decides what pages hold."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

Tokens = tuple[int, ...]


def digest(data: bytes) -> str:
    """128 bits, as text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def root_of(told: Mapping[str, Any]) -> str:
    """The hash that a chain begins with: model, revision, dtype, RoPE and codec settings, salt."""
    return digest(json.dumps(told, sort_keys=True, default=str).encode())


def chain(root: str, tokens: Sequence[int], block_size: int) -> list[str]:
    """A hash for the end of every whole block; each stands for all tokens before it as well."""
    hashes, last = [], root
    for start in range(0, len(tokens) - block_size + 1, block_size):
        last = digest(last.encode() + array("q", tokens[start : start + block_size]).tobytes())
        hashes.append(last)
    return hashes


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences have in common from their beginning."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    low, high = 0, length  # first[:low] are equal, first[:high] are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low
