"""Planted histories: which pages are hot, cold, resting, alike and used apart, and what a crop makes of it."""

import math

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.monitoring import Recording, Report
from hf_kvcompress.monitoring.samples import SKETCH, Mass, Pages
from hf_kvcompress.monitoring.temporal import Usage, drift, returns

from .helpers import SMALL, compressed, generate, model, prompt

SIZE = 10


def masses(*rows, step=10):
    """A query every `step` tokens; pages of ten tokens, all there from the start."""
    held = torch.full((len(rows[0]),), SIZE, dtype=torch.int32)
    return [Mass(0, 0, i + 1, 100 + step * i, float(i), torch.tensor(row), held) for i, row in enumerate(rows)]


PLANTED = masses(
    [0.7, 0.28, 0.01, 0.01],
    [0.7, 0.01, 0.28, 0.01],
    [0.7, 0.01, 0.28, 0.01],
    [0.7, 0.28, 0.01, 0.01],
)


def recording(series=PLANTED, sketches=None):
    made = Recording({"page_size": SIZE, "cache": "Planted", "settings": {"used": 1.0, "similar": 0.85}})
    made.extend(series)
    if sketches is not None:
        parts = {f"{role}_sketch": sketches for role in ("key", "value")}
        parts |= {f"{role}_norm": sketches.norm(dim=1) for role in ("key", "value")}
        made.add_pages(Pages(0, 0, 1, torch.arange(len(sketches)), parts))
    return made


def test_hot_cold_and_resting_pages():
    usage = Usage.of((0, 0), PLANTED, above=1.0)
    assert [page for page, _, _ in usage.hot(2)] == [0, 1]
    assert usage.hot(1)[0][1:] == (pytest.approx(0.7), 1.0)
    assert usage.cold() == [3]
    assert usage.concentration() == 2 and usage.used[:, 1].tolist() == [True, False, False, True]
    ended, lasting = usage.rests()
    assert ended == [30] and lasting == [10], "page 1 rested from 100 to 130, page 2 has since 120"
    assert returns(([64, 40], [40, 300])) == {32: 0.5, 64: 0.5, 128: 0.0, 256: 0.0}


def test_a_page_that_is_not_there_yet_is_not_unused():
    early, late = masses([0.5, 0.5])[0], masses([0.4, 0.3, 0.3])[0]
    late.step, late.seen = 2, 110
    usage = Usage.of((0, 0), [early, late], above=2.0)
    assert math.isnan(float(usage.mass[0, 2])) and usage.average().tolist() == pytest.approx([0.45, 0.4, 0.3])
    assert usage.cold() == [0, 1], "page 2 was seen once only"


def test_evicted_pages_are_not_cold():
    series = masses([0.9, 0.05, 0.05], [0.95, 0.05, 0.0])
    series[1].held = torch.tensor([SIZE, SIZE, 0], dtype=torch.int32)
    assert Usage.of((0, 0), series, above=1.0).cold() == [1]


def test_alike_pages_used_at_different_times():
    generator = torch.Generator().manual_seed(0)
    sketches = torch.randn(4, SKETCH, generator=generator)
    sketches[2] = sketches[1] + 0.1 * torch.randn(SKETCH, generator=generator)
    report = Report(recording(sketches=sketches))
    assert {(pair.pages, pair.role) for pair in report.alike} == {((1, 2), "key"), ((1, 2), "value")}
    assert all(pair.cosine > 0.95 and pair.overlap == 0.0 and pair.apart for pair in report.alike)
    assert report.to_dict()["alike_used_apart"] == 2 and report.cells()[0][-1] == "2"
    together = masses(*([[0.2, 0.39, 0.4, 0.01]] * 3))
    report = Report(recording(together, sketches))
    assert report.alike and not any(pair.apart for pair in report.alike)
    unknown = Report(recording([], sketches))
    assert unknown.alike and unknown.alike[0].overlap is None and not unknown.alike[0].apart


def test_random_pages_are_not_alike():
    sketches = torch.randn(200, SKETCH, generator=torch.Generator().manual_seed(1))
    assert not Report(recording(sketches=sketches)).alike


def test_repeated_text_is_found(every_pass):
    own = model()
    ids = prompt(64).repeat(1, 3)
    cache = compressed(own, codec="identity")
    with kvc.enable(own), kvc.monitor(cache, model=own, page_size=8) as seen:
        generate(own, cache, 4, ids=ids)
    first = [p for p in seen.report().alike if p.layer == 0]
    keys = {pair.pages for pair in first if pair.role == "key"}
    assert {(page, page + 8) for page in range(8)} <= keys, "the first layer's keys repeat, before their rotation"
    assert seen.recording.header["keys_compared"] == "as they were before their rotation"
    cache = compressed(own, codec="identity")
    with kvc.enable(own), kvc.monitor(cache, page_size=8) as blind:
        generate(own, cache, 4, ids=ids)
    first = [p for p in blind.report().alike if p.layer == 0]
    assert {(page, page + 8) for page in range(8)} <= {pair.pages for pair in first if pair.role == "value"}
    assert not [pair for pair in first if pair.role == "key"], "rotated by position they are not alike"


def test_drift():
    steps = [
        {"tokens_held": 100 * i, "nbytes": 50_000 + 200 * 100 * i, "compression_ratio": 2.0, "seen": 100 * i}
        for i in range(1, 9)
    ]
    found = drift(steps)
    assert found["bytes_per_token"] == [pytest.approx(200 + 50_000 / 300), pytest.approx(200 + 50_000 / 800)]
    assert found["per_1000_tokens"]["tokens_held"] == pytest.approx(1000)
    assert found["per_1000_tokens"]["compression_ratio"] == 0 and drift(steps[:1]) == {}


def test_a_crop_begins_pages_anew(every_pass):
    own = model()
    cache = compressed(own, codec="identity")
    with kvc.enable(own), kvc.monitor(cache, page_size=8) as seen:
        generate(own, cache, 4, ids=prompt(64))
        cache.crop(-40)
        seen._worker.wait()
        assert max(seen.recording.masses[0, 0], key=lambda mass: len(mass.mass)).mass.shape[0] == 27 // 8
        left = cache.get_seq_length()
        for token in prompt(32, seed=9)[0]:
            own(token[None, None], past_key_values=cache)
        newest = [mass for mass in seen.recording.masses[0, 0] if len(mass.mass) > 27 // 8]
        assert newest and min(mass.seen for mass in newest) > left
    crop = next(event for event in seen.recording.events if event["kind"] == "crop")
    assert crop["tokens"] == left == 27
    values = cache.layers[0].dense("value")[0, 0, :56].unflatten(0, (-1, 8)).flatten(1).norm(dim=1)
    pages = seen.recording.pages[0, 0]
    norms = torch.stack([pages[number]["value_norm"] for number in range(7)])
    torch.testing.assert_close(norms, values, rtol=1e-4, atol=0)  # of what is held now, not of what was taken back


def test_a_reset_forgets_pages_but_not_the_run(every_pass):
    own = model()
    cache = kvc.CompressedCache(own.config, **SMALL)
    with kvc.enable(own), kvc.monitor(cache) as seen:
        generate(own, cache, 4)
        cache.reset()
        generate(own, cache, 4, ids=prompt(20))
    assert max(len(mass.mass) for mass in seen.recording.masses[0, 0]) == 3
    assert any(event["kind"] == "reset" for event in seen.recording.events)
    assert seen.recording.steps[0]["seen"] > 100 > seen.recording.steps[-1]["seen"]
