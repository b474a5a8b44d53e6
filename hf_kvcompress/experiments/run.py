"""Runs experiments one after the other: one that fails is recorded, one that is done is not done again."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..environment import versions
from ..harness.errors import sentence
from ..harness.evaluate import entrants_of, measure_unit
from ..harness.loading import check_length, load_model, scoring_copy
from ..harness.report import Report
from ..harness.specs import Unavailable
from ..harness.store import SETTINGS, Store
from ..integrations.demo_model import demo_model
from .experiment import Experiment
from .measures import units_of
from .redundancy import LEAST_TOKENS, redundancy_of
from .report import ExperimentReport, answers_of
from .summary import Summary

#: called with the experiment's number and name, how many there are, units done and in all, and what runs now
OnProgress = Callable[[int, str, int, int, int, str], None]
OUR_FILES = (SETTINGS, "rows-*.jsonl", "report.*", "*.png")


def run_experiments(
    experiments: Sequence[Experiment],
    output_dir: str | Path,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Summary:
    """Run experiments and write a folder for each of them, and a summary of all.

    An experiment that was finished with the same settings, versions and model files is read and not run; one that was
    stopped goes on where it was; one with other settings begins anew. An error ends its experiment alone.

    Raises:
        ValueError: no experiment, or two of one name; OSError: the folder cannot be written.
    """
    names = [experiment.name.lower() for experiment in experiments]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"experiments: expected at least one, each with a name of its own, got {names}")
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    models = _Models(device)
    reports: list[ExperimentReport] = []
    for number, experiment in enumerate(experiments):

        def tell(done: int, total: int, label: str, number: int = number, name: str = experiment.name) -> None:
            if on_progress is not None:
                on_progress(number, name, len(experiments), done, total, label)

        folder = out / experiment.name
        settings = json.loads(json.dumps(settings_of(experiment, device)))
        report = ExperimentReport.read_finished(folder, settings)
        if report is None:
            tell(0, 1, "preparing")
            begun = time.perf_counter()
            report = _run(experiment, folder, settings, models, tell)
            try:
                report.save(folder)
            except OSError:  # a disk that is full is full for all of them
                raise
            except Exception as error:
                report = _failed(settings, time.perf_counter() - begun, "report: ", error)
                report.save(folder)
        reports.append(report)
        tell(1, 1, report.status)
        Summary(reports).save(out, with_plots=number + 1 == len(experiments))  # also of a run that is stopped later
    return Summary(reports)


def settings_of(experiment: Experiment, device: str = "auto") -> dict[str, Any]:
    """What the results of an experiment depend on, without its model being loaded."""
    folder = Path(experiment.model) if experiment.model else None
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    state = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix in (".json", ".safetensors")}
    found = {name: own for name, own in versions().items() if name in ("hf_kvcompress", "torch", "transformers")}
    return {"experiment": experiment.to_dict(), "device": device, "versions": found, "model_files": state}


class _Models:
    """The model of the last experiment, kept for the next one."""

    def __init__(self, device: str):
        self.device = device
        self.key: Any = None
        self.held: tuple[Any, Any, Any] = (None, None, None)

    def get(self, source: str | None, dtype: str) -> tuple[Any, Any, Any]:
        """The model, the one to score with, and the tokenizer."""
        if self.key != (source, dtype):
            self.key, self.held = None, (None, None, None)  # before the next one takes its memory
            model, tokenizer = load_model(source or str(demo_model()), dtype, self.device)
            self.key, self.held = (source, dtype), (model, scoring_copy(model), tokenizer)
        return self.held


def _run(
    experiment: Experiment,
    folder: Path,
    settings: dict[str, Any],
    models: _Models,
    tell: Callable[[int, int, str], None],
) -> ExperimentReport:
    """One experiment; an error is part of what is returned, only an interrupt goes on."""
    begun = time.perf_counter()
    place = ""
    try:
        model, scoring_model, tokenizer = models.get(experiment.model, experiment.dtype)
        prompts = tokenized(experiment, model, tokenizer)
        entrants, notes = entrants_of(experiment.caches, model.config, bounds=False)
        todo = units_of(experiment, model, scoring_model, tokenizer, prompts)
        _clear_other(folder, settings)
        store = Store(folder, settings)
        try:
            for index, unit in enumerate(todo):

                def on_cache(name: str, index: int = index, unit: Any = unit) -> None:
                    nonlocal place
                    place = f"{name}, {unit.measure} of prompt {unit.seed + 1}: "
                    tell(index, len(todo), f"{unit.measure} {unit.seed + 1} {name}")

                measure_unit(unit, entrants, store, on_cache)
            place = ""
            rows = [store.rows[unit.key, entrant.name] for unit in todo for entrant in entrants]
        finally:
            store.close()
        notes = {entrant.name: entrant.note for entrant in entrants if entrant.note} | notes
        report = Report({**settings, "caches": [e.name for e in entrants]}, rows, notes, time.perf_counter() - begun)
        lengths = [ids.shape[1] for ids in prompts]
        answers = answers_of(report, tokenizer)
        place = "redundancy: "
        redundancy = _redundancy(experiment, model, tokenizer, prompts, folder, tell)
        seconds = time.perf_counter() - begun
        return ExperimentReport(settings, "finished", None, seconds, lengths, report, answers, redundancy)
    except Exception as error:
        return _failed(settings, time.perf_counter() - begun, place, error)


def _failed(settings: dict[str, Any], seconds: float, place: str, error: Exception) -> ExperimentReport:
    """The report of an experiment that an error ended, with a traceback if it is nobody's input."""
    own = isinstance(error, ValueError | OSError | ImportError | Unavailable)
    reason = place + ("" if own else f"{type(error).__name__}: ") + sentence(error)
    return ExperimentReport(settings, "failed", reason, seconds, traceback=None if own else traceback.format_exc())


