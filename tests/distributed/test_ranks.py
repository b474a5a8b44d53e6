"""One engine a process over a shared tier: the second process fetches what the first has read; answers as of one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..redis_server import RedisServer, installed
from ..tiny_model import byte_tokenizer, save_tiny, tiny_llama

SCRIPTS = Path(__file__).parents[2] / "eval"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SYSTEM = "You answer in few words. " * 4  # 100 bytes: six blocks of 16 and a rest
PROMPTS = ["What is a cache?", "Why?", "And what is a page of a cache?", "Who?", "How many tokens has a page?"]
CODEC, NEW, KNOWN = "int4", 12, 96


@pytest.fixture(params=["folder", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "prefixes")
        return
    if installed() is None:
        pytest.skip("no redis-server is installed: ranks over Redis are not tested")
    with RedisServer() as server:
        yield server.url


def launch(script: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def served_alone(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    spec = importlib.util.spec_from_file_location("serve_ranks", SCRIPTS / "serve_ranks.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    told = dict(codec=CODEC, max_tokens=NEW, memory_gb=0.05)
    return example.serve(tiny_llama(), byte_tokenizer(), PROMPTS, str(folder), SYSTEM, **told)


def test_two_engines_share_what_they_have_read(shared: str, tmp_path: Path) -> None:
    model, prompts, out = save_tiny(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--system", SYSTEM, "--codec", CODEC, "--max-tokens", str(NEW), "--memory-gb", "0.05"]
    where = ["--model", str(model), "--shared", shared, "--prompts", str(prompts), "--json", str(out)]
    printed = launch("serve_ranks.py", *where, *options)
    told = json.loads(out.read_text())
    answers, (alone,) = served_alone(tmp_path / "alone")
    assert told["answers"] == answers and len(set(answers)) > 1
    assert printed.count("rank ") == 2, "the first process prints, and only that one"
    first, second = (own["prefixes"] for own in told["reports"])
    assert [own["prompts"] for own in told["reports"]] == [3, 2]
    assert (first["fetches"], second["fetches"], second["tokens_fetched"]) == (0, 1, KNOWN)
    assert second["hits"] == 2 and second["tokens_reused"] >= 2 * KNOWN and second["misses"] == 0
    assert alone["prefixes"]["fetches"] == 0 and alone["prompts"] == 5


def test_the_tensor_parallel_script_runs(tmp_path: Path) -> None:
    tiny_llama(vocab_size=260).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    told = ["--model", str(tmp_path), "--preset", "tiny", "--prompt", "word " * 60, "--max-tokens", "5"]
    printed = launch("tensor_parallel.py", *told)
    assert printed.startswith("word word") and "times smaller; bytes of each rank: [" in printed
