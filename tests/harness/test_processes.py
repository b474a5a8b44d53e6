"""Work shared over processes gives what one process gives."""

import json
import os
import subprocess
import sys

import pytest

from hf_kvcompress.harness import evaluate
from hf_kvcompress.harness.loading import load_model
from hf_kvcompress.harness.suites import suite_of

from ..tiny_model import save_tiny

SIZES = dict(prompt=150, scored=16, stepped=0, probed=4, generated=4, timed=4, repeats=1, windows=2, task_seeds=2)
TASKS = ("needle",)


def test_two_processes_give_what_one_gives(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder, out = str(save_tiny(tmp_path / "model")), tmp_path / "out"
    sizes = [f"--size={name}={value}" for name, value in SIZES.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "hf_kvcompress", "eval", "--model", folder, "--cache", "int4", *sizes]
    command += ["--tasks", "needle", "--task-length", "400", "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| int4 |") == 2, "the first process prints, and only that one"
    model, tokenizer = load_model(folder)
    one = evaluate(model, ["int4"], suite_of("quick", **SIZES, tasks=TASKS, task_lengths=(400,)), tokenizer)
    shared = json.loads((out / "report.json").read_text())
    assert shared["processes"] == 2 and one.run["processes"] == 1
    counts = [len((out / f"rows-{index}.jsonl").read_text().splitlines()) for index in range(2)]
    assert sum(counts) == len(one.rows) and counts[1] == 4 * 4, "every second unit of eight, no clock among them"
    for own, other in zip(one.rows, shared["rows"], strict=True):
        assert (own["unit"], own["cache"]) == (other["unit"], other["cache"])
        if own["measure"] != "speed":
            assert flat(other["values"]) == pytest.approx(flat(own["values"]), rel=1e-6, abs=1e-7)


def flat(values):
    """Numbers of a row; lists and mappings opened."""
    found = {}
    for name, value in values.items():
        parts = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
        )
        found.update({f"{name}.{key}": number for key, number in parts})
    return found
