"""Shared pages in files: once each, bit for bit, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.prefix.cache import PrefixCache

from ..conformance.state import decoded, equal
from .test_cache import MODEL, cpac, random_ids, read_prompt, repeating, shares

#: with a window that holds both copies of a repeated text
SLIDING = MistralForCausalLM(
    MistralConfig(**{**MODEL.config.to_dict(), "model_type": "mistral", "sliding_window": 190})
)
SLIDING = SLIDING.eval()


def more_of(ids: torch.Tensor) -> torch.Tensor:
    """What goes on with both a part that is there already and new tokens."""
    return torch.cat([ids[:, 20:90], random_ids(len(ids), 21, seed=4)], dim=1)


@pytest.mark.parametrize("codec", ["int4", "eqrot4", "kivi4"])
@pytest.mark.parametrize("model", [MODEL, SLIDING], ids=["full", "sliding"])
def test_a_loaded_cache_goes_on_bit_for_bit(codec: str, model: Any, tmp_path: Path) -> None:
    ids, felt = repeating(3), [0.1, 0.95, 0.95, 0.1]
    cache = read_prompt(cpac(model.config, codec=codec, pressure=lambda: felt.pop(0)), ids, model)
    read_prompt(cache, random_ids(3, 9, seed=7), model)
    assert cache.level == 3 and shares(cache) > 20
    cache.save(tmp_path / "cache")
    loaded = kvc.CPACCache.load(tmp_path / "cache", model.config, pressure=lambda: 0.95)
    assert equal(decoded(loaded), decoded(cache))
    assert 0.997 * cache.nbytes <= loaded.nbytes <= cache.nbytes  # views leave some of their room behind
    assert loaded.level == 3 and shares(loaded) == shares(cache)
    before = shares(cache)
    felt[:] = [0.95] * 9
    for step in (more_of(ids), ids[:, :1], ids[:, 60:80]):
        for one in (cache, loaded):
            read_prompt(one, step, model)
        assert equal(decoded(loaded), decoded(cache))
    assert shares(cache) == shares(loaded) > before
    for one in (cache, loaded):
        one.crop(-3) if model is MODEL else None
        one.batch_select_indices(torch.tensor([2, 2, 0]))
    assert equal(decoded(loaded), decoded(cache))


def test_a_shared_page_is_in_the_file_once(tmp_path: Path) -> None:
    """Six rows of one text take little more than one."""
    sizes = {}
    for rows in (1, 6):
        ids = random_ids(1, 500, seed=5).repeat(rows, 1)
        cache = read_prompt(cpac(MODEL.config, residual_length=1, use_importance_weighting=False), ids)
        cache.save(tmp_path / "cache")
        sizes[rows] = (tmp_path / "cache").stat().st_size
        assert sizes[rows] < 1.05 * cache.nbytes + 20_000
    assert sizes[6] < 3 * sizes[1]


def test_cut_changed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    read_prompt(cpac(MODEL.config), repeating()).save(path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match="path: expected a file that KIVICache can read, got 'one of clusters'"):
        kvc.KIVICache.load(path, MODEL.config)
    for at in torch.randint(len(data) // 2, len(data), (20,), generator=torch.Generator().manual_seed(0)).tolist():
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match="path: expected a"):
            kvc.CPACCache.load(path, MODEL.config)
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="path: expected a whole file"):
        kvc.CPACCache.load(path, MODEL.config)


def test_another_format_of_shared_pages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_prompt(cpac(MODEL.config), repeating()).save(tmp_path / "cache")
    monkeypatch.setattr("hf_kvcompress.restoring.CLUSTERS_FORMAT", 2)
    with pytest.raises(ValueError, match="path: expected shared pages of format 2, got 'format 1'"):
        kvc.CPACCache.load(tmp_path / "cache", MODEL.config)


def test_a_file_of_another_cache_is_read_and_shared_from_then_on(tmp_path: Path) -> None:
    plain = read_prompt(kvc.CompressedCache(MODEL.config, codec="int4", page_size=8, residual_length=8), repeating())
    plain.save(tmp_path / "plain")
    loaded = kvc.CPACCache.load(tmp_path / "plain", MODEL.config)
    assert equal(decoded(loaded), decoded(plain)) and shares(loaded) == 0
    read_prompt(loaded, random_ids(1, 96, seed=1).repeat(1, 2))
    assert shares(loaded) > 0


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_prefixes_with_shared_pages(disk: bool, tmp_path: Path) -> None:
    """Entries on entries, cropped in their midst, and from a folder: what is open equals a cache that read it all."""

    def store() -> PrefixCache:
        where = {"disk": tmp_path} if disk else {}
        return PrefixCache(model=MODEL, cache=lambda config: cpac(config), block_size=8, **where)

    text = repeating()[0].tolist()
    served = store()
    with kvc.enable(MODEL):
        for end in (160, 200):
            served.add_prefix(text[:end])
        for prompt, known in (([*text, 3], 200), ([*text[:160], 3], 160), (text[:190], None)):
            if disk:
                served.close()
                served = store()
            cache, have = served.open(prompt)
            assert known is None or have == known
            if known is not None:
                fresh = read_prompt(cpac(MODEL.config), torch.tensor([text[:160]]))
                if known > 160:
                    read_prompt(fresh, torch.tensor([text[160:]]))
                assert equal(decoded(cache), decoded(fresh)) and shares(cache) == shares(fresh) > 0
            cache.batch_repeat_interleave(2)
            read_prompt(cache, random_ids(2, 30, seed=9))
            assert cache.get_seq_length() == have + 30
    served.close()
