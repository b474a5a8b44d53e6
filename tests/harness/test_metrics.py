"""Metrics of `evaluate` that need no network."""

import json
import socket

import pytest

evaluate = pytest.importorskip("evaluate", reason="the eval extra is not installed")

from hf_kvcompress.harness.metrics import METRICS, ExactMatch, FirstDivergence, RougeL, TokenF1  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_answers():
    given, wanted = ["The Paris.", "in Rome", ""], ["paris", "Rome", "Oslo"]
    assert ExactMatch().compute(predictions=given, references=wanted) == {"exact_match": pytest.approx(1 / 3)}
    assert TokenF1().compute(predictions=given, references=wanted) == {"f1": pytest.approx((1 + 2 / 3 + 0) / 3)}
    several = [["paris", "lyon"], ["milan", "in rome"], ["oslo"]]
    assert ExactMatch().compute(predictions=given, references=several) == {"exact_match": pytest.approx(2 / 3)}


def test_rouge():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    own = RougeL().compute(predictions=["a b c d"], references=["a c d e"])
    assert own == {"rouge_l": pytest.approx(0.75)}


def test_token_sequences():
    found = FirstDivergence().compute(predictions=[[1, 2, 3, 4], [5, 6]], references=[[1, 2, 0, 4], [5, 6]])
    assert found == {"first_divergence": 2.0, "same_tokens": 0.875}


def test_combined_and_saved(tmp_path):
    both = evaluate.combine([ExactMatch(), TokenF1()])
    found = both.compute(predictions=["a wall", "green"], references=["wall", "blue"])
    assert found == {"exact_match": 0.5, "f1": 0.5}
    file = evaluate.save(tmp_path, **found)
    assert json.loads(file.read_text())["f1"] == 0.5


def test_metrics_can_be_added_to_one_by_one():
    for kind in METRICS.values():
        assert isinstance(kind(), evaluate.Metric)
    metric = ExactMatch()
    metric.add(prediction="Rome", reference="rome")
    metric.add_batch(predictions=["x"], references=["y"])
    assert metric.compute() == {"exact_match": 0.5}
