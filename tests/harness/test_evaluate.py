"""A run: an exact cache scores the baseline everywhere, a broken one is caught everywhere, and runs can be taken up."""

import json

import pytest
import torch

from hf_kvcompress.harness import Report, Suite, evaluate, units
from hf_kvcompress.harness.evaluate import bounds_of
from hf_kvcompress.harness.specs import BASELINE, CacheSpec, Entrant
from hf_kvcompress.harness.tasks import BUILDERS
from hf_kvcompress.integrations.recall_model import load_recall_model
from hf_kvcompress.integrations.recall_tasks import TASKS

from ..tiny_model import byte_tokenizer, tiny_llama
from .broken import copy_of, shuffled

SIZES = dict(prompt=192, scored=24, chunk=8, stepped=6, windows=1, probed=8, generated=8, timed=0, repeats=1)
TINY = Suite("tiny", **SIZES, tasks=None, task_lengths=(800,), task_seeds=1)
RECALL = Suite("recall", **SIZES, tasks=None, task_lengths=(256,), task_seeds=1)
#: what tells two caches apart, and its value where nothing does
PERFECT = {"kl": 0, "top1": 1, "error": 0, "worst": 0, "same_tokens": 1, "rouge_l": 1, "same_answers": 1}
OWN = {"copy": copy_of, "shuffled": shuffled}


def entrants(config):
    return [Entrant(name, lambda make=make: make(config)) for name, make in OWN.items()]


def of(report, cache):
    return [row for row in report.rows if row["cache"] == cache]


def untimed(report):
    return [row for row in report.rows if row["measure"] != "speed"]


@pytest.fixture(scope="module", params=["tiny", "recall"])
def report(request):
    tiny = request.param == "tiny"
    model, tokenizer = (tiny_llama(), byte_tokenizer()) if tiny else (load_recall_model(), None)
    return evaluate(model, [*entrants(model.config), "identity"], TINY if tiny else RECALL, tokenizer, bounds=False)


def test_every_measure_ran_on_every_cache(report):
    expected = {"perplexity", "attention", "generation", "task"}
    for cache in (BASELINE, "copy", "shuffled", "identity"):
        assert {row["measure"] for row in of(report, cache)} == expected
    names = {row["name"] for row in report.rows if row["measure"] == "task"}
    assert names in (set(BUILDERS), set(TASKS))
    assert {row["name"].split(":")[0] for row in report.rows if row["measure"] == "perplexity"} == {"chunk", "step"}


def test_an_exact_cache_scores_exactly_the_baseline(report):
    for base, own in zip(of(report, BASELINE), of(report, "copy"), strict=True):
        same = {k: v for k, v in own["values"].items() if k != "kl_by_position"}
        assert same == {k: v for k, v in base["values"].items() if k != "kl_by_position"}
        assert not any(own["values"].get("kl_by_position", []))
        assert all(own["values"].get(name, perfect) == perfect for name, perfect in PERFECT.items())


def test_an_identity_codec_scores_the_baseline_up_to_rounding(report):
    for base, own in zip(of(report, BASELINE), of(report, "identity"), strict=True):
        for name, value in base["values"].items():
            if isinstance(value, float) and name != "ratio":
                assert own["values"][name] == pytest.approx(value, rel=1e-5, abs=2e-6), (own["unit"], name)


def test_a_broken_cache_is_caught_by_every_unit(report):
    for base, own in zip(of(report, BASELINE), of(report, "shuffled"), strict=True):
        if own["measure"] == "generation" and own["values"]["first_divergence"] == SIZES["generated"]:
            continue  # a walk of low entropy may go on as before: the other measures see it
        assert any(
            abs(own["values"][name] - perfect) > 1e-3 for name, perfect in PERFECT.items() if name in own["values"]
        ), own["unit"]
        if own["measure"] == "task":
            assert own["values"]["kl"] > 1e-3 and own["values"]["answer_nll"] != base["values"]["answer_nll"]


def test_a_broken_cache_fails_the_tasks_of_a_model_that_can_do_them():
    model = load_recall_model()
    suite = Suite("tasks", **{**SIZES, "scored": 2, "stepped": 0, "probed": 0, "generated": 0}, tasks=None,
                  task_lengths=(256,), task_seeds=2)  # fmt: skip
    report = evaluate(model, entrants(model.config), suite, bounds=False)
    tasks = report.task_summary()
    assert set(tasks) == set(TASKS)
    for name, own in tasks.items():
        assert own["admissible"] and own["scores"][BASELINE]["mean"] >= 0.9, name
        assert own["scores"]["copy"] == own["scores"][BASELINE], name
        assert own["scores"]["shuffled"]["mean"] < 0.6, name


