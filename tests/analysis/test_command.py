"""`kvcompress analyze`: prompts files, what it writes, and one sentence for bad input."""

import json

import pytest
from typer.testing import CliRunner

from hf_kvcompress import cli
from hf_kvcompress.analysis import read_prompts
from hf_kvcompress.harness import loading

from ..tiny_model import save_tiny

SMALL = ["--max-tokens", "4", "--measured-prompts", "0", "--page-size", "16"]
TEXT = "All work and no play makes for a dull text. "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(cli.build(), ["analyze", *map(str, arguments)])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_one_command_from_prompts_to_a_report(tiny, tmp_path):
    file = write(tmp_path / "prompts.txt", f"{TEXT * 3}\n\n{TEXT * 2}another one\n")
    out = tmp_path / "out"
    result = run("--model", tiny, "--prompts-file", file, "--output-dir", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "2 prompts" in result.output and "Recommended: kvc.CompressedCache(" in result.output
    report = json.loads((out / "analysis_report.json").read_text())
    assert [own["name"] for own in report["prompts"]] == ["prompt 1", "prompt 2"]
    assert report["settings"]["max_tokens"] == 4 and report["model"]["name"] == tiny


def test_json_goes_to_stdout_alone(tiny, tmp_path):
    file = write(tmp_path / "prompts.txt", TEXT * 3)
    result = run("--model", tiny, "--prompts-file", file, "--output-dir", tmp_path / "out", "-q", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema_version"] == 1


def test_without_a_file_the_mixed_set_is_read(tmp_path):
    result = run("--model", "recall", "--output-dir", tmp_path, *SMALL)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "analysis_report.json").read_text())
    assert [own["name"] for own in report["prompts"]] == ["facts", "filler", "twice"]
    assert report["text"]["repeated_within"] > 0.1


@pytest.mark.parametrize(
    "name, text, whole, expected",
    [
        ("a.txt", "one\n\n two \n", False, [("prompt 1", "one"), ("prompt 2", " two ")]),
        ("a.txt", "one\n\ntwo\n", True, [("prompt 1", "one\n\ntwo\n")]),
        ("a.json", '["one", {"prompt": "two", "name": "b"}]', False, [("prompt 1", "one"), ("b", "two")]),
        ("a.jsonl", '"one"\n\n{"prompt": "two"}\n', False, [("prompt 1", "one"), ("prompt 2", "two")]),
    ],
)  # fmt: skip
def test_prompts_files(tmp_path, name, text, whole, expected):
    assert [(p.name, p.text) for p in read_prompts(write(tmp_path / name, text), whole)] == expected


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n \n", "prompts-file: expected at least one prompt in 'a.txt', got none"),
        ("a.json", "[]", "prompts-file: expected at least one prompt in 'a.json', got none"),
        ("a.json", '["one",\n "two"', "prompts-file: expected JSON in a.json, line 2, column 7"),
        ("a.json", '{"prompt": "one"}', "prompts-file: expected a list in 'a.json', got dict"),
        ("a.json", '["one", {"text": "two"}]', "a.json, entry 2: expected a field 'prompt', got the fields text"),
        ("a.json", '[{"prompt": 3}]', "a.json, entry 1, field 'prompt': expected a string, got int"),
        ("a.json", '["one", ""]', "a.json, entry 2: expected a prompt, got an empty one"),
        ("a.jsonl", '"one"\n{"prompt": "two"', "prompts-file: expected JSON in a.jsonl, line 2, column 17"),
        ("a.jsonl", '"one"\n\n{"prompt": "  "}', "a.jsonl, line 3: expected a prompt, got an empty one"),
        ("a.jsonl", '{"prompt": "one", "name": 4}', "a.jsonl, line 1, field 'name': expected a string, got int"),
        ("a.csv", "one", "prompts-file: expected a file that ends in .txt, .json, .jsonl, got 'a.csv'"),
        ("a.txt", b"\xff\xfeone", "prompts-file: expected UTF-8 text in 'a.txt', got byte 0"),
        ("a.txt", TEXT * 50, "prompt 1: expected at most 2,048 tokens, the model's window, got 2,200"),
        ("a.txt", "short", "prompts: expected at least one of 20 tokens, with what is generated, got 8"),
    ],
)
def test_bad_input_ends_with_one_sentence(tiny, tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("--model", tiny, "--prompts-file", file, "--output-dir", tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_missing_or_gated(tmp_path, monkeypatch):
    result = run("--model", tmp_path / "nothing", "--output-dir", tmp_path / "out", *SMALL)
    assert result.exit_code == 2 and "nothing" in result.output and "Traceback" not in result.output

    def gated(*arguments, **settings):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", gated)
    result = run("--model", "someone/secret", "--output-dir", tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert "gated repo" in result.output and "Make sure" not in result.output and "Traceback" not in result.output
