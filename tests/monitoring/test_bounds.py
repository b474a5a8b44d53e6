"""How much a monitor takes: of the time, of memory, of the disk. And what it does when there is no more."""

import threading
import time

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.monitoring import Recording, session
from hf_kvcompress.monitoring.samples import SKETCH, Mass, Pages
from hf_kvcompress.monitoring.throttle import BURST, Throttle
from hf_kvcompress.monitoring.worker import Worker

from .helpers import generate, model, plain


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_work_keeps_to_its_share():
    clock = Clock()
    throttle = Throttle(0.05, {"look": 1.0}, clock)
    assert not throttle.allows("look"), "nothing is saved yet"
    cost, done = 0.02, 0
    for _ in range(2000):  # passes of 10 ms
        clock.now += 0.01
        if throttle.allows("look"):
            done += 1
            with throttle.working("look"):
                clock.now += cost
    assert 0.04 < throttle.part <= 0.051 and done == pytest.approx(0.05 * clock.now / cost, rel=0.1)


def test_time_without_passes_is_not_saved_up():
    clock = Clock()
    throttle = Throttle(0.05, {"look": 1.0}, clock)
    clock.now = 1000.0
    done = 0
    while throttle.allows("look"):
        throttle.charge(0.01, "look")
        done += 1
    assert done <= BURST / 0.01 + 1


def test_cheap_work_does_not_starve_dear_work():
    clock = Clock()
    throttle = Throttle(0.1, {"cheap": 0.5, "dear": 0.5}, clock)
    done = {"cheap": 0, "dear": 0}
    for _ in range(4000):
        clock.now += 0.01
        for kind, cost in (("cheap", 0.001), ("dear", 0.05)):
            if throttle.allows(kind):
                throttle.charge(cost, kind)
                done[kind] += 1
    assert done["dear"] == pytest.approx(0.05 * 40 / 0.05, rel=0.2) and done["cheap"] > 1000


def test_work_of_other_threads_counts():
    clock = Clock()
    throttle = Throttle(0.05, {"look": 1.0}, clock)
    clock.now = 1.0
    assert throttle.allows("look")
    throttle.charge(1.0)
    clock.now = 2.0
    assert not throttle.allows("look")


def test_a_full_queue_drops_and_never_waits():
    started, go, handled = threading.Event(), threading.Event(), []

    def slow(item):
        started.set()
        go.wait(10)
        handled.append(item)

    worker = Worker(slow, lambda seconds: None, max_bytes=100)
    assert worker.put("first", 60)
    started.wait(10)
    begun = time.perf_counter()
    taken = [worker.put(str(number), 60) for number in range(50)]
    assert time.perf_counter() - begun < 1
    assert sum(taken) <= 1 and worker.dropped == 50 - sum(taken)
    go.set()
    worker.close()
    assert handled == ["first", "0"][: 1 + sum(taken)]
    assert not worker.put("late") and not worker.alive


def test_a_worker_survives_what_it_handles():
    def fails(item):
        raise OSError(f"no room for {item}")

    worker = Worker(fails, lambda seconds: None, max_bytes=100)
    for number in range(30):
        worker.put(number, 1)
        worker.wait()
    worker.close()
    assert [str(error) for error in worker.errors][:2] == ["no room for 0", "no room for 1"]
    assert len(worker.errors) == 20


def test_drops_are_told(monkeypatch, every_pass):
    class Never(Worker):
        def put(self, item, nbytes=0):
            if item[0] == "sample":
                self.dropped += 1
                return False
            return super().put(item, nbytes)

    monkeypatch.setattr(session, "Worker", Never)
    own = model()
    cache = plain(own)
    with kvc.monitor(cache, model=own) as seen:
        generate(own, cache, 4)
    assert seen.recording.header["dropped"] > 0
    assert "captures were dropped" in " ".join(seen.report().notes())


def test_memory_is_bounded_and_covers_the_whole_run():
    recording = Recording({"page_size": 8}, max_bytes=1 << 20)
    for step in range(3000):
        recording.add_step({"step": step, "seen": step})
        mass = torch.full((200,), 1 / 200)
        recording.add_mass(Mass(step % 2, 0, step, step, 0.0, mass, torch.full((200,), 8, dtype=torch.int32)))
    for first in range(0, 4000, 50):
        numbers = torch.arange(first, first + 50)
        parts = {name: torch.zeros(50, SKETCH) for name in ("key_sketch", "value_sketch")}
        parts |= {name: torch.zeros(50) for name in ("key_norm", "value_norm")}
        recording.add_pages(Pages(0, 0, 1, numbers, parts))
    assert recording.nbytes <= 1 << 20
    assert recording.thinned > 3
    for series in (recording.steps, recording.masses[0, 0]):
        at = [own["step"] if isinstance(own, dict) else own.step for own in series]
        assert at == sorted(at) and at[0] < 2 and at[-1] > 2990, "from the first to the last"
        gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert len(set(gaps[:-1])) == 1 and gaps[-1] <= gaps[0], "evenly"
    pages = sorted(recording.pages[0, 0])
    assert pages[0] == 0 and pages[-1] > 3900 and len({b - a for a, b in zip(pages, pages[1:], strict=False)}) == 1
    assert "thinned out" in " ".join(kvc.monitoring.Report(recording).notes())


def test_default_cost_of_a_generation():
    """Its own account, not a stopwatch: what was charged stays a small part of the time, whatever else runs."""
    own = model(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    cache = kvc.CompressedCache(own.config)
    with kvc.enable(own), kvc.monitor(cache) as seen:
        generate(own, cache, 60)
        part = seen.throttle.part
    assert 0 < part < 0.1
    assert seen.recording.steps and seen.recording.masses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers: expected a number of them, or the numbers of some, got 0"),
        ({"heads": ()}, "heads: expected a number of them"),
        ({"row": -1}, "row: expected a whole number from 0 on, got -1"),
        ({"share": 0}, "share: expected a number above 0, up to 1, got 0"),
        ({"share": 1.5}, "share: expected a number above 0, up to 1, got 1.5"),
        ({"similar": True}, "similar: expected a number above 0, up to 1, got True"),
        ({"page_size": 0}, "page_size: expected a whole number from 1 on, or None, got 0"),
        ({"max_bytes": "much"}, "max_bytes: expected bytes, as a whole number or such as '64MB', got 'much'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        kvc.monitor(plain(model()), **settings)


def test_what_cannot_be_monitored():
    with pytest.raises(ValueError, match="cache: expected a DynamicCache"):
        kvc.monitor(object())
    with pytest.raises(ValueError, match="model: expected a transformers PreTrainedModel, or None, got 'str'"):
        kvc.monitor(plain(model()), model="llama")


@pytest.mark.parametrize("settings", [{"layers": (7,)}, {"heads": (5,)}, {"row": 3}])
def test_a_layer_that_is_not_there_is_told(settings, every_pass):
    own = model()
    cache = plain(own)
    with kvc.monitor(cache, **settings) as seen:
        generate(own, cache, 4)
    name, value = next(iter(settings.items()))
    assert f"ValueError: {name}: expected" in " ".join(seen.report().notes())
