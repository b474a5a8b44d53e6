"""`monitor(cache)`: looks on while a cache is used, and leaves it as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import CompressedCache
from ..config import expect
from ..environment import versions
from ..handles import source_of
from ..layer import CompressedLayer
from ..watching import AttentionCall, shown_to
from .contents import tokens_of
from .files import Writer
from .intake import Intake
from .live import LiveTable
from .model_hook import queries_shown
from .pages import PageBook, known_rotaries
from .probe import logits_of, reads_all, sink_logits
from .recording import Recording
from .report import Report
from .samples import MassSample, PageSample, nbytes_of, to_host
from .settings import MonitorSettings
from .steps import numbers_of, sampled_layers
from .tap import listen, unlisten
from .throttle import Throttle
from .worker import Worker

DEFAULT_PAGE = 32
QUEUE = 4  # the part of the memory, by division, that may wait for the thread


class Monitor:
    """Watches a cache inside `with`; what it saw stays readable afterwards.

    Args:
        cache: a `CompressedCache` of any kind or a `DynamicCache`.
        settings: what is looked at and how much.
        model: lets attention be seen under plain sdpa, and keys be compared as they were before their rotation.
        output_dir: where data is written; None keeps it in memory.
        show: a table in the terminal or notebook.

    Raises ValueError, naming the argument, for a cache of another kind.
    """

    def __init__(
        self,
        cache: DynamicCache,
        settings: MonitorSettings,
        model: PreTrainedModel | None = None,
        output_dir: str | Path | None = None,
        show: bool = False,
    ):
        if not isinstance(cache, DynamicCache):
            raise expect("cache", "a DynamicCache, which every cache of this package is", type(cache).__name__)
        if model is not None and not isinstance(model, PreTrainedModel):
            raise expect("model", "a transformers PreTrainedModel, or None", type(model).__name__)
        self.settings = settings
        self._cache: Any = cache
        self._model, self._show = model, show
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._stack = ExitStack()
        self._begun = False
        self._due: int | None = None  # layer whose attention is to be looked at in this pass
        self._handed: torch.Tensor | None = None  # what its attention will get
        self._newest = 1 << 30  # layer that was updated last; a pass begins anew
        self.step = 0
        self._turns = {"mass": 0, "pages": 0}
        self._marks: dict[int, int] = {}
        self._heads: dict[int, list[int]] = {}  # of the layers that are looked at, once they are known
        self._failed = False
        self._rotaries = known_rotaries(model, cache)
        self.recording = Recording(self._header(cache), int(settings.max_bytes))

    def _header(self, cache: Any) -> dict[str, Any]:
        own = cache.settings.default.tokens_per_page if isinstance(cache, CompressedCache) else DEFAULT_PAGE
        compared = "as they were before their rotation" if self._rotaries else "as cached, rotated by position"
        return {
            "cache": type(cache).__name__,
            "page_size": self.settings.page_size or own,
            "keys_compared": compared,
            "settings": self.settings.to_dict(),
            "versions": versions(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    # -- beginning and ending ------------------------------------------------------------------------------------------

    def __enter__(self) -> Monitor:
        if self._begun:
            raise RuntimeError("monitor: expected a new monitor, got one that has been used: call monitor(cache) again")
        self._begun = True
        writer = None
        if self._output_dir is not None:
            writer = Writer(self._output_dir, self.recording.header, int(self.settings.max_disk_bytes))
        self.throttle = Throttle(self.settings.share)
        self._intake = Intake(self.recording, PageBook(self._rotaries, self.settings.contents), writer)
        room = int(self.settings.max_bytes) // QUEUE
        with ExitStack() as stack:
            self._worker = Worker(self._intake.handle, self.throttle.charge, room, self._tick)
            stack.callback(self._worker.close)
            if self._model is not None:
                stack.enter_context(queries_shown(self._model))
            stack.enter_context(shown_to(self._watch))
            listen(self._cache, self)
            stack.callback(unlisten, self._cache, self)
            if self._show:
                self.live()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unlisten(self._cache, self)
        if kind is not None:
            self._event("stopped", error=f"{kind.__name__}: {error}")
        if not self._failed:
            with self._guarded():
                self._last_look()
        self._stack.close()  # the thread has finished what waited
        self._cache = self._model = self._due = self._handed = None
        self._note_cost()
        for failure in self._worker.errors:
            self.recording.add_event({"kind": "error", "step": self.step, "error": _named(failure)})
        self._intake.finish(self.report().to_dict())

    def live(self, console: Any = None) -> None:
        """Show a table that follows what is seen: by rich in a terminal, as HTML in a notebook. Needs rich."""
        self._intake.live = LiveTable(console)

    # -- what the cache tells ------------------------------------------------------------------------------------------

    def before_update(self, layer: int, keys: torch.Tensor) -> None:
        """A layer is about to get new keys; the first one of a pass begins it."""
        if layer <= self._newest:
            self._begin_pass(keys)
        self._newest = layer

    def after_update(self, layer: int, keys: torch.Tensor) -> None:
        """Remember which tensor the attention of the layer that is due will get."""
        if layer == self._due:
            self._handed = keys

    def changed(self, what: str, tokens: int) -> None:
        """Tokens were taken back, or rows moved: pages are looked at again."""
        self._event(what, tokens=tokens)
        for layer, mark in self._marks.items():
            self._marks[layer] = 0 if what != "crop" else min(mark, max(tokens - self.page_size, 0))

    @property
    def page_size(self) -> int:
        return self.recording.page_size

    def _begin_pass(self, keys: torch.Tensor) -> None:
        self.step += 1
        self._due = self._handed = None
        if self._failed:
            return
        with self._guarded():
            if self.step == 1:
                return  # nothing is known of the layers yet
            if self.throttle.allows("step"):
                with self.throttle.working("step"):
                    self._capture_step()
            if not self._heads:
                self._choose()
            layers = list(self._heads)
            layer = layers[self._turns["pages"] % len(layers)]
            if self.throttle.allows("pages"):
                self._turns["pages"] += 1
                with self.throttle.working("pages"):
                    self._capture_pages(layer, self._marks.get(layer, 0))
            if self.throttle.allows("mass"):
                self._due = layers[self._turns["mass"] % len(layers)]

    def _watch(self, call: AttentionCall) -> None:
        if self._due is None or call.layer != self._due or self._cache is None:
            return
        layer = source_of(call.key, "key")
        mine = call.key is self._handed
        if isinstance(layer, CompressedLayer):
            mine = layer.index < len(self._cache.layers) and self._cache.layers[layer.index] is layer
        if not mine:
            return
        number, self._due, self._handed = self._due, None, None
        self._turns["mass"] += 1
        with self._guarded(), self.throttle.working("mass"):
            self._capture_mass(number, call)

    # -- copying out, on the generating thread -------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong in here ends the monitoring, not the generation."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:  # noqa: BLE001
            self._failed, self._due = True, None
            self._event("error", error=_named(error))

    def _choose(self) -> None:
        self._heads = sampled_layers(self._cache, self.settings)
        self._event("looks at", layers={str(layer): heads for layer, heads in self._heads.items()})

    def _capture_step(self) -> None:
        seconds = time.perf_counter() - self.throttle.started
        numbers = {"step": self.step, "time": round(seconds, 6), **numbers_of(self._cache)}
        self._worker.put(("step", numbers))

    def _capture_pages(self, layer: int, mark: int) -> None:
        held = self._cache.layers[layer]
        parts, after = tokens_of(held, self.settings.row, self._heads[layer], mark, self.page_size)
        if parts and self._put(PageSample(layer, self.step, self.page_size, parts)):
            self._marks[layer] = after

    def _capture_mass(self, layer: int, call: AttentionCall) -> None:
        held = self._cache.layers[layer]
        seen = int(held.get_seq_length())
        sample = MassSample(
            layer=layer,
            step=self.step,
            seen=seen,
            time=round(time.perf_counter() - self.throttle.started, 6),
            page_size=self.page_size,
            parts=logits_of(call, self.settings.row, self._heads[layer], seen),
            sinks=sink_logits(call),
            unread=not reads_all(held),
        )
        self._put(sample)

    def _put(self, sample: MassSample | PageSample) -> bool:
        to_host(sample)
        return self._worker.put(("sample", sample), nbytes_of(sample))

    def _last_look(self) -> None:
        """What is held at the end, of all layers that are looked at."""
        if self.step == 0:
            return
        self.step += 1
        self._capture_step()
        if not self._heads:
            self._choose()
        for layer in self._heads:
            mark = max(self._marks.get(layer, 0) - self.page_size, 0)
            while True:
                self._worker.wait()
                self._capture_pages(layer, mark)
                if self._marks.get(layer, 0) <= mark:
                    break
                mark = self._marks[layer]

    def _event(self, kind: str, **more: Any) -> None:
        self._worker.put(("event", {"kind": kind, "step": self.step, **more}))

    def _tick(self) -> None:
        self._note_cost()
        self._intake.tick()

    def _note_cost(self) -> None:
        self.recording.header.update(cost=self.throttle.part, dropped=self._worker.dropped, passes=self.step)

    # -- reading -------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The analysis of what was seen so far."""
        return Report(self.recording.copy())

    def to_pandas(self, what: str = "steps") -> Any:
        """As `Report.to_pandas`."""
        return self.report().to_pandas(what)

    def plot(self, lane: tuple[int, int] | None = None) -> Any:
        """As `Report.plot`."""
        return self.report().plot(lane)

    def __repr__(self) -> str:
        return repr(self.report())

    def __rich__(self) -> Any:
        return self.report()

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
