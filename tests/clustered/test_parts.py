"""Residuals, the index of repeats, the tracker, settings and levels, each by itself."""

from __future__ import annotations

import pytest
import torch

from hf_kvcompress.clustered.duplicates import hash_pages
from hf_kvcompress.clustered.repeats import RepeatIndex
from hf_kvcompress.clustered.residual import BITS, decode_residual, encode_residual, residual_bytes
from hf_kvcompress.clustered.settings import ClusterSettings
from hf_kvcompress.clustered.shared import Clusters
from hf_kvcompress.clustered.tracker import PageSimilarityTracker

#: mean square error of a unit normal by bits; the last two code by the largest number
ERROR = {1: 0.363, 2: 0.119, 3: 0.0375, 4: 0.016, 8: 6e-5, 12: 3e-7}


@pytest.mark.parametrize("nbits", BITS)
def test_residuals_have_the_error_and_the_bytes_that_are_stated(nbits):
    base, left = torch.randn(2, 6, 32, 64)
    packed = encode_residual(base + 0.1 * left, base, nbits)
    assert sum(t.nbytes for t in packed.values()) == 6 * residual_bytes(nbits, 32, 64)
    got = decode_residual(packed, base, nbits)
    error = ((got - base - 0.1 * left).square().mean() / 0.01).item()
    assert error <= (1.15 * ERROR[nbits] if nbits else 1.02)


def test_two_bits_take_half_of_a_four_bit_token_codec_with_all_that_comes_on_top():
    for dim in (32, 64, 128, 256):
        assert 32 * (dim / 2 + 2) >= 2.0 * (residual_bytes(2, 32, dim) + 12)


@pytest.mark.parametrize("nbits", [1, 2, 3])
def test_tokens_of_very_different_size_share_a_page(nbits):
    base, left = torch.zeros(1, 32, 64), torch.randn(1, 32, 64) * torch.logspace(0, -1, 32)[:, None]
    got = decode_residual(encode_residual(left, base, nbits), base, nbits)
    error = (got - left).square().sum(-1) / left.square().sum(-1)
    assert error.mean() <= 1.25 * ERROR[nbits]
    assert torch.equal(decode_residual(encode_residual(base, base, nbits), base, nbits), base) or got.isfinite().all()


def _values(tokens: torch.Tensor) -> torch.Tensor:
    table = torch.randn(500, 2, 16, generator=torch.Generator().manual_seed(0))
    return table[tokens].transpose(0, 1)[None]


def test_repeats_are_found_at_any_offset_and_in_any_pieces():
    tokens = torch.randint(0, 500, (700,))
    tokens[437:637] = tokens[101:301]
    index = RepeatIndex(1, 0)
    for start, end in ((0, 300), (300, 301), (301, 512), (512, 700)):
        index.note([0], start, _values(tokens[start:end]))
    spans = index.spans(0, 416, 672, 32, 4)
    inside = [spans[i] for i in range(1, 6)]  # pages that lie wholly within the copy
    assert all(found and found[0] == (0, 416 + 32 * i - 336) for i, found in enumerate(inside, 1))
    assert not index.spans(0, 0, 96, 32, 4)[0]


def test_repeats_across_rows_follow_the_rows():
    tokens = torch.randint(0, 500, (200,))
    index = RepeatIndex(3, 0)
    index.note([0], 0, _values(torch.randint(0, 500, (200,))))
    index.note([1, 2], 0, torch.cat([_values(tokens)] * 2))
    assert index.spans(2, 64, 96, 32, 4)[0][0] == (1, 64)
    index.map_rows([2, 0, 1])
    assert index.spans(0, 64, 96, 32, 4)[0][0] == (2, 64)
    assert index.spans(5, 0, 64, 32, 4) == [[], []]