def test_a_task_that_the_model_cannot_do_counts_in_no_average(report):
    able = report.run["bench"]["model_type"] == "llama" and not report.run["bench"]["texts"]
    admissible = {name for name, own in report.task_summary().items() if own["admissible"]}
    if able:
        assert admissible == set(TASKS) and "tasks" in report.summary()[BASELINE]
        assert "not admissible" not in report.markdown()
    else:
        assert not admissible and "tasks" not in report.summary()[BASELINE]
        assert "(needle)" in report.markdown() and "not admissible" in report.markdown()


SMALL = Suite("small", **{**SIZES, "stepped": 0, "probed": 0}, tasks=("needle",), task_lengths=(400,), task_seeds=2)


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama(), byte_tokenizer()


def test_two_runs_agree_and_bounds_run_beside_them(tiny):
    model, tokenizer = tiny
    one, two = (evaluate(model, ["h2o:budget=0.5,codec=int8"], SMALL, tokenizer) for _ in range(2))
    assert one.rows == two.rows and len(one.rows) == 4 * 4
    assert one.caches == [
        BASELINE,
        "h2o:budget=0.5,codec=int8",
        "random:budget=0.5,codec=int8",
        "streaming:budget=0.5,codec=int8",
    ]
    other = evaluate(model, ["h2o:budget=0.5,codec=int8"], SMALL, tokenizer, texts=["code"])
    assert other.rows != one.rows


@pytest.mark.parametrize(
    "spec, bound",
    [
        ("balanced", "random:budget=0.25,codec=identity"),
        ("snapkv:budget=0.5,policy_options.window_size=8,recent=0.1", "random:budget=0.5,recent=0.1"),
        ("TOVACache:budget=128", "random:budget=128,codec=eqrot4"),
        ("TOVACache:budget=128,values=int4", "random:budget=128,keys=eqrot4,values=int4"),
        ("H2OCache:budget=1MB,codec=int8", "random:budget=1048576B,codec=int8,max_tokens=4096"),
        ("H2OCache:heavy_ratio=0.25,recent_ratio=0.25", "random:budget=0.5,codec=eqrot4,max_tokens=4096"),
        ("HierarchicalCache:ratio=0.25", "random:budget=0.25,codec=identity"),  # it drops nothing: as for a codec
    ],
)
def test_bounds_keep_what_the_cache_keeps(tiny, spec, bound):
    first, second = bounds_of([CacheSpec.parse(spec)], tiny[0].config)
    assert str(first) == bound and str(second) == bound.replace("random", "streaming")
    assert first.entrant(tiny[0].config).make() is not None


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_stopped(tiny, tmp_path):
    model, tokenizer = tiny
    whole = evaluate(model, ["balanced"], SMALL, tokenizer)
    seen = []

    def kill(unit, index, total, cache):
        seen.append((unit, cache))
        if len(seen) == 6:
            raise Killed

    with pytest.raises(Killed):
        evaluate(model, ["balanced"], SMALL, tokenizer, out=tmp_path, on_unit=kill)
    file = tmp_path / "rows-0.jsonl"
    assert len(file.read_text().splitlines()) == 5
    with open(file, "a") as rows:
        rows.write('{"unit": "cut off in the mid')
    again = []
    resumed = evaluate(model, ["balanced"], SMALL, tokenizer, out=tmp_path, on_unit=lambda *a: again.append(a))
    assert resumed.rows == whole.rows
    assert len(again) == len(whole.rows) - 5 + 1, "only what was missing, and the baseline of the unit it stopped in"
    assert Report.load(tmp_path).rows == whole.rows
    assert (tmp_path / "report.md").read_text() == resumed.markdown() + "\n"
    evaluate(model, ["balanced"], SMALL, tokenizer, out=tmp_path, on_unit=lambda *a: pytest.fail("nothing is missing"))
    more = evaluate(model, ["balanced", "int4"], SMALL, tokenizer, out=tmp_path)
    assert [r for r in more.rows if r["cache"] != "int4"] == whole.rows and of(more, "int4")


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    evaluate(model, [], SMALL, tokenizer, out=tmp_path, tasks=[], generated=0)
    before = (tmp_path / "rows-0.jsonl").read_text()
    with pytest.raises(ValueError, match="out: expected an empty folder or one of the same run, got .* suite.prompt"):
        evaluate(model, [], SMALL, tokenizer, out=tmp_path, tasks=[], generated=0, prompt=200)
    with pytest.raises(ValueError, match="bench.weights"):
        evaluate(tiny_llama(initializer_range=0.2), [], SMALL, tokenizer, out=tmp_path, tasks=[], generated=0)
    assert (tmp_path / "rows-0.jsonl").read_text() == before


