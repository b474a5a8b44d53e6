"""`kvcompress serve-demo` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_kvcompress import cli

from ..tiny_model import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def test_prompts_are_served_and_prefixes_reused(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--model", tiny, "--enable-paging", "--enable-prefix-cache", "--block-size", "16", "--max-tokens", "4"]
    cached = ["--cache-dir", str(tmp_path / "prefixes")]
    result = CliRunner().invoke(cli.build(), ["serve-demo", *options, *cached, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["prompts"] == 8 == len(report["answers"]) and report["prefix_hit_rate"] == pytest.approx(7 / 8)
    assert report["memory_savings"] > 0.5 and "prompt tokens reused" in result.output
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one line\n\nanother line\n")
    plain = ["--prompts-file", str(prompts), "--no-enable-paging", "--no-enable-prefix-cache", "--codec", "identity"]
    result = CliRunner().invoke(cli.build(), ["serve-demo", "--model", tiny, "--max-tokens", "4", *plain])
    assert result.exit_code == 0 and "2 prompts" in result.output, result.output


def test_bad_arguments_are_told(tiny: str) -> None:
    for options, message in (
        (["--block-size", "12"], "block_size: expected one of"),
        (["--codec", "nosuch"], "codec: expected one of"),
        (["--memory-gb", "1e-9"], "memory_gb: expected more than the"),
    ):
        result = CliRunner().invoke(cli.build(), ["serve-demo", "--model", tiny, *options])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
