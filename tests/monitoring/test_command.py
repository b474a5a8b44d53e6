"""`kvcompress monitor`: a run, its data, and the same shown again."""

import json
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from hf_kvcompress import cli

from ..tiny_model import save_tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(cli.build(), ["monitor", *map(str, arguments)])


def test_a_run_and_its_data(tiny, tmp_path):
    folder = tmp_path / "data"
    result = run("--model", tiny, "--prompt", TEXT, "--max-tokens", 24, "--output-dir", folder, "--share", 1)
    assert result.exit_code == 0, result.output
    assert "CompressedCache: 293 tokens seen" in result.output and str(folder) in result.output.replace("\n", "")
    names = {path.name for path in folder.iterdir()}
    files = {"header.json", "steps.jsonl", "events.jsonl", "report.json", "snapshots"}
    assert names == files | ({"report.png"} if find_spec("matplotlib") else set())
    again = run("--read", folder, "--json")
    report = json.loads(again.stdout)
    assert report["schema"] == 1 and report["last_step"]["seen"] == 293 and report["name"] == "data"
    refused = run("--model", tiny, "--prompt", TEXT, "--output-dir", folder)
    assert refused.exit_code == 2 and "output-dir: expected an empty folder" in refused.stderr


def test_several_prompts(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{TEXT}\n\n{TEXT[::-1]}\n")
    out = tmp_path / "found.json"
    options = ["--max-tokens", 8, "--cache", "h2o:budget=128", "--temperature", 0.7, "--json", out]
    result = run("--model", tiny, "--prompts-file", prompts, "--output-dir", tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [own["name"] for own in found] == ["001", "002"]
    assert all(own["last_step"]["tokens_evicted"] > 0 for own in found)
    again = run("--read", tmp_path / "data")
    assert "001" in again.output and "002" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt, prompts-file: expected one of them, got none"),
        (["--prompt", " "], "prompt: expected a text, got an empty one"),
        (["--prompt", "a", "--cache", "nothing-like-it"], "nothing-like-it"),
        (["--prompt", TEXT * 10], "expected at most 2048 for this model"),
        (["--prompt", TEXT, "--share", "7"], "share: expected a number above 0, up to 1, got 7.0"),
    ],
)
def test_bad_input(tiny, tmp_path, arguments, message):
    result = run("--model", tiny, "--output-dir", tmp_path / "data", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "data").exists()


def test_a_folder_without_a_recording(tmp_path):
    result = run("--read", tmp_path)
    assert result.exit_code == 2 and "expected a folder that kvcompress monitor wrote" in result.stderr
