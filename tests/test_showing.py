"""Caches, stats, plans and reports in a notebook: HTML, data frames and plots from the numbers that they hold."""

import subprocess
import sys

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.paging.sequences import EngineStats
from hf_kvcompress.showing import Shown

from .tiny_model import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def cache(model):
    found = kvc.CompressedCache(model.config, codec="int4")
    with torch.inference_mode():
        model(torch.arange(200)[None], past_key_values=found)
    return found


def prefixes(model):
    found = kvc.PrefixCache(max_cache_size_gb=0.01, model=model, tokenizer=byte_tokenizer())
    found.add_prefix("A <b>prefix</b> that many prompts begin with. " * 8)
    found.generate_with_prefix(found.add_prefix("Another one. " * 16), ["And then?"], max_tokens=2)
    return found


def engine_stats():
    found = EngineStats(generated=12, prompts=3, seconds=2.0, peak_bytes=2**20)
    found.first_token_seconds, found.token_seconds = [0.1, 0.2, 0.9], [0.01, 0.03]
    return found


def shown(model, cache):
    store = prefixes(model)
    return {
        "cache": (cache, 2),
        "stats": (cache.stats(), 2),
        "plan": (kvc.plan(model.config, context=500, budget="1MB"), 2),
        "prefixes": (store, len(store)),
        "prefix stats": (store.store.stats, 2),
        "engine": (engine_stats(), 2),
    }


NAMES = ("cache", "stats", "plan", "prefixes", "prefix stats", "engine")


@pytest.mark.parametrize("name", NAMES)
def test_html(model, cache, name):
    found, rows = shown(model, cache)[name]
    html = found._repr_html_()
    assert html.count("<tr>") == rows + 1 and html.count("<table>") == html.count("</table>") == 1
    assert "<b>" not in html and html.startswith("<p>")


@pytest.mark.parametrize("name", NAMES)
def test_data_frame(model, cache, name):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    found, rows = shown(model, cache)[name]
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == rows and frame.index.is_unique


@pytest.mark.parametrize("name", NAMES)
def test_plot(model, cache, name, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    found, rows = shown(model, cache)[name]
    figure = found.plot()
    (axes,) = figure.axes
    bars = len(found._bars) if isinstance(found, Shown) else 2
    assert len(axes.patches) == rows * bars and axes.get_title()
    figure.savefig(tmp_path / "x.png")


def test_the_numbers_are_those_of_the_thing(model, cache):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame, stats = cache.to_pandas(), cache.stats()
    assert frame["bytes_held"].sum() <= stats["nbytes"] and frame["bytes_uncompressed"].sum() == 2 * 200 * 64 * 4
    plan = kvc.plan(model.config, context=500, budget="1MB")
    assert plan.to_pandas()["nbytes"].sum() == plan.nbytes
    store = prefixes(model)
    assert store.to_pandas()["nbytes"].sum() == store.nbytes
    assert store.store.stats.to_pandas().loc["prompts", "known"] == store.stats()["hits"]
    latencies = engine_stats().to_pandas()
    assert latencies.loc["first token", "p50"] == 0.2 and latencies.loc["each later token", "p95"] == 0.03
    assert "6.0 tokens/s" in engine_stats()._repr_html_()
    bars = cache.plot().axes[0].patches
    assert bars[2].get_height() == pytest.approx(frame["bytes_held"][0] / 2**20)


def test_nothing_yet(model):
    pytest.importorskip("pandas", reason="pandas is not installed")
    empty = kvc.PrefixCache(max_cache_size_gb=0.01, model=model, tokenizer=byte_tokenizer())
    assert len(empty.to_pandas()) == 0 and empty._repr_html_().count("<tr>") == 1
    assert kvc.CompressedCache()._repr_html_().count("<tr>") == 1 and len(kvc.CompressedCache().to_pandas()) == 0


def test_the_package_asks_for_neither_pandas_nor_matplotlib():
    block = "import sys; sys.modules.update(dict.fromkeys(['pandas', 'matplotlib']))"  # transformers may import them
    subprocess.run([sys.executable, "-c", f"{block}; import hf_kvcompress, hf_kvcompress.harness"], check=True)
