"""Plots, pandas and HTML of a report."""

import pytest

from hf_kvcompress.harness import Report
from hf_kvcompress.harness.plots import front, save_plots, side_by_side
from hf_kvcompress.harness.specs import BASELINE

CACHES = {BASELINE: (400, 0.0, 10.0), "a": (100, 0.01, 12.0), "b": (50, 0.1, 15.0), "c": (120, 0.2, 9.0)}


@pytest.fixture
def report():
    rows = []
    for cache, (nbytes, kl, rate) in CACHES.items():
        for seed in range(2):
            own = {"seed": seed, "cache": cache}
            kl_values = {"kl": kl * (1 + seed), "perplexity": 5.0, "top1": 1.0}
            rows += [
                {**own, "unit": f"g{seed}", "measure": "generation", "name": "prose", "values": {"nbytes": nbytes}},
                {**own, "unit": f"p{seed}", "measure": "perplexity", "name": "chunk:prose", "values": kl_values},
                {**own, "unit": f"s{seed}", "measure": "speed", "name": "decode", "values": {"decode_rate": rate}},
            ]
    return Report({"caches": list(CACHES)}, rows, {"c": "<slow>"}, 1.0)


def test_the_front_is_what_nothing_beats():
    points = [(1, 5), (2, 3), (3, 4), (4, 1), (4, 2)]
    assert front(points, more_y=False) == [0, 1, 3]
    assert front(points, more_y=True) == [0]
    assert front(points, more_y=True, more_x=True) == [0, 2, 4]


def test_means_and_spreads(report):
    kl = report.summary()["a"]["KL"]
    assert kl["mean"] == pytest.approx(0.015) and kl["std"] == pytest.approx(0.01 / 2**0.5) and kl["n"] == 2
    assert "| a | 0.00 | 5.00 | 0.0150 ± 0.0071 | 1.000 | 12.0 |" in report.markdown()
    assert "c: <slow>" in report.markdown() and "MB" in report._repr_html_()


def test_plots_are_written(report, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    assert [path.name for path in save_plots(report, tmp_path)] == ["quality.png", "speed.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    axes = report.plot().axes[0]
    assert axes.get_yscale() == "log" and {t.get_text() for t in axes.texts} == {"a", "b", "c"}
    assert {t.get_text() for t in report.plot("decode tok/s").axes[0].texts} == set(CACHES)
    with pytest.raises(ValueError, match="column: expected one of MB, PPL, KL, top-1, decode tok/s, got 'tasks'"):
        report.plot("tasks")


def test_plots_side_by_side_share_markers_and_a_legend(report):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = side_by_side(report, [("KL", "MB"), ("decode tok/s", "MB")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CACHES)
    left, right = ([c.lines[0].get_marker() for c in axes.containers] for axes in figure.axes)
    assert left == right[1:] and len(set(right)) == len(CACHES) and not figure.axes[0].texts


def test_a_report_as_a_data_frame(report):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = report.to_pandas()
    assert list(frame.index) == list(CACHES)
    assert frame.loc["b", "KL"] == pytest.approx(0.15) and frame.loc["b", "decode tok/s std"] == 0
