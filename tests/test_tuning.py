"""Tuned settings meet the target on their texts, take fewer bytes than 8 bits everywhere, and read back equal."""

import json

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from hf_kvcompress import CompressedCache, cli, enable
from hf_kvcompress.config import CacheConfig
from hf_kvcompress.planner import describe
from hf_kvcompress.scoring import score, standard_text, tokenize
from hf_kvcompress.tuning import tune

from .tiny_model import byte_tokenizer, save_tiny, tiny_llama

PROMPT, SCORED = 200, 48
LENGTHS = {"prompt_tokens": PROMPT, "score_tokens": SCORED}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def texts():
    whole = tokenize(byte_tokenizer(), standard_text(), 2 * (PROMPT + SCORED))
    return list(whole.split(PROMPT + SCORED, dim=1))


def kl_of(model, texts, **settings):
    found = []
    for ids in texts:
        reference = score(model, ids, lambda: DynamicCache(config=model.config), PROMPT)
        with enable(model):
            made = score(model, ids, lambda: CompressedCache(model.config, **settings), PROMPT, reference=reference)
        found.append(made.kl)
    return torch.cat(found).mean().item()


def test_the_target_is_met_with_fewer_bytes_than_8_bits(model, texts, tmp_path):
    target = kl_of(model, texts, codec="eqrot4")
    file, told = tmp_path / "settings.json", []
    found = tune(model, texts, target, keep=file, on_measured=lambda *now: told.append(now), **LENGTHS)
    settings = json.loads(file.read_text())
    assert CacheConfig.from_dict(settings) == found.settings == CompressedCache(model.config, **settings).settings
    assert found.kl == pytest.approx(kl_of(model, texts, **settings), rel=1e-4)
    assert found.kl <= target
    uniform = {
        codec: describe(model.config, CacheConfig.make(codec=codec), context=PROMPT + SCORED, dtype=model.dtype).nbytes
        for codec in ("int8", "eqrot4")
    }
    assert found.nbytes <= uniform["eqrot4"] < uniform["int8"], "no worse than one codec with the same KL"
    assert [done for done, _, _ in told] == list(range(1, found.measurements + 1))
    assert all(total >= done for done, total, _ in told)
    assert found.perplexity > 1 and found.base_perplexity > 1
    report = json.loads(json.dumps(found.to_dict()))
    assert report["kl"] == found.kl and len(report["costs"]) == 4  # keys and values of two layers


def test_a_looser_target_takes_no_more_bytes(model, texts):
    few = {**LENGTHS, "candidates": ("int8", "eqrot3"), "layers_at_once": 2}
    strict, loose = (tune(model, texts[:1], target, **few) for target in (0.002, 0.5))
    assert strict.nbytes > loose.nbytes
    assert {strict.settings.default.keys, strict.settings.default.values} <= {"int8", "eqrot3"}
    assert not loose.settings.layers, "both layers share their codecs"


def test_a_target_out_of_reach_says_what_the_mildest_codec_costs(model, texts):
    with pytest.raises(ValueError, match="target_kl: expected at least .* which eqrot2 everywhere costs"):
        tune(model, texts[:1], 1e-9, candidates=("eqrot2",), **LENGTHS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_kl": 0}, "target_kl: expected a number above 0"),
        ({"candidates": ()}, "candidates: expected codec names"),
        ({"candidates": ("int9",)}, "expected 8 or 4 or 3 or 2 bits"),
        ({"texts": "a text"}, "tokenizer: expected the model's tokenizer"),
        ({"texts": []}, "texts: expected at least one text"),
        ({"texts": torch.zeros(1, 9, dtype=torch.long)}, r"texts: expected strings or token ids \[1, 248 or more\]"),
        ({"layers_at_once": 0}, "layers_at_once: expected at least 1"),
    ],
)
def test_a_bad_argument_is_named(model, texts, changes, message):
    arguments = {"texts": texts, "target_kl": 0.1, **LENGTHS, **changes}
    with pytest.raises(ValueError, match=message):
        tune(model, arguments.pop("texts"), arguments.pop("target_kl"), **arguments)


def test_the_command_writes_settings(tmp_path):
    folder, out, report = str(save_tiny(tmp_path / "tiny")), tmp_path / "settings.json", tmp_path / "report.json"
    (tmp_path / "text.txt").write_text(standard_text()[:2000])
    arguments = ["--model", folder, "--text", str(tmp_path / "text.txt"), "--output", str(out), "--json", str(report)]
    lengths = ["--prompt-tokens", "128", "--score-tokens", "40", "--candidates", "int8,eqrot3"]
    result = CliRunner().invoke(cli.build(), ["tune", "--target-kl", "0.05", *arguments, *lengths])
    assert result.exit_code == 0, result.output
    assert CompressedCache(tiny_llama().config, **json.loads(out.read_text())).settings.default
    assert json.loads(report.read_text())["kl"] <= 0.05
    short = CliRunner().invoke(cli.build(), ["tune", "--target-kl", "0.05", *arguments, "--prompt-tokens", "5000"])
    assert short.exit_code == 2 and "text: expected at least" in " ".join(short.output.split())
