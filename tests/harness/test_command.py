"""`kvcompress eval`: what it prints and writes, mistakes, and that local things need no network."""

import json
import socket

import pytest
from typer.testing import CliRunner

from hf_kvcompress import cli

from ..tiny_model import save_tiny
from .broken import too_large

SMALL = "--task-length 400 --tasks needle --seeds 1 --size prompt=150 --size scored=16 --size stepped=0 --size probed=4"
SMALL = [*SMALL.split(), "--size", "generated=4", "--size", "timed=0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(cli.build(), ["eval", *arguments])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_run_without_a_network(tiny, tmp_path, no_network):
    caches = ["--cache", "int8/int4", "--cache", "h2o:budget=0.5,codec=kivi4,group_size=32"]
    result = run(
        "--model", tiny, *caches, *SMALL, "--output-dir", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["caches"] == [
        "uncompressed",
        "int8/int4",
        "h2o:budget=0.5,codec=kivi4,group_size=32",
        "random:budget=0.5,codec=kivi4,group_size=32",
        "streaming:budget=0.5,codec=kivi4,group_size=32",
    ]
    assert report["versions"]["transformers"] and report["bench"]["dtype"] == "float32" and report["model"] == tiny
    assert result.output.count("| int8/int4 |") == 2 and "not admissible" in result.output
    assert {"report.json", "report.md", "rows-0.jsonl", "settings.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_the_recall_model_needs_no_tokenizer(no_network):
    result = run("--model", "recall", *SMALL[:-2], "--size", "generated=0", "--size", "timed=0")
    assert result.exit_code == 0, result.output
    assert "| needle |" in result.output and "random:budget=0.25,codec=identity" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cache", "balancd"], "did you mean 'balanced'"),
        (["--cache", "h2o:bugdet=1"], "did you mean 'budget'"),
        (["--suite", "ful"], "did you mean 'full'"),
        (["--size", "prompt"], "size: expected name=whole number, got 'prompt'"),
        (["--size", "promt=3"], "suite: expected sizes among"),
        (["--tasks", "nedle"], "got 'nedle'"),
        (["--dtype", "int8"], "dtype: expected auto"),
        (["--text", "missing.txt"], "got 'missing.txt'"),
        (["--size", "prompt=3000"], "expected at most 2048 for this model"),
    ],
)
def test_a_mistake_is_one_sentence(tiny, arguments, message):
    result = run("--model", tiny, *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert result.output.startswith("kvcompress eval: ") and result.output.count("\n") == 1


def test_results_so_far_are_kept(tiny, tmp_path):
    out = ["--output-dir", str(tmp_path)]
    assert run("--model", tiny, *SMALL, "--tasks", "none", *out).exit_code == 0
    rows = (tmp_path / "rows-0.jsonl").read_text()
    result = run("--model", tiny, *SMALL, "--tasks", "none", *out, "--size", "prompt=160")
    assert result.exit_code == 2 and f"Results so far are kept in {tmp_path}." in result.output
    assert (tmp_path / "rows-0.jsonl").read_text() == rows


def test_what_does_not_fit_is_one_sentence_and_the_results_so_far_are_kept(tiny, tmp_path):
    caches = ["--cache", "int4", "--cache", f"{too_large.__module__}.too_large"]
    result = run("--model", tiny, *SMALL, *caches, "--output-dir", str(tmp_path))
    assert result.exit_code == 1, result.output
    kept, said = result.output.strip().splitlines()
    assert said.startswith("kvcompress eval: model: expected one that fits into memory")
    assert said.endswith("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert kept == f"Results so far are kept in {tmp_path}."
    rows = [json.loads(line) for line in (tmp_path / "rows-0.jsonl").read_text().splitlines()]
    assert [row["cache"] for row in rows] == ["uncompressed", "int4"]


def test_a_text_shorter_than_the_context(tiny, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Too short. " * 10)
    for tasks, message in (
        ("needle", "text: expected at least 400 tokens, got 110"),
        ("none", "text: expected 1 windows of 166 tokens, got a text of 110 tokens"),
    ):
        result = run("--model", tiny, *SMALL, "--text", str(text), "--tasks", tasks)
        assert result.exit_code == 2 and result.output == f"kvcompress eval: {message}\n"


@pytest.mark.parametrize(
    "line, message",
    [('{"context": "x", "question": "y"}', "expected a field answers or answer"), ('{"context": ', "line 1 is none")],
)
def test_a_task_file_with_a_mistake(tiny, tmp_path, line, message):
    file = tmp_path / "tasks.jsonl"
    file.write_text(line + "\n")
    result = run("--model", tiny, *SMALL, "--records", f"qa:{file}")
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert str(file) in result.output


def test_a_model_that_is_not_there(tmp_path):
    result = run("--model", str(tmp_path / "nothing"))
    assert result.exit_code == 2 and "Traceback" not in result.output
