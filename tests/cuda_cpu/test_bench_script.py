"""`eval/bench_gpu.py --dry`: the script that will run on a GPU runs from end to end on the emulator."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "eval" / "bench_gpu.py"


def test_the_script_runs(tmp_path):
    settings = {"OMP_NUM_THREADS": "1", "HF_KVCOMPRESS_BACKEND": "auto"}
    command = [sys.executable, str(SCRIPT), "--dry", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["probes"].values()) == set(found["vectors"].values()) == {""}
    ours, theirs = found["attention"][1], found["attention"][0]
    assert (theirs["cache"], ours["cache"]) == ("DynamicCache", "tiny")
    assert 0 < ours["bytes"] < theirs["bytes"] / 5, "what is read is packed, in a model of 32-bit floats"
    assert ours["waits"] == "" and ours["step_ms"] > 0
    strategies = {"DynamicCache", "eqrot4", "CPACCache", "HierarchicalCache", "TransformCache"}
    assert {row["cache"] for row in found["overhead"]} == strategies
    assert found["packing"] and {row["cache"] for row in found["generate"]} == {"DynamicCache", "tiny"}
    assert not any("error" in row for part in ("attention", "packing", "overhead", "generate") for row in found[part])


def test_without_a_gpu_it_says_so():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=hidden, timeout=300)
    assert done.returncode == 2 and "no CUDA device; --dry runs on the CPU" in done.stderr