def test_what_was_taken_back_is_forgotten():
    tokens = torch.randint(0, 500, (300,))
    other = torch.randint(0, 500, (300,))
    cut, straight = RepeatIndex(1, 0), RepeatIndex(1, 0)
    cut.note([0], 0, _values(tokens))
    cut.note([0], 120, _values(other))
    straight.note([0], 0, _values(torch.cat([tokens[:120], other])))
    cut.settle(), straight.settle()
    kept = {tuple(pair) for pair in straight.found[0].tolist()}
    assert {tuple(pair) for pair in cut.found[0].tolist()} <= kept
    assert len(kept) - len(cut.found[0]) <= 2  # those across the cut


def test_hashes_tell_pages_apart():
    pages = torch.randn(200, 8, 16)
    pages[7] = pages[3]
    for dtype in (torch.float32, torch.bfloat16):
        found = hash_pages(pages.to(dtype))
        assert found[7] == found[3] and len(found.unique()) == 199
    swapped = pages[0][[1, 0, *range(2, 8)]]
    assert hash_pages(swapped[None]) != hash_pages(pages[:1])


def test_the_tracker_finds_the_similar_and_takes_features_of_ones_own():
    pages = torch.randn(50, 8, 32)
    pages[40] = pages[11] + 0.1 * torch.randn(8, 32)
    tracker = PageSimilarityTracker()
    assert tracker.similar(pages)[1][40, 0] == 11
    assert [(c.base, c.members) for c in tracker.clusters(pages)] == [(11, (40,))]

    class Means(PageSimilarityTracker):
        def compute_page_features(self, pages):
            return pages.mean(1)

    pages[20] = pages[9].flip(0)
    assert Means().similar(pages)[1][20, 0] == 9 and tracker.similar(pages)[1][20, 0] == -1


def test_many_pages_are_compared_by_their_signs_first(monkeypatch):
    monkeypatch.setattr("hf_kvcompress.clustered.tracker.EXACT", 40)
    pages = torch.randn(300, 8, 32)
    pages[150:] = pages[:150] + 0.1 * torch.randn(150, 8, 32)
    found = PageSimilarityTracker().similar(pages)[1]
    assert (found[150:, 0] == torch.arange(150)).float().mean() >= 0.98


def test_clusters_are_no_larger_than_allowed():
    pages = torch.randn(1, 8, 32) + 0.05 * torch.randn(20, 8, 32)
    found = PageSimilarityTracker(max_cluster_size=4, top_k_similar=16).clusters(pages)
    assert all(len(cluster.members) <= 3 for cluster in found)
    members = [m for cluster in found for m in cluster.members]
    assert len(set(members)) == len(members) and not set(members) & {cluster.base for cluster in found}


@pytest.mark.parametrize(
    "argument, bad",
    [
        ("similarity_threshold", 0),
        ("similarity_threshold", 1.5),
        ("similarity_threshold", "high"),
        ("max_cluster_size", 1),
        ("max_cluster_size", 2.5),
        ("min_compression_ratio", 0.5),
        ("min_compression_ratio", float("nan")),
        ("top_k_similar", 0),
        ("adaptive", 1),
        ("level", 4),
        ("importance", None),
        ("delta_bits", 6),
        ("frame", "sideways"),
    ],
)
def test_bad_settings_are_named(argument, bad):
    names = {"adaptive": "adaptive_compression", "importance": "use_importance_weighting", "level": "compression_level"}
    with pytest.raises(ValueError, match=f"^{names.get(argument, argument)}: expected"):
        ClusterSettings(**{argument: bad})


def test_the_level_rises_with_pressure_and_falls_back():
    clusters = Clusters(ClusterSettings(level=1))
    levels = []
    for pressure in (0.5, 0.76, 0.72, 0.91, 0.87, 0.8, 0.71, 0.69, 0.2):
        clusters.feel(pressure)
        levels.append(clusters.level)
    assert levels == [1, 2, 2, 3, 3, 2, 2, 1, 1]
    still = Clusters(ClusterSettings(level=2, adaptive=False))
    still.feel(1.0)
    assert still.level == 2
