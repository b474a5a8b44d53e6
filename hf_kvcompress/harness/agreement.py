"""How long two outputs agree, and how much they have in common."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int:
    """The first token that differs; the length if none does."""
    for index, (a, b) in enumerate(zip(reference, other, strict=True)):
        if a != b:
            return index
    return len(reference)


@cache
def _scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        return None
    return rouge_scorer.RougeScorer(["rougeL"])


def rouge_l(reference: str, other: str) -> float | None:
    """F-measure of the longest common subsequence of words (rouge-score); None where that is not installed."""
    scorer = _scorer()
    if scorer is None:
        return None
    if reference == other:  # it knows ASCII words only, and would call two equal texts without any unequal
        return 1.0
    return float(scorer.score(reference, other)["rougeL"].fmeasure)


def normalised(text: str) -> str:
    """As SQuAD does: lower case, without punctuation and articles, single spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def token_f1(prediction: str, reference: str) -> float:
    """F-measure of the words that two texts share."""
    own, right = normalised(prediction).split(), normalised(reference).split()
    shared = sum((Counter(own) & Counter(right)).values())
    if not own or not right:
        return float(own == right)
    return 2 * shared / (len(own) + len(right))
