"""Tensor-parallel models work with every cache: two processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_kvcompress as kvc

from ..tiny_model import tiny_llama
from .tensor_parallel import BUDGET

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
TOLERANCE = 1e-5
#: their scores compare heads, of which a rank has only its own
BY_RANK = {"TOVACache", "tova-eqrot4", "adaptive", "AdaKVCache"}
#: hold something once for all heads: references of pages, room on the host, the rotation's table
HOLD_MORE = ("CPACCache", "to-host", "TransformCache")


def test_every_cache_equals_the_whole_model(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out.json"
    sizes = dict(vocab_size=260, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    tiny_llama(**sizes, eos_token_id=None, pad_token_id=0).save_pretrained(model)
    command = [*LAUNCH, "tests.distributed.tensor_parallel", str(model), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(out.read_text())
    for rank, told in enumerate((first, second)):
        prefixes = told.pop("prefixes")
        assert told.pop("served"), "an engine of a rank"
        assert prefixes["right"] == [True] * 3, "a prefix cache of a rank"
        # read, then found in memory; fetched, then found; and read again, as the ranks disagree
        assert prefixes["reused"] == [48, 96, 0] and prefixes["fetched"] == 48
        assert f"part '{1 - rank} of 2' and not '{rank} of 2'" in told.pop("refused")[0]
        told["root"] = prefixes["root"]
    assert first.pop("root") != second.pop("root"), "the ranks would read each other's heads"
    named = {f"{name}, kvcompress" for name in vars(kvc) if name.endswith("Cache")}
    untried = named - set(first) - {f"{name}, kvcompress" for name in ("CompressedCache", "PrefixCache")}
    assert not untried, "caches that were not tried"
    for name, own in first.items():
        kind, other = name.split(",")[0], second[name]
        assert own["sum"] == other["sum"] and own["finite"], f"{name}: the ranks differ"
        assert set(own["heads"]) == set(other["heads"]) == {2}, name
        if kind.startswith("bytes"):
            assert BUDGET / 2 < own["nbytes"] <= BUDGET and other["nbytes"] <= BUDGET, name
            continue
        alone = own if "error" in own else other
        if kind not in BY_RANK:
            assert alone["error"] <= TOLERANCE, f"{name}: off by {alone['error']}"
        if not kind.startswith(HOLD_MORE):
            # a rank has half; what is held once for all heads (lengths, positions) is in both
            assert 1 <= (own["nbytes"] + other["nbytes"]) / alone["alone_nbytes"] <= 1.03, name
