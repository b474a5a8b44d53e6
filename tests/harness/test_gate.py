"""The regression gate: the code of today passes, a deliberately worse codec does not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hf_kvcompress.enable import enable
from hf_kvcompress.harness import CacheSpec, Entrant, Report
from hf_kvcompress.harness.gate import TOLERANCES, compare, differences, figures, record, table
from hf_kvcompress.harness.specs import BASELINE
from hf_kvcompress.integrations.recall_model import load_recall_model

FILE = Path(__file__).parents[2] / "eval" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality_gate", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def report(kl=0.01, score=1.0, ratio=4.0, caches=(BASELINE, "a")):
    rows = []
    for cache in caches:
        for seed in range(2):
            own = {"seed": seed, "cache": cache}
            exact = cache == BASELINE
            values = {"kl": 0.0 if exact else kl * (1 + seed), "top1": 1.0, "perplexity": 5.0}
            rows += [
                {**own, "unit": f"p{seed}", "measure": "perplexity", "name": "chunk:x", "values": values},
                {**own, "unit": f"g{seed}", "measure": "generation", "name": "x",
                 "values": {"nbytes": 100, "ratio": 1.0 if exact else ratio}},
                {**own, "unit": f"t{seed}", "measure": "task", "name": "needle",
                 "values": {"score": 1.0 if exact else score, "kl": 0.0}},
            ]  # fmt: skip
    run = {"caches": list(caches), "suite": {"name": "x", "prompt": 9}, "bench": {"weights": "w"}, "versions": {}}
    return Report(run, rows, {}, 1.0)


@pytest.fixture
def kept():
    return json.loads(json.dumps(record(report(), "make it")))


def test_what_is_recorded(kept):
    assert kept["command"] == "make it" and kept["suite"]["prompt"] == 9
    own = kept["figures"]["a"]
    assert own["KL"] == {"mean": 0.015, "std": pytest.approx(0.00707107), "n": 2, "tolerance": own["KL"]["tolerance"]}
    assert own["KL"]["tolerance"] == pytest.approx(TOLERANCES["KL"].of(0.015)) and "task needle" in own
    assert set(kept["why"]) == set(TOLERANCES) and all(kept["why"].values())


def test_the_same_run_moves_nothing(kept):
    assert compare(kept, report()) == [] and differences(kept, report()) == []
    assert compare(kept, report(kl=0.0101)) == []


@pytest.mark.parametrize(
    "changes, figure, verdict",
    [
        ({"kl": 0.02}, "KL", "worse"),
        ({"kl": 0.005}, "KL", "better"),
        ({"score": 0.5}, "task needle", "worse"),
        ({"ratio": 3.9}, "ratio", "worse"),
        ({"ratio": 4.1}, "ratio", "better"),
    ],
)
def test_what_moves_is_named(kept, changes, figure, verdict):
    (moved,) = compare(kept, report(**changes))
    assert (moved.cache, moved.figure, moved.verdict) == ("a", figure, verdict)
    assert moved.fails == (verdict == "worse")
    line = table([moved]).splitlines()[2]
    assert line.startswith(f"| {verdict} | a | {figure} | ") and line.count("|") == 7


def test_a_cache_that_is_gone_fails_and_a_new_one_does_not(kept):
    gone = compare(kept, report(caches=(BASELINE,)))
    assert {(m.cache, m.verdict) for m in gone} == {("a", "missing")} and all(m.fails for m in gone)
    assert compare(kept, report(caches=(BASELINE,)), whole=False) == []
    new = compare(kept, report(caches=(BASELINE, "a", "b")))
    assert {(m.cache, m.verdict, m.fails) for m in new} == {("b", "new", False)}


def test_another_text_is_told(kept):
    other = report()
    other.run["bench"] = {"weights": "v"}
    assert differences(kept, other) == ["bench.weights"]


def test_the_file_is_of_the_parts_that_are_measured(quality):
    kept = json.loads(quality.FILE.read_text())
    assert "quick" in kept
    for name, part in quality.PARTS.items():
        if name not in kept:  # the command says then how to make it
            continue
        assert kept[name]["suite"] == part.suite.to_dict()
        assert set(kept[name]["figures"]) == {BASELINE, *(str(CacheSpec.parse(spec)) for spec in part.caches)}
    assert quality.text_of(kept) + "\n" == quality.FILE.read_text()


def test_a_worse_codec_fails_the_quick_part(quality):
    config = load_recall_model().config

    def under_the_name(name, spec):
        return Entrant(name, CacheSpec.parse(spec).entrant(config).make, enable)

    measured = quality.measure(quality.PARTS["quick"], ["balanced", under_the_name("small", "eqrot3/eqrot2")])
    kept = json.loads(quality.FILE.read_text())["quick"]
    assert not differences(kept, measured)
    moved = compare(kept, measured, whole=False)
    assert not [m for m in moved if m.cache == "balanced"], table(moved)
    assert {m.figure for m in moved if m.cache == "small" and m.verdict == "worse"} >= {"KL", "attention"}
    assert set(figures(measured)) == {BASELINE, "balanced", "small"}


@pytest.mark.parametrize("changes, code", [({}, 0), ({"kl": 0.02}, 1), ({"kl": 0.005}, 0)])
def test_the_command(quality, kept, monkeypatch, tmp_path, capsys, changes, code):
    file = tmp_path / "quality.json"
    file.write_text(json.dumps({"quick": kept}))
    monkeypatch.setattr(quality, "FILE", file)
    monkeypatch.setattr(quality, "measure", lambda part, out=None: report(**changes))
    monkeypatch.setattr(sys, "argv", ["quality.py"])
    with pytest.raises(SystemExit) as stopped:
        quality.main()
    assert stopped.value.code == code
    said = capsys.readouterr().out
    assert "outside their tolerance: " + ("1" if changes else "0") in said
    monkeypatch.setattr(sys, "argv", ["quality.py", "--record"])
    with pytest.raises(SystemExit) as stopped:
        quality.main()
    again = json.loads(file.read_text())["quick"]
    assert stopped.value.code == 0 and again["figures"]["a"]["KL"]["mean"] == changes.get("kl", 0.01) * 1.5
    assert again["command"] == "python eval/quality.py --record"
