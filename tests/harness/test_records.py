"""Data sets of the user's own as tasks, and mistakes in them."""

import json

import pytest

from hf_kvcompress.harness import evaluate
from hf_kvcompress.harness.agreement import token_f1
from hf_kvcompress.harness.records import record_tasks
from hf_kvcompress.harness.suites import suite_of

from ..tiny_model import byte_tokenizer, tiny_llama

QA = [
    {
        "context": "Rosa was born in Oslo. " * 12,
        "question": "Where was Rosa born?",
        "answers": {"text": ["Oslo", "in Oslo"]},
    },
    {"context": "Paul works as a cook. " * 12, "question": "What is Paul?", "answer": "a cook"},
]
SUMMARY = [{"document": "The road went on and on. " * 12, "summary": "A long road."}]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, QA)) + "\n")
    (tmp_path / "roads.json").write_text(json.dumps({"data": SUMMARY}))
    return [f"qa:{tmp_path / 'people.jsonl'}", f"summary:{tmp_path / 'roads.json'}"]


def test_records_become_samples(files):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    tokenizer = byte_tokenizer()
    qa, summary = record_tasks(tokenizer, files, 200)
    assert (qa.name, summary.name) == ("qa:people", "summary:roads")
    sample = qa.make(0)
    (question,) = sample.questions
    assert sample.context.shape == (1, 200)
    assert tokenizer.decode(question.ids[0]) == "\n\nQuestion: Where was Rosa born?\nAnswer:"
    score = [question.score(tokenizer(text)["input_ids"]) for text in (" Oslo.", " in Oslo\nand on", " Bergen")]
    assert score == [1, 1, 0]
    assert tokenizer.decode(qa.make(3).questions[0].ids[0]) == tokenizer.decode(qa.make(1).questions[0].ids[0])
    (question,) = summary.make(0).questions
    assert question.score(tokenizer(" a long way")["input_ids"]) == pytest.approx(2 / 3)


def test_f1_of_words():
    assert token_f1("The cook", "a cook") == 1 and token_f1("", "cook") == 0 and token_f1("", "") == 1
    assert token_f1("a big red house", "red house") == pytest.approx(0.8)


def test_they_run_like_any_task(files):
    sizes = dict(prompt=64, scored=4, stepped=0, probed=0, generated=0, timed=0, windows=1, task_seeds=2, tasks=[])
    model, tokenizer = tiny_llama(), byte_tokenizer()
    report = evaluate(model, ["int4"], suite_of("quick", **sizes), tokenizer, records=files[:1], bounds=False)
    rows = [row for row in report.rows if row["measure"] == "task"]
    assert [(row["name"], row["seed"], row["cache"]) for row in rows] == [
        ("qa:people", seed, cache) for seed in range(2) for cache in ("uncompressed", "int4")
    ]
    assert rows[1]["values"]["kl"] > 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected at least one record"),
        ('{"context": "x", "question": "y"}', "record 0 .* expected a field answers or answer, got context, question"),
        (
            '{"context": "x", "question": "y", "answer": [3]}',
            "record 0 .* expected answers that are texts, got \\[3\\]",
        ),
        ('{"a": 1}\n{"b": ', "line 2 is none"),
        ("[1]", "record 0 .* expected a mapping, got list"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, message):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"records: .*{message}"):
        record_tasks(byte_tokenizer(), [f"qa:{file}"], 100)


@pytest.mark.parametrize("source", ["people.jsonl", "ask:people.jsonl", "qa:", "qa:missing.json"])
def test_a_wrong_source_is_named(source):
    with pytest.raises(ValueError, match="records: expected"):
        record_tasks(byte_tokenizer(), [source], 100)
