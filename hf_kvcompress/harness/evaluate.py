"""One run: caches, their bounds and the uncompressed baseline through every unit of a suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..environment import devices, versions
from ..policies.registry import POLICIES
from .loading import Bench, check_length, scoring_copy
from .processes import Processes
from .report import Report
from .specs import BASELINE, CacheSpec, Entrant, Unavailable
from .store import Store
from .suites import Suite, suite_of
from .units import Unit, slice_of, units

#: called with the unit's key, its number, units in all and the cache's name
OnUnit = Callable[[str, int, int, str], None]
BOUNDS = ("random", "streaming")
BOUND_BUDGET = 0.25  # where no cache of the run evicts


def evaluate(
    model: Any,
    caches: Sequence[str | CacheSpec | Entrant] = ("balanced",),
    suite: str | Suite = "quick",
    tokenizer: Any = None,
    texts: Sequence[str] = ("prose",),
    records: Sequence[str] = (),
    out: str | Path | None = None,
    score_dtype: str = "auto",
    bounds: bool = True,
    on_unit: OnUnit | None = None,
    **sizes: Any,
) -> Report:
    """Measure caches on a model, always beside the uncompressed one and, as bounds, a random choice and recency.

    Under torchrun or accelerate the units are shared out over processes, and every process returns the whole report.

    Args:
        caches: specs as text (see `CacheSpec.parse`), or `Entrant`s for caches of yours.
        suite: "quick", "standard", "full" or sizes of yours; `sizes` change single fields.
        tokenizer: None for the recall model, which has none.
        texts: "prose", "code", UTF-8 files or `datasets:NAME`.
        records: `qa:FILE` or `summary:FILE`, data sets whose questions are asked or that are summarised (see
            `record_tasks`).
        out: rows are kept in this folder as they come; a run with the same settings goes on where it stopped.
        score_dtype: of perplexity and KL: "auto" (float32 up to a billion parameters), "same" or "float32".
        bounds: False leaves Random and recency out.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    chosen = suite_of(suite, **sizes)
    entrants, unavailable = entrants_of(caches, model.config, bounds)
    check_length(model, chosen.longest, "suite")
    bench = Bench(model, scoring_copy(model, score_dtype), tokenizer, tuple(texts), tuple(records))
    settings = {"suite": chosen.to_dict(), "bench": bench.fingerprint(), "versions": versions()}
    processes = Processes()
    folder = None if out is None else Path(out)
    if not processes.is_first:
        processes.wait()  # the first one writes the settings
    store = Store(folder, settings, processes.index)
    if processes.is_first:
        processes.wait()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    try:
        todo = slice_of(units(bench, chosen), processes.index, processes.count)
        for alone in (False, True):
            own = [unit for unit in todo if unit.alone is alone]
            for index, unit in enumerate(own):
                tell = None if on_unit is None else partial(on_unit, unit.key, index, len(own))
                measure_unit(unit, entrants, store, tell)
            processes.wait()  # nothing runs beside a clock
        rows = processes.gather(list(store.rows.values()))
    finally:
        store.close()
    order = {unit.key: index for index, unit in enumerate(units(bench, chosen))}
    names = [entrant.name for entrant in entrants]
    rows = sorted(
        (row for row in _once(rows) if row["unit"] in order and row["cache"] in names),
        key=lambda row: (order[row["unit"]], names.index(row["cache"])),
    )
    notes = {entrant.name: entrant.note for entrant in entrants if entrant.note} | unavailable
    run = {**settings, "caches": names, "devices": devices(), "processes": processes.count}
    cpu = sum(processes.gather([time.process_time() - cpu_begun]))
    report = Report(run, rows, notes, time.perf_counter() - begun, cpu)
    if folder is not None and processes.is_first:
        report.save(folder)
    return report


def entrants_of(
    caches: Sequence[str | CacheSpec | Entrant], config: Any, bounds: bool
) -> tuple[list[Entrant], dict[str, str]]:
    """The baseline, the caches, then their bounds, each once; and why some cannot run."""
    found = {BASELINE: CacheSpec("none").entrant(config)}
    unavailable: dict[str, str] = {}
    specs = []
    for cache in caches:
        if isinstance(cache, Entrant):
            found.setdefault(cache.name, cache)
            continue
        spec = CacheSpec.parse(cache) if isinstance(cache, str) else cache
        specs.append(spec)
        try:
            entrant = spec.entrant(config)
            found.setdefault(entrant.name, entrant)
        except Unavailable as reason:
            unavailable[str(spec)] = f"not run: {reason}"
    for spec in bounds_of(specs, config) if bounds else ():
        entrant = spec.entrant(config)
        found.setdefault(entrant.name, entrant)
    return list(found.values()), unavailable


def bounds_of(specs: Sequence[CacheSpec], config: Any) -> list[CacheSpec]:
    """Random and recency with the settings of every cache that evicts; with a quarter of the tokens if none does."""
    found: list[CacheSpec] = []
    for spec in specs:
        if spec.head in POLICIES:
            kept = {n: v for n, v in spec.settings.items() if n not in ("policy", "policy_options")}
        else:
            try:
                settings = getattr(spec.entrant(config).make(), "settings", None)
            except Unavailable:
                continue
            default = getattr(settings, "default", None)
            eviction = getattr(default, "eviction", None)
            if settings is None or default is None or eviction is None or eviction.demote_to:  # tiers lose no token
                continue
            budget = eviction.budget if settings.budget_bytes is None else f"{settings.budget_bytes}B"
            codecs = {"codec": default.keys}
            if default.keys != default.values:
                codecs = {"keys": default.keys, "values": default.values}
            from_on = {"max_tokens": eviction.max_tokens} if eviction.max_tokens else {}
            kept = {"budget": budget, **codecs, **from_on}
        found += [CacheSpec(head, kept) for head in BOUNDS if kept.get("budget") is not None]
    quarter = {"budget": BOUND_BUDGET, "codec": "identity"}
    return list({str(s): s for s in found or [CacheSpec(head, quarter) for head in BOUNDS]}.values())


def measure_unit(unit: Unit, entrants: Sequence[Entrant], store: Store, on_cache: Callable[[str], Any] | None) -> None:
    """Every cache that the store has no row of; the baseline runs again where others need what it leaves behind."""
    if all(store.has(unit.key, entrant.name) for entrant in entrants):
        return
    run = unit.prepare()
    reference: Any = None
    for entrant in entrants:
        if entrant.name != BASELINE and store.has(unit.key, entrant.name):
            continue
        if on_cache is not None:
            on_cache(entrant.name)
        row = {"unit": unit.key, "measure": unit.measure, "name": unit.name, "seed": unit.seed, "cache": entrant.name}
        try:
            values, left = run(entrant, reference)
        except Exception as error:
            if not entrant.peer:
                raise
            row["unavailable"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            values, left = {}, None
        if entrant.name == BASELINE:
            reference = left
        store.add({**row, "values": values})


def _once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(row["unit"], row["cache"]): row for row in rows}.values())
