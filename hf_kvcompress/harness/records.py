"""Questions and summaries of a data set as tasks: a local JSON file, or a name of the datasets library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .agreement import rouge_l, token_f1
from .asking import Question, TaskSample
from .tasks import Task

#: kind -> what is asked, where texts and answers may stand, how an answer is scored
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable[[str, str], float | None]]] = {
    "qa": ("\n\nQuestion: {question}\nAnswer:", ("context", "passage"), ("answers", "answer"), token_f1),
    "summary": ("\n\nSummary:", ("document", "article", "text"), ("summary", "highlights"), rouge_l),
}


def record_tasks(tokenizer: Any, sources: Sequence[str], length: int, device: Any = "cpu") -> list[Task]:
    """A task for each `qa:SOURCE` or `summary:SOURCE`; SOURCE is a .json or .jsonl file or `datasets:NAME`.

    `datasets:NAME:CONFIG:SPLIT` names more of it. Answers are scored by the best F-measure of words over the references
    (qa) or by ROUGE-L (summary). A context longer than `length` tokens is cut at its end.

    Raises:
        ValueError: an unknown kind, no such source, or a record without what is needed, by its number.
    """
    found = []
    for source in sources:
        kind, _, path = source.partition(":")
        if kind not in KINDS or not path:
            raise ValueError(f"records: expected qa:SOURCE or summary:SOURCE, got {source!r}")
        if kind == "summary" and rouge_l("a", "a") is None:
            raise ValueError("records: summaries need rouge-score: pip install 'hf_kvcompress[eval]'")
        records = [_checked(kind, path, number, record) for number, record in enumerate(_read(path))]
        if not records:
            raise ValueError(f"records: expected at least one record in {path!r}, got none")
        name = f"{kind}:{Path(path.split(':')[1] if path.startswith('datasets:') else path).stem}"
        found.append(Task(name, _maker(tokenizer, kind, records, length, device)))
    return found


def _read(path: str) -> list[Any]:
    if path.startswith("datasets:"):
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(f"records: {path!r} needs datasets: pip install 'hf_kvcompress[eval]'") from None
        name, config, split = (path.removeprefix("datasets:").split(":") + ["", ""])[:3]
        return list(load_dataset(name, config or None, split=split or "test"))
    if not Path(path).is_file():
        raise ValueError(f"records: expected a .json or .jsonl file or datasets:NAME, got {path!r}")
    text = Path(path).read_text(encoding="utf-8")
    lines = text.splitlines() if path.endswith(".jsonl") else [text]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"records: expected JSON in {path!r}, line {number} is none: {error}") from None
    if path.endswith(".jsonl"):
        return found
    whole = found[0] if found else []
    whole = whole["data"] if isinstance(whole, Mapping) and "data" in whole else whole
    if not isinstance(whole, list):
        raise ValueError(f"records: expected a list of records in {path!r}, got {type(whole).__name__}")
    return whole


def _checked(kind: str, path: str, number: int, record: Any) -> tuple[str, str, list[str]]:
    """Context, question and right answers of a record."""
    asked, contexts, answers, _ = KINDS[kind]
    place = f"records: record {number} of {path!r}"
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected a mapping, got {type(record).__name__}")

    def pick(names: Sequence[str]) -> Any:
        value = next((record[name] for name in names if record.get(name)), None)
        if value is None:
            raise ValueError(f"{place}: expected a field {' or '.join(names)}, got {', '.join(map(str, record))}")
        return value

    right = pick(answers)
    right = right["text"] if isinstance(right, Mapping) and "text" in right else right  # as SQuAD has them
    texts = [right] if isinstance(right, str) else list(right)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{place}: expected answers that are texts, got {right!r}")
    question = asked.format(question=pick(("question",))) if "{question}" in asked else asked
    return str(pick(contexts)), question, texts


def _maker(
    tokenizer: Any, kind: str, records: Sequence[tuple[str, str, list[str]]], length: int, device: Any
) -> Callable[[int], TaskSample]:
    measure = KINDS[kind][3]

    def make(seed: int) -> TaskSample:
        context, asked, right = records[seed % len(records)]
        ids, question, target = (
            tokenizer(text, add_special_tokens=special)["input_ids"]
            for text, special in ((context, True), (asked, False), (" " + right[0].strip(), False))
        )

        def score(given: list[int]) -> float:
            text = tokenizer.decode(given, skip_special_tokens=True).strip().split("\n")[0]
            return max(measure(text, own) or 0.0 for own in right)

        own = [torch.tensor([part], device=device) for part in (ids[:length], question, target)]
        return TaskSample(own[0], [Question(own[1], own[2], score, len(target) + 2, is_open=True)])

    return make
