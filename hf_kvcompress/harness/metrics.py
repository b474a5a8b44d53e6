"""Metrics of the `evaluate` library that load without a network, because they are classes and not names on the hub.

Use them directly, `metric.compute(predictions=..., references=...)`, or with `evaluate.combine` and `evaluate.save`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import datasets
import evaluate

from .agreement import first_divergence, normalised, rouge_l, token_f1

WORD = "string"


class _TextMetric(evaluate.Metric):
    """Mean over pairs of texts; a reference may be several, of which the best counts."""

    name = ""
    what = ""

    def _info(self) -> evaluate.MetricInfo:
        many = datasets.Features(
            {"predictions": datasets.Value(WORD), "references": datasets.Sequence(datasets.Value(WORD))}
        )
        one = datasets.Features({"predictions": datasets.Value(WORD), "references": datasets.Value(WORD)})
        return evaluate.MetricInfo(description=self.what, citation="", inputs_description="", features=[many, one])

    @abstractmethod
    def _of_pair(self, prediction: str, reference: str) -> float: ...

    def _compute(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
        scores = [
            max(self._of_pair(own, right) for right in ([wanted] if isinstance(wanted, str) else wanted))
            for own, wanted in zip(predictions, references, strict=True)
        ]
        return {self.name: sum(scores) / len(scores)}


class ExactMatch(_TextMetric):
    """Part of the predictions that equal a reference, case, punctuation and articles apart."""

    name, what = "exact_match", "Part of the predictions that equal a reference."

    def _of_pair(self, prediction: str, reference: str) -> float:
        return float(normalised(prediction) == normalised(reference))


class TokenF1(_TextMetric):
    """Mean F-measure of the words that a prediction shares with its reference."""

    name, what = "f1", "F-measure of shared words."

    def _of_pair(self, prediction: str, reference: str) -> float:
        return token_f1(prediction, reference)


class RougeL(_TextMetric):
    """Mean F-measure of the longest common subsequence of words. Needs rouge-score."""

    name, what = "rouge_l", "F-measure of the longest common subsequence."

    def _of_pair(self, prediction: str, reference: str) -> float:
        found = rouge_l(reference, prediction)
        if found is None:
            raise ImportError("RougeL needs rouge-score: pip install 'hf_kvcompress[eval]'")
        return found


class FirstDivergence(evaluate.Metric):
    """Mean number of equal tokens before two outputs differ, and the part of places where they are equal."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(
            description="Agreement of token sequences.", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "first_divergence": sum(first_divergence(b, a) for a, b in pairs) / len(pairs),
            "same_tokens": sum(sum(x == y for x, y in zip(a, b, strict=True)) / len(a) for a, b in pairs) / len(pairs),
        }


METRICS: dict[str, type[evaluate.Metric]] = {
    "exact_match": ExactMatch,
    "f1": TokenF1,
    "rouge_l": RougeL,
    "first_divergence": FirstDivergence,
}
