"""The `kvcompress` command: the demo on a tiny model, and bad arguments."""

import json
import sys

import pytest
from typer.testing import CliRunner

from hf_kvcompress import cli
from hf_kvcompress.commands import contenders
from hf_kvcompress.harness import specs
from hf_kvcompress.integrations import demo_model as demo_module

from .tiny_model import save_tiny, tiny_llama

SMALL = ["--prompt-tokens", "400", "--score-tokens", "40", "--max-tokens", "16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(cli.build(), list(arguments))


def test_demo_measures_every_cache(tiny, tmp_path):
    file = tmp_path / "result.json"
    names = ["near-lossless", "balanced", "small", "tiny", "int8/int4"]
    caches = [word for name in names for word in ("--cache", name)]
    result = run("demo", "--model", tiny, *caches, "--json", str(file), "--markdown", *SMALL)
    assert result.exit_code == 0, result.output
    for name in ("uncompressed", *names):
        assert result.output.count(name) >= 2, "once in the table, once in Markdown"
    report = json.loads(file.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["uncompressed", *names]
    base = rows["uncompressed"]
    # 400 prompt tokens, 17 of the question, 15 decoded; 2 layers, 2 heads of 16, keys and values, float32
    assert base["nbytes"] == (400 + 17 + 15) * 2 * 2 * 16 * 2 * 4
    assert base["ratio"] == 1 and base["mean_kl"] == 0 and base["delta_perplexity"] == 0
    bits = [rows[name]["bits"] for name in ("near-lossless", "balanced", "small", "tiny")]
    assert bits == sorted(bits, reverse=True)
    for row in report["rows"][1:]:
        assert row["ratio"] == pytest.approx(base["nbytes"] / row["nbytes"])
        assert row["mean_kl"] > 0 and 0 <= row["top1_agreement"] <= 1
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
    assert report["versions"]["transformers"] and report["settings"]["prompt_tokens"] == 400


def test_demo_is_repeatable(tiny, tmp_path):
    def rows(file):
        result = run("demo", "--model", tiny, "--cache", "balanced", "--json", str(tmp_path / file), *SMALL)
        assert result.exit_code == 0, result.output
        return [
            {name: value for name, value in row.items() if not name.endswith("per_second")}
            for row in json.loads((tmp_path / file).read_text())["rows"]
        ]

    assert rows("a.json") == rows("b.json")


def test_demo_reads_a_text_of_the_user(tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("All work and no play makes for a dull text. " * 20)
    assert run("demo", "--model", tiny, "--text", str(file), "--cache", "balanced", *SMALL).exit_code == 0
    file.write_text("Short.")
    result = run("demo", "--model", tiny, "--text", str(file), *SMALL)
    assert result.exit_code == 2
    assert "text: expected at least 440 tokens, got 6" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cache", "enormous"], "got 'enormous'"),
        (["--cache", "int8/int8/int8"], "expected one codec, or KEYS/VALUES"),
        (["--dtype", "int8"], "dtype: expected auto, bfloat16, float16, float32, got 'int8'"),
        (["--score-dtype", "half"], "score-dtype: expected auto, same or float32, got 'half'"),
        (["--prompt-tokens", "2040"], "expected at most 2048 for this model, got 2080"),
    ],
)
def test_demo_names_a_bad_argument_in_one_sentence(tiny, arguments, message):
    result = run("demo", "--model", tiny, *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--prompt-tokens", "3"], ["--depth", "2"], ["--text", "missing.txt"]])
def test_demo_refuses_values_out_of_range(tiny, arguments):
    assert run("demo", "--model", tiny, *arguments).exit_code == 2


def test_demo_without_its_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_module.importlib.util, "find_spec", lambda name: None)
    result = run("demo")
    assert result.exit_code == 2
    assert "hf_kvcompress[demo]" in "".join(result.output.split())


def test_a_cache_that_cannot_run_is_a_row_with_the_reason(tiny, monkeypatch):
    def unavailable(name, config):
        raise contenders.Unavailable("needs a compiler")

    monkeypatch.setattr(specs, "_quanto", unavailable)
    result = run("demo", "--model", tiny, "--cache", "quanto4", *SMALL)
    assert result.exit_code == 0, result.output
    assert "n/a" in result.output and "quanto4: needs a compiler" in result.output


def test_default_caches_fit_the_model():
    config = tiny_llama().config
    assert contenders.default_names(config) == [
        "uncompressed",
        "near-lossless",
        "balanced",
        "small",
        "tiny",
        "HierarchicalCache",
        "CPACCache",
        "quanto4",
    ]
    config.layer_types = ["sliding_attention", "full_attention"]
    assert contenders.default_names(config)[-1] == "quanto4-full"


def test_doctor_lists_versions_and_devices():
    result = run("doctor", "--json")
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert report["devices"]["threads"] >= 1
    assert report["backends"]["HF_KVCOMPRESS_BACKEND"] in ("auto", "torch", "cuda")
    assert report["backends"]["cpu"].startswith("torch") and report["backends"]["sources"] > 0
    assert "torch" in run("doctor").output


def test_doctor_says_what_was_chosen(monkeypatch):
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
    assert json.loads(run("doctor", "--json").output)["backends"]["cpu"] == "torch (HF_KVCOMPRESS_BACKEND=torch)"
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "opencl")
    result = run("doctor", "--json")
    assert result.exit_code == 0
    chosen = json.loads(result.output)["backends"]["HF_KVCOMPRESS_BACKEND"]
    assert chosen == "HF_KVCOMPRESS_BACKEND: expected one of auto, torch, cuda, got 'opencl'"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra_the_command_says_so(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"kvcompress needs {missing}: pip install 'hf_kvcompress[cli]'\n"