def test_a_peer_that_breaks_is_a_note_and_ours_ends_the_run(tiny):
    model, tokenizer = tiny

    def broken():
        raise RuntimeError("no such compiler\nmore of it")

    peer = evaluate(model, [Entrant("peer", broken, peer=True)], SMALL, tokenizer, bounds=False, tasks=[])
    assert "peer: perplexity not run: RuntimeError: no such compiler; generation not run" in peer.markdown()
    with pytest.raises(RuntimeError, match="no such compiler"):
        evaluate(model, [Entrant("ours", broken)], SMALL, tokenizer, bounds=False, tasks=[])


def test_speed_is_measured_last_with_percentiles_and_peak(tiny):
    model, tokenizer = tiny
    found = evaluate(model, ["balanced"], SMALL, tokenizer, tasks=[], timed=8, repeats=2, generated=4, windows=1)
    assert [row["measure"] for row in found.rows][-8:] == ["speed"] * 8
    for row in found.rows[-8:]:
        own = row["values"]
        assert 0 < own["step_ms_p50"] <= own["step_ms_p90"] <= own["step_ms_p99"]
        assert own["prefill_rate"] > 0 and own["decode_rate"] == pytest.approx(1000 / own["step_ms_p50"])
        assert ("peak_bytes" in own) == (row["seed"] == 0)
    held = 2 * 2 * 2 * 16 * (192 + 4) * 4  # layers, keys and values, heads, head size, tokens, float32
    assert found.rows[-8]["cache"] == BASELINE and found.rows[-8]["values"]["peak_bytes"] > held


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"caches": ["balancd"]}, "did you mean 'balanced'"),
        ({"suite": "quik"}, "suite: expected one of quick, standard, full, got 'quik'; did you mean 'quick'"),
        ({"scorde": 3}, "suite: expected sizes among .* got 'scorde'"),
        ({"scored": 1}, "scored: expected a whole number of at least 2, got 1"),
        ({"prompt": 4000}, "suite: expected at most 2048 for this model, got 40"),
        ({"tasks": ["nedle"]}, "tasks: expected names among needle, .* got 'nedle'"),
        ({"task_lengths": [60]}, "length: expected at least .* tokens for task 'needle', got 60"),
        ({"texts": ["missing.txt"]}, "text: expected prose, code, a file or datasets:NAME, got 'missing.txt'"),
        ({"score_dtype": "half"}, "score-dtype: expected auto, same or float32, got 'half'"),
    ],
)
def test_a_bad_argument_is_named(tiny, changes, message):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=message):
        evaluate(model, **{"caches": ["balanced"], "suite": SMALL, "tokenizer": tokenizer, **changes})


def test_a_text_shorter_than_its_context_is_named(tiny, tmp_path):
    model, tokenizer = tiny
    (tmp_path / "short.txt").write_text("All work and no play. " * 12)
    with pytest.raises(ValueError, match="text: expected 2 windows of 216 tokens, got a text of 264 tokens"):
        evaluate(model, [], SMALL, tokenizer, [str(tmp_path / "short.txt")], windows=2, tasks=[])


def test_units_are_shared_out_and_clocks_stay_with_the_first(tiny):
    model, tokenizer = tiny
    bench = units.Bench(model, model, tokenizer)
    found = units.units(bench, Suite("x", **{**SIZES, "timed": 4}, tasks=("qa",), task_lengths=(700,), task_seeds=3))
    shares = [units.slice_of(found, index, 2) for index in range(2)]
    assert sorted(u.key for share in shares for u in share) == sorted(u.key for u in found)
    assert all(not unit.alone for unit in shares[1]) and len(shares[1]) == 3
    assert len({unit.key for unit in found}) == len(found)


def test_a_report_survives_json(tiny, tmp_path):
    model, tokenizer = tiny
    report = evaluate(model, ["balanced"], SMALL, tokenizer, bounds=False, tasks=[])
    back = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert back.to_dict() == report.to_dict() and back.markdown() == report.markdown()
    assert report.run["versions"]["torch"] == torch.__version__ and report.run["suite"]["prompt"] == 192
    assert "<table>" in report._repr_html_() and repr(report).count("\n") == 2
