"""Running experiments: what is measured and written, failures, and taking a run up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from hf_kvcompress import cli
from hf_kvcompress.experiments import Experiment, ExperimentReport, run_experiments
from hf_kvcompress.experiments import report as report_module
from hf_kvcompress.experiments import run as run_module
from hf_kvcompress.experiments.measures import drawn
from hf_kvcompress.experiments.plots import bars
from hf_kvcompress.harness.specs import BASELINE

from ..tiny_model import byte_tokenizer, save_tiny, tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 4
CACHES = ("balanced", "identity")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def experiment(tiny, name="one", **changes):
    return Experiment(
        name, **{"prompts": [TEXT, TEXT[:30]], "model": tiny, "max_tokens": 6, "caches": CACHES, **changes}
    )


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    found = [
        experiment(tiny),
        experiment(tiny, "too long", max_model_len=100),
        experiment(tiny, "missing", model="no/such model"),
        experiment(tiny, "drawn", prompts=[TEXT], temperature=0.8, seed=1),
    ]
    return out, run_experiments(found, out)


def test_measures_of_every_cache(run, tiny):
    _, summary = run
    report = summary.reports[0]
    assert report.status == "finished" and report.prompt_tokens == [len(TEXT), 30]
    rows = report.measured.rows
    by = {measure: [r for r in rows if r["measure"] == measure] for measure in ("generation", "perplexity", "speed")}
    # a prompt of 30 tokens is too short to score; the clock runs on the longest prompt alone
    assert {m: sorted({r["seed"] for r in own}) for m, own in by.items()} == {
        "generation": [0, 1],
        "perplexity": [0],
        "speed": [0],
    }
    assert all([r["cache"] for r in own] == [BASELINE, *CACHES] * (len(own) // 3) for own in by.values())
    means = summary.means()["one"]
    # 2 layers, 2 heads of 16, keys and values, float32; prompt and answer, the last token of which is not fed
    nbytes = 2 * 2 * 16 * 2 * 4 * (len(TEXT) + 5)
    first, balanced = (own["values"] for own in by["generation"][:2])
    assert first["nbytes"] == nbytes and balanced["ratio"] == nbytes / balanced["nbytes"] > 1.5
    assert means["balanced"]["KL"] > 1e-5 > means["identity"]["KL"] and means["identity"]["same tokens"] == 1
    assert all(own["decode tok/s"] > 0 and own["prefill tok/s"] > 0 and own["peak MB"] > 0 for own in means.values())


def test_answers_are_those_of_generate(run, tiny):
    _, summary = run
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    given = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    (row,) = [
        r
        for r in summary.reports[0].measured.rows
        if r["measure"] == "generation" and r["seed"] == 0 and r["cache"] == BASELINE
    ]
    assert row["values"]["tokens"] == given
    assert summary.reports[0].answers[0]["identity"] == tokenizer.decode(given, skip_special_tokens=True)


def test_drawn_tokens_differ_from_greedy_ones_and_come_again(run, tiny, tmp_path):
    _, summary = run
    greedy, own = (
        [r["values"]["tokens"] for r in summary.reports[i].measured.rows if r["measure"] == "generation"][0]
        for i in (0, 3)
    )
    assert own != greedy and summary.means()["drawn"]["identity"]["same tokens"] == 1
    again = run_experiments([experiment(tiny, "drawn", prompts=[TEXT], temperature=0.8, seed=1)], tmp_path)
    assert again.reports[0].measured.rows[0]["values"]["tokens"] == own


def test_draws_follow_the_probabilities():
    choose, logits = drawn(2.0, 0), torch.tensor([[0.0, 1.0, 3.0]])
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=3) / 4000
    assert torch.allclose(counts, (logits[0] / 2).softmax(-1), atol=0.025)


def test_failures_are_recorded_and_the_others_run(run):
    out, summary = run
    assert [r.status for r in summary.reports] == ["finished", "failed", "failed", "finished"]
    long, missing = summary.failed
    assert long.reason == (
        f"max_model_len: expected prompt 1 ({len(TEXT)} tokens) and max_tokens to be at most 100 tokens, "
        f"got {len(TEXT) + 6}"
    )
    assert missing.reason.startswith("model: expected a folder or a name on the hub") and missing.traceback is None
    for report in summary.failed:
        written = json.loads((out / report.name / "report.json").read_text())
        assert written["status"] == "failed" and written["reason"] == report.reason
        assert f"Failed: {report.reason}" in (out / report.name / "report.md").read_text()
        assert f"{report.name} failed: {report.reason}" in (out / "summary.md").read_text()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"prompts": ["x" * 2050]}, r"prompt 1 \(2050 tokens\) and max_tokens: expected at most 2048 for this model"),
        ({"max_model_len": 4000}, "max_model_len: expected at most 2048 for this model, got 4000"),
        ({"prompts": ["x"]}, "prompts: expected at least 2 tokens in prompt 1, got 1"),
        ({"prompts": [[1, 400]]}, "prompts: expected token ids below 257 in prompt 1, got 400"),
        ({"model": "recall"}, "prompts: expected token ids in prompt 1, since the model has no tokenizer"),
        ({"caches": ["balanced:residual_length=-1"]}, "cache 'balanced:residual_length=-1': residual_length: expected"),
    ],
)
def test_what_cannot_run_says_why(tiny, tmp_path, changes, reason):
    (report,) = run_experiments([experiment(tiny, **changes)], tmp_path).reports
    assert report.status == "failed"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(report.reason)


def test_an_error_of_the_program_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    def broken(*args):
        args[3]("balanced")
        raise KeyError("nothing here")

    monkeypatch.setattr(run_module, "measure_unit", broken)
    (report,) = run_experiments([experiment(tiny)], tmp_path).reports
    assert report.reason == "balanced, generation of prompt 1: KeyError: 'nothing here'"
    assert "in broken" in json.loads((tmp_path / "one" / "report.json").read_text())["traceback"]


def test_a_report_that_cannot_be_written_ends_its_experiment_alone(tiny, tmp_path, monkeypatch):
    def broken(measured, folder):
        raise KeyError("no such colour")

    monkeypatch.setattr(report_module, "save_plots", broken)
    small = {"prompts": [TEXT[:40]], "caches": ("identity",), "max_tokens": 2}
    summary = run_experiments([experiment(tiny, "a", **small), experiment(tiny, "b", **small)], tmp_path)
    assert [r.reason for r in summary.reports] == ["report: KeyError: 'no such colour'"] * 2
    assert json.loads((tmp_path / "b" / "report.json").read_text())["status"] == "failed"


def test_what_is_written(run):
    out, summary = run
    written = json.loads((out / "summary.json").read_text())
    assert written["schema"] == 1 and [e["name"] for e in written["experiments"]] == [r.name for r in summary.reports]
    assert set(written["experiments"][0]["caches"]) == {BASELINE, *CACHES}
    read = ExperimentReport.from_dict(json.loads((out / "one" / "report.json").read_text()))
    assert read.markdown() == summary.reports[0].markdown() and "± is the standard deviation" in read.markdown()


def test_plots_are_written_and_shown(run):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    out, summary = run
    for name in ("memory.png", "quality.png", "speed.png", "one/quality.png", "one/speed.png"):
        assert (out / name).stat().st_size > 5000
        folder, _, file = name.rpartition("/")
        assert f"({file})" in (out / folder / ("report.md" if folder else "summary.md")).read_text()
    axes = bars(summary, "quality.png").axes[0]
    assert axes.get_title() and axes.get_yscale() == "log" and "nats" in axes.get_ylabel()
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}
    assert len(looks) == len(CACHES) and all(red == green == blue for (red, green, blue, _), _ in looks), "greyscale"


def test_only_what_changed_runs_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # reports do without
    ran = []
    original = run_module._run
    monkeypatch.setattr(run_module, "_run", lambda e, *args: ran.append(e.name) or original(e, *args))
    small = {"prompts": [TEXT[:80]], "caches": ("identity",), "max_tokens": 2}
    two = [experiment(tiny, "a", **small), experiment(tiny, "b", **small)]
    first = run_experiments(two, tmp_path)
    again = run_experiments(two, tmp_path)
    assert ran == ["a", "b"] and all(report.is_old for report in again.reports)
    assert again.means() == first.means()
    changed = run_experiments([two[0], experiment(tiny, "b", **{**small, "max_tokens": 3})], tmp_path)
    assert ran == ["a", "b", "b"] and changed.reports[1].settings["experiment"]["max_tokens"] == 3
    assert len(changed.reports[1].measured.rows[0]["values"]["tokens"]) == 3
    os.utime(f"{tiny}/model.safetensors", (1, 1))  # another model of that name
    run_experiments(two[:1], tmp_path)
    assert ran[-1] == "a" and len(ran) == 4
    assert not list(tmp_path.rglob("*.png")) and "![" not in (tmp_path / "summary.md").read_text()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    file, out = tmp_path / "experiments.json", tmp_path / "out"
    ids = [16 + i * 7 % 32 for i in range(80)]
    entries = [{"name": n, "model": "recall", "prompts": [ids] * 2, "max_tokens": 3} for n in ("first", "second")]
    file.write_text(json.dumps(entries))
    arguments = ["experiments", "--experiments", str(file), "--output-dir", str(out), "--cache", "int8"]
    process = subprocess.Popen([sys.executable, "-m", "hf_kvcompress", *arguments], stderr=subprocess.PIPE)
    rows = out / "second" / "rows-0.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.is_file() and rows.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "second" / "report.json").exists() and len(json.loads((out / "summary.json").read_text())) == 4
    before, kept = (out / "first" / "report.json").read_bytes(), rows.read_text()
    result = CliRunner().invoke(cli.build(), [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert (out / "first" / "report.json").read_bytes() == before and "first was finished before" in result.stderr
    assert rows.read_text().startswith(kept[: kept.rfind("\n") + 1])
    assert [e["status"] for e in json.loads(result.stdout)["experiments"]] == ["finished"] * 2


def test_the_quick_test(tmp_path):
    result = CliRunner().invoke(cli.build(), ["experiments", "--quick-test", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = {e["name"]: e["caches"] for e in json.loads((tmp_path / "summary.json").read_text())["experiments"]}
    assert list(found) == ["general", "repetitive", "code"] and "CPACCache" in result.stdout
    for caches in found.values():
        assert caches["balanced"]["ratio"] > 3 and 0 < caches["balanced"]["KL"] < caches["tiny"]["KL"]
    # what repeats is stored once
    assert found["repetitive"]["CPACCache"]["MB"] < 0.95 * found["repetitive"]["balanced"]["MB"]


def test_the_command_ends_with_1_if_one_failed(tmp_path):
    file = tmp_path / "experiments.json"
    file.write_text(json.dumps([{"name": "a", "model": "recall", "prompts": ["no text for this model"]}]))
    arguments = ["experiments", "--experiments", str(file), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.build(), [*arguments, "--quiet"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("kvcompress experiments: 1 of 1 failed: a: prompts: expected token ids in prompt 1")


def test_redundancy_is_found_where_it_was_planted(tmp_path):
    once = [16 + (i * i * 7 + i // 5) % 200 for i in range(96)]  # whole pages
    found = [
        Experiment("twice", [once + once], model="recall", max_tokens=2, caches=["int8"]),
        Experiment("short", [once[:20]], model="recall", max_tokens=2, caches=["int8"]),
    ]
    summary = run_experiments(found, tmp_path)
    twice, short = summary.reports
    assert short.status == "finished" and short.redundancy is None
    own = twice.redundancy
    assert own["repeated_within"] > 0.3 and own["saved_within"]["0.9"] > 0.1
    assert own["cosine"]["key_before_rope"] > own["cosine_shuffled"]["key_before_rope"] + 0.1
    assert (tmp_path / "twice" / "redundancy" / "analysis_report.json").is_file()
    assert "## Redundancy" in twice.markdown() and "| twice |" in (tmp_path / "summary.md").read_text().split("##")[1]