def _redundancy(
    experiment: Experiment,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    folder: Path,
    tell: Callable[[int, int, str], None],
) -> dict[str, Any] | None:
    """Of the prompts' pages; None if all prompts are too short to have any."""
    if max(ids.shape[1] for ids in prompts) < LEAST_TOKENS:
        return None

    def on_progress(what: str, done: int, total: int) -> None:
        tell(done, total, f"redundancy, {what}")

    return redundancy_of(model, tokenizer, prompts, experiment.seed, folder, on_progress)


def tokenized(experiment: Experiment, model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """The prompts `[1, T]`. Raises ValueError for one that does not fit, or cannot be read by this model."""
    limit = experiment.max_model_len
    if limit is not None:
        check_length(model, limit, "max_model_len")
    found = []
    for number, prompt in enumerate(experiment.prompts, 1):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompts: expected token ids in prompt {number}, since the model has no tokenizer")
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            if max(prompt) >= vocabulary:  # type: ignore[type-var]
                raise ValueError(
                    f"prompts: expected token ids below {vocabulary} in prompt {number}, got {max(prompt)}"
                )  # type: ignore
            ids = torch.tensor([prompt])
        length = ids.shape[1]
        if length < 2:
            raise ValueError(f"prompts: expected at least 2 tokens in prompt {number}, got {length}")
        whole, parts = length + experiment.max_tokens, f"prompt {number} ({length} tokens) and max_tokens"
        if limit is not None and whole > limit:
            raise ValueError(f"max_model_len: expected {parts} to be at most {limit} tokens, got {whole}")
        check_length(model, whole, parts)
        found.append(ids)
    return found


def _clear_other(folder: Path, settings: dict[str, Any]) -> None:
    """Take away what an experiment of this name left behind that had other settings."""
    file = folder / SETTINGS
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        for pattern in OUR_FILES:
            for old in folder.glob(pattern):
                old.unlink()
