"""Plots, HTML and tables of a report."""

import json
import re

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.analysis import AnalysisReport, Prompt
from hf_kvcompress.integrations.recall_model import load_recall_model


@pytest.fixture(scope="module")
def report():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(16, 48, (1, 200), generator=draw)
    twice = torch.cat([ids, ids[:, :150]], dim=1)
    return kvc.analyze(
        load_recall_model(), None, [Prompt("<once>", ids), Prompt("twice", twice)], max_tokens=0, thresholds=(0.8, 0.9)
    )


@pytest.mark.parametrize("name", ["similarity_distribution", "layer_similarity", "compression_opportunities"])
def test_plots_have_titles_and_units_and_need_no_colour(report, name):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = report.plot(name)
    assert figure.axes
    for axes in figure.axes:
        assert axes.get_title()
        outer = axes.get_subplotspec()
        assert axes.get_xlabel() or name.endswith("distribution") and not outer.is_last_row()
        assert axes.get_ylabel() or name.endswith("distribution") and not outer.is_first_col()
        named = [line for line in axes.lines if not line.get_label().startswith("_")]
        looks = {
            (line.get_linestyle(), str(line.get_marker()), str(line.get_markerfacecolor()) == "white") for line in named
        }
        assert named and len(looks) == len(named), "two lines that only colour tells apart"


def test_plots_of_a_report_without_measurements(report):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    bare = AnalysisReport({**report.to_dict(), "measured": {"alone": [], "batch": []}, "neighbouring_layers": []})
    for name in ("compression_opportunities", "layer_similarity"):
        texts = [text.get_text() for axes in bare.plot(name).axes for text in axes.texts]
        assert len(texts) == 1 and ("nothing was measured" in texts[0] or "nothing of this kind" in texts[0])


def test_the_html_file_stands_alone_and_is_the_same_again(report, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    paths = report.save(tmp_path)
    written = {path.name for path in paths}
    plots = {"similarity_distribution.png", "layer_similarity.png", "compression_opportunities.png"}
    assert written == {"analysis_report.json", "analysis_report.html", *plots}
    page = (tmp_path / "analysis_report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert "&lt;once&gt;" in page and "<once>" not in page
    assert report.recommendation["code"].replace("'", "&#39;") in page
    assert page.count("<tr>") == page.count("</tr>") > 20
    for name in plots:
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in AnalysisReport.load(tmp_path).save(tmp_path)] == before


def test_without_the_extra_only_json_is_written(report, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert [path.name for path in report.save(tmp_path)] == ["analysis_report.json"]


def test_json_is_strict(report):
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["schema"] == "hf_kvcompress.analysis"


def test_a_notebook_shows_findings_and_tables(report):
    html = report._repr_html_()
    assert html.count("<table>") == 3 and "Recommended" in html and "&lt;" not in html.split("<table>")[0]
    lines = repr(report).splitlines()
    assert lines[0].startswith("llama: 2 prompts") or "2 prompts" in lines[0]
    assert any(line.startswith("Keys before RoPE: the nearest earlier page has cosine") for line in lines)


def test_pandas_has_a_row_a_head_and_kind(report):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = report.to_pandas()
    heads = sum(shape["heads"] for shape in report["model"]["layers"])
    assert len(frame) == 3 * heads and frame.index.names == ["layer", "head", "kind"]
    row = report["heads"][5]
    own = frame.loc[(row["layer"], row["head"], row["kind"])]
    assert own["nearest_within cosine"] == row["compared"]["nearest_within"]["cosine"]["mean"]
    assert own["effective_rank"] == row["channels"]["effective_rank"]


def test_an_unknown_plot_is_named(report):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    with pytest.raises(ValueError, match="name: expected one of similarity_distribution, .* got 'similarity'"):
        report.plot("similarity")
