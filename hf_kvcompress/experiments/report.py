"""What one experiment found: JSON, Markdown and plots in a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..harness.report import Report

SCHEMA = 1
FILE = "report.json"
SHOWN = 160  # characters of a prompt's end and of an answer in Markdown
#: plots of the harness, where they were written
PLOTS = {"quality.png": "KL divergence against bytes", "speed.png": "Decoding speed against bytes"}


@dataclass
class ExperimentReport:
    """One experiment, finished or failed.

    Args:
        settings: what the results depend on: the experiment's fields, device, versions, files of the model.
        status: "finished" or "failed".
        reason: why it failed, in one sentence.
        seconds: of this run; of its last part if it was taken up again.
        prompt_tokens: of each prompt.
        measured: by the harness: bytes, quality and speed by cache. Seeds are prompts.
        answers: of each prompt, by cache.
        redundancy: of the pages that the prompts make.
        traceback: of an error that is nobody's input.
    """

    settings: dict[str, Any]
    status: str
    reason: str | None
    seconds: float
    prompt_tokens: Sequence[int] = ()
    measured: Report | None = None
    answers: Sequence[Mapping[str, str]] = ()
    redundancy: dict[str, Any] | None = None
    traceback: str | None = None
    #: read from its folder, not run
    is_old: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return str(self.settings["experiment"]["name"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the version of its form."""
        found = {
            "schema": SCHEMA,
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "settings": self.settings,
            "prompt_tokens": list(self.prompt_tokens),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "answers": [dict(own) for own in self.answers],
            "redundancy": self.redundancy,
        }
        return found if self.traceback is None else {**found, "traceback": self.traceback}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ExperimentReport:
        own = {name: value for name, value in found.items() if name not in ("schema", "name")}
        own["measured"] = None if own["measured"] is None else Report.from_dict(own["measured"])
        return cls(**own)

    @classmethod
    def read_finished(cls, folder: Path, settings: Mapping[str, Any]) -> ExperimentReport | None:
        """The report of a folder, if it has one of these settings that is finished."""
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if (found.get("schema"), found.get("status"), found.get("settings")) != (SCHEMA, "finished", settings):
            return None
        report = cls.from_dict(found)
        report.is_old = True
        return report

    def markdown(self) -> str:
        """The whole report, for people."""
        own = self.settings["experiment"]
        lines = [f"# {self.name}", self._head(own)]
        if self.measured is None:
            return "\n\n".join([*lines, f"Failed: {self.reason}"])
        lines.append(self.measured.markdown())
        lines.append(
            "± is the standard deviation over prompts. MB and answers: after the whole prompt. PPL, KL and top-1: of "
            "the end of each prompt, read through the cache. Speed and peak: of the longest prompt."
        )
        if self.redundancy is not None:
            found = "\n".join(f"- {line}" for line in self.redundancy["findings"])
            more = f"Pages of {self.redundancy['page_size']} tokens; all of it is in [redundancy](redundancy)."
            lines += ["## Redundancy", found, more]
        lines += ["## Answers", *(self._answers(n, prompt) for n, prompt in enumerate(own["prompts"]))]
        return "\n\n".join(lines)

    def _head(self, own: Mapping[str, Any]) -> str:
        way = "greedy" if not own["temperature"] else f"temperature {own['temperature']:g}, seed {own['seed']}"
        tokens = ", ".join(map(str, self.prompt_tokens)) or "?"
        return (
            f"Model {own['model'] or 'of the demo'} ({own['dtype']}), prompts of {tokens} tokens, {own['max_tokens']} "
            f"new tokens each, {way}. Took {self.seconds:.0f} s."
        )

    def _answers(self, number: int, prompt: Any) -> str:
        end = str(prompt) if isinstance(prompt, str) else " ".join(map(str, prompt))
        lines = [f"Prompt {number + 1} ends: `{_short(end, last=True)}`", ""]
        return "\n".join(lines + [f"- {cache}: `{_short(text)}`" for cache, text in self.answers[number].items()])

    def save(self, folder: Path) -> None:
        """`report.md`, plots where matplotlib is installed, and last `report.json`, which says that all is there."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.markdown()
        if self.measured is not None:
            text += "".join(f"\n\n![{PLOTS[file]}]({file})" for file in save_plots(self.measured, folder))
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        write(folder / FILE, json.dumps(self.to_dict(), indent=1) + "\n")


def save_plots(measured: Report, folder: Path) -> list[str]:
    """Names of the plots that were written: none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from ..harness.plots import save_plots as save

    return [path.name for path in save(measured, folder)]


def answers_of(measured: Report, tokenizer: Any) -> list[dict[str, str]]:
    """Texts by prompt and cache, up to the end of the answer; token ids where there is no tokenizer."""
    found: dict[int, dict[str, str]] = {}
    for row in measured.rows:
        if row["measure"] == "generation" and "tokens" in row["values"]:
            tokens = row["values"]["tokens"]
            if tokenizer is None:
                text = " ".join(map(str, tokens))
            else:
                end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            found.setdefault(row["seed"], {})[row["cache"]] = text
    return [found[number] for number in sorted(found)]


def write(file: Path, text: str) -> None:
    """The whole text or nothing, even if the process ends in between."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _short(text: str, last: bool = False) -> str:
    """One line of Markdown code."""
    line = " ".join(text.split()).replace("`", "'")
    if len(line) <= SHOWN:
        return line or " "
    return "..." + line[-SHOWN:] if last else line[:SHOWN] + "..."
