"""Calibrated caches wherever others go: files, prefixes, paged pools, plans, searches, specs and the demo's rows."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import hf_kvcompress as kvc
from hf_kvcompress import cli
from hf_kvcompress.calibrating import calibrate
from hf_kvcompress.calibration import Calibration
from hf_kvcompress.commands.contenders import contender, default_names, may_be_calibrated
from hf_kvcompress.harness.specs import CacheSpec
from hf_kvcompress.paging.cache import PagedCache
from hf_kvcompress.paging.engine import PagedAttentionEngine
from hf_kvcompress.planner import plan
from hf_kvcompress.prefix.cache import PrefixCache
from hf_kvcompress.scoring import calibration_texts, standard_text
from hf_kvcompress.tuning import tune

from .calibrated import Words, calibration_for, text_for
from .conformance.factories import SMALL
from .conformance.helpers import BY_NAME
from .tiny_model import byte_tokenizer, save_tiny, tiny_llama

IDS = torch.randint(3, 90, (1, 90), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].model


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "llama.safetensors"
    calibration_for(model.config).save(path)
    return path


@pytest.fixture(scope="module")
def other(model):
    return calibrate(model, [text_for(400, seed=1)], Words(), tokens=384, length=96)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model whose tokens are bytes, in a folder, and its calibration."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model")
    path = folder.parent / "tiny.safetensors"
    calibrate(tiny_llama(), [standard_text("code")], byte_tokenizer(), tokens=1024, length=256).save(path)
    return folder, path


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"policy": "snapkv", "budget": 60}], ids=str)
def test_a_saved_cache_goes_on_with_its_calibration(model, file, tmp_path, policy):
    cache = kvc.TransformCache(model.config, calibration=file, **SMALL, **policy)
    with kvc.enable(model), torch.no_grad():
        model(IDS[:, :70], past_key_values=cache)
        cache.save(tmp_path / "cache")
        # one in memory is the same as the file that was made of it
        for kind, given in ((kvc.TransformCache, calibration_for(model.config)), (kvc.CompressedCache, str(file))):
            loaded = kind.load(tmp_path / "cache", model.config, calibration=given)
            expected = model(IDS[:, 70:], past_key_values=cache).logits
            assert torch.equal(model(IDS[:, 70:], past_key_values=loaded).logits, expected)
            cache = kind.load(tmp_path / "cache", model.config, calibration=given)


def test_a_wrong_or_missing_calibration_is_named(model, file, other, tmp_path):
    cache = kvc.TransformCache(model.config, calibration=file, **SMALL)
    cache.save(tmp_path / "cache")
    own = cache.calibration.fingerprint[:12]
    expected = rf"calibration: expected the one that path was saved with \(fingerprint {own}\), got "
    with pytest.raises(ValueError, match=expected + "None"):
        kvc.TransformCache.load(tmp_path / "cache", model.config)
    with pytest.raises(ValueError, match=expected + f"the one with fingerprint {other.fingerprint[:12]}"):
        kvc.TransformCache.load(tmp_path / "cache", model.config, calibration=other)


def test_a_calibration_that_no_codec_asks_for_is_not_kept(model, file, tmp_path):
    cache = kvc.CompressedCache(model.config, calibration=file, **SMALL)
    cache.save(tmp_path / "cache")
    assert kvc.CompressedCache.load(tmp_path / "cache", model.config).get_seq_length() == 0


# -- prefixes and paged pools ------------------------------------------------------------------------------------------


def test_prefixes_are_kept_by_calibration(model, file, other, tmp_path):
    ids = IDS[0].tolist()
    with kvc.enable(model):
        for calibration, hits in ((file, 0), (other, 0), (file, 1)):
            settings = {**SMALL, "codec": "pca2", "calibration": calibration}
            store = PrefixCache(1, model=model, cache=settings, disk=tmp_path, block_size=8)
            fresh, read = kvc.CompressedCache(model.config, **settings), store.add_prefix(ids[:64])
            assert store.stats()["hits"] == hits, "what another calibration packed is not read"
            cache, have = store.open(ids)
            with torch.no_grad():
                model(IDS[:, :64], past_key_values=fresh)
                model(IDS[:, 64:have], past_key_values=fresh)
                expected = model(IDS[:, have:], past_key_values=fresh).logits
                assert torch.equal(model(IDS[:, have:], past_key_values=cache).logits, expected)
            assert read and have == 88


def test_pages_in_a_pool_and_an_engine(model, file):
    settings = {"codec": "pca2", "calibration": file}
    with kvc.enable(model), torch.no_grad():
        plain, paged = kvc.CompressedCache(model.config, **settings), PagedCache(model.config, **settings)
        for ids in (IDS[:, :70], IDS[:, 70:]):
            expected = model(ids, past_key_values=plain).logits
            assert torch.equal(model(ids, past_key_values=paged).logits, expected)
        assert paged.layers[0].storage.pages.counts[0] > 0
        engine = PagedAttentionEngine(model, memory_gb=0.01, **settings)
        prompts = [IDS[0, :length].tolist() for length in (75, 60, 88)]
        found = engine.generate(prompts, max_tokens=40)
        for prompt, tokens in zip(prompts, found, strict=True):
            alone = PagedAttentionEngine(model, memory_gb=0.01, **settings).generate([prompt], max_tokens=40)
            assert tokens == alone[0]
    with pytest.raises(ValueError, match="calibration: expected a file"):
        PagedAttentionEngine(model, memory_gb=0.01, codec="pca2")


# -- plans and searches ------------------------------------------------------------------------------------------------


def just_too_little(config):
    """A budget for which `eqrot3` everywhere is one byte too large."""
    return plan(config, context=4096, budget=1.0, codec="eqrot3").nbytes - 1


def test_a_plan_with_a_calibration_makes_its_cache(model, file):
    budget = just_too_little(model.config)
    without = plan(model.config, context=4096, budget=budget)
    found = plan(model.config, context=4096, budget=budget, calibration=file)
    assert without.policy is not None and found.policy is None
    assert found.layers[0].keys.startswith("pca2") and found.fits
    cache = kvc.CompressedCache(model.config, **found.cache_settings())
    assert cache.calibration.path == str(file) and json.dumps(found.to_dict())
    assert f"calibration='{file}'" in found.code()
    loose = plan(model.config, context=4096, budget=budget, calibration=Calibration(*_parts(file)))
    assert "calibration" not in loose.cache_settings() and loose.code().endswith("calibration=calibration)")


def _parts(file):
    opened = Calibration.open(file)
    return opened.config, opened.layers


def test_a_plan_refuses_what_does_not_fit(model, file):
    with pytest.raises(ValueError, match="calibration: expected a file .* for codec 'pca2', got None"):
        plan(model.config, context=4096, budget="1MB", codec="pca2")
    opened = Calibration.open(file)
    alien = Calibration(replace(opened.config, model_type="qwen3"), opened.layers)
    with pytest.raises(ValueError, match="expected a calibration of model type 'llama', got one of 'qwen3'"):
        plan(model.config, context=4096, budget=0.2, codec="pca2", calibration=alien)


def test_a_search_with_a_calibration(tiny, tmp_path):
    found = tune(
        tiny_llama(),
        standard_text(),
        0.5,
        tokenizer=byte_tokenizer(),
        calibration=tiny[1],
        prompt_tokens=200,
        score_tokens=48,
        layers_at_once=2,
        keep=tmp_path / "settings.json",
    )
    assert {name for own in found.costs.values() for name in own} == {"int8", "eqrot4", "eqrot3", "pca2"}
    settings = json.loads((tmp_path / "settings.json").read_text())
    cache = kvc.CompressedCache(tiny_llama().config, **settings)
    assert any(layer.config.keys == "pca2" for layer in cache.layers) and cache.calibration.path == str(tiny[1])
    with pytest.raises(ValueError, match="calibration: expected a file .* for codec 'pca2', got None"):
        tune(tiny_llama(), IDS, 0.5, candidates=["pca2"], prompt_tokens=60, score_tokens=20)


def test_the_commands_take_a_calibration(tiny, tmp_path):
    model, calibration = map(str, tiny)
    budget = str(just_too_little(tiny_llama().config))
    told = [*("--model", model), *("--context", "4096"), *("--budget", budget), *("--calibration", calibration)]
    result = CliRunner().invoke(cli.build(), ["plan", *told])
    assert result.exit_code == 0 and f"calibration='{calibration}'" in result.output, result.output
    out = tmp_path / "settings.json"
    told = [*("--model", model), *("--target-kl", "5"), *("--output", str(out)), *("--calibration", calibration)]
    sizes = [*("--candidates", "pca2"), *("--prompt-tokens", "200"), *("--score-tokens", "48")]
    result = CliRunner().invoke(cli.build(), ["tune", *told, *sizes, "--layers-at-once", "9"])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["calibration"] == calibration


# -- specs and the demo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["TransformCache:calibration={},bits=2.5", "pca2/eqrot3:calibration={}"])
def test_a_spec_names_the_file(model, file, spec):
    read = CacheSpec.parse(spec.format(file))
    assert CacheSpec.parse(str(read)) == read and CacheSpec.from_dict(read.to_dict()) == read
    cache = read.entrant(model.config).make()
    assert (cache.settings.default.keys, cache.settings.default.values) == ("pca2", "eqrot3")
    assert cache.calibration is read.entrant(model.config).make().calibration, "the file is read once"


def test_contenders_are_given_the_calibration_that_they_need(model, file, other):
    assert "TransformCache" in default_names(model.config, True) and "TransformCache" not in default_names(model.config)
    assert [may_be_calibrated(name) for name in ("TransformCache", "pca2/eqrot3", "balanced")] == [True, True, False]
    made = contender("TransformCache", model.config, file)
    assert made.name == "TransformCache" and made.make().calibration.path == str(file)
    own = contender(f"TransformCache:calibration={file}", model.config, other).make()
    assert own.calibration.path == str(file)
    contender("balanced", model.config, file).make()


def test_the_demo_has_a_row_for_it(tiny, tmp_path):
    model, calibration = map(str, tiny)
    sizes = [*("--prompt-tokens", "300"), *("--score-tokens", "64"), *("--max-tokens", "16")]
    told = ["demo", *("--model", model), *("--calibration", calibration), *sizes, "--json", str(tmp_path / "demo.json")]
    result = CliRunner().invoke(cli.build(), [*told, "--cache", "TransformCache"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "demo.json").read_text())
    row = next(row for row in report["rows"] if row["name"] == "TransformCache")
    assert row["mean_kl"] > 0 and row["bits"] < 4 and report["settings"]["calibration"]["tokens"] == 1024


def test_nothing_that_is_scored_is_calibrated_on():
    manual, code = calibration_texts()
    scored = {" ".join(part.split()) for part in standard_text().split("\n\n")}
    assert not scored & {" ".join(part.split()) for part in manual.split("\n\n")}
    lines = {line for line in standard_text("code").splitlines() if len(line) > 60}
    assert len(lines & set(code.splitlines())) <= 2  # the licence's and the like
    assert len(manual) > 100_000 and len(code) > 300_000
