"""Which pages are compared: nearest ones, random pairs, repeated text."""

import pytest
import torch

from hf_kvcompress.analysis import neighbours
from hf_kvcompress.analysis.capture import Captured, Reading
from hf_kvcompress.analysis.neighbours import nearest_earlier, nearest_other, nearest_pairs, random_pairs
from hf_kvcompress.analysis.repeats import find_repeats, shared_prefix


def unit(pages):
    return torch.nn.functional.normalize(pages.flatten(1), dim=1)


@pytest.mark.parametrize("exact", [True, False], ids=["all", "by features"])
def test_nearest_pages_are_those_of_scikit_learn(exact, monkeypatch):
    search = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    if not exact:
        monkeypatch.setattr(neighbours, "EXACT_NUMBERS", 0)
    pages = torch.randn(40, 8, 16)
    pages[20:30] = pages[:10] + 0.3 * torch.randn(10, 8, 16)
    pool = pages[:20]
    values, found = nearest_other(pages[20:], pool, 2)
    model = search.NearestNeighbors(n_neighbors=1, metric="cosine").fit(pool.flatten(1).numpy())
    distance, expected = model.kneighbors(pages[20:].flatten(1).numpy())
    near = slice(0, 10)  # features are to find what is near, not the best of what is not
    assert found[near, 0].tolist() == expected[near, 0].tolist() == list(range(10))
    torch.testing.assert_close(values[near, 0], 1 - torch.tensor(distance[near, 0]), atol=1e-5, rtol=0)
    if exact:
        assert found[:, 0].tolist() == expected[:, 0].tolist()


@pytest.mark.parametrize("exact", [True, False], ids=["all", "by features"])
def test_nearest_earlier_looks_back_only(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(neighbours, "EXACT_NUMBERS", 0)
    pages = torch.randn(30, 8, 16)
    pages[25] = 2 * pages[4]
    values, found = nearest_earlier(pages)
    assert found[0, 0] == -1 and values[0, 0] == -torch.inf
    assert found[25, 0] == 4 and values[25, 0] == pytest.approx(1, abs=1e-5)
    assert found[4, 0] < 4 and bool((found[1:, 0] < torch.arange(1, 30)).all())
    cosines = unit(pages) @ unit(pages).mT
    torch.testing.assert_close(values[1:, 0], cosines[torch.arange(1, 30), found[1:, 0]], atol=1e-5, rtol=0)


def test_scopes_keep_apart():
    owner = torch.tensor([0] * 6 + [1] * 5 + [2])
    pages = torch.randn(12, 4, 8)
    within, across = (nearest_pairs(pages, owner, scope) for scope in ("within", "across"))
    assert len(within) == 5 + 4, "a reading's first page has none before it"
    assert bool((owner[within[:, 0]] == owner[within[:, 1]]).all()) and bool((within[:, 0] > within[:, 1]).all())
    assert len(across) == 12 and bool((owner[across[:, 0]] != owner[across[:, 1]]).all())
    assert len(nearest_pairs(pages[:6], owner[:6], "across")) == 0


@pytest.mark.parametrize("scope, total", [("within", 15 + 10), ("across", 30)])
def test_all_pairs_or_a_sample_of_them(scope, total):
    owner = torch.tensor([0] * 6 + [1] * 5)
    pairs = random_pairs(owner, scope, 1000, torch.Generator().manual_seed(0))
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == total
    some = random_pairs(owner, scope, 7, torch.Generator().manual_seed(0))
    assert len(some) == 7
    assert torch.equal(some, random_pairs(owner, scope, 7, torch.Generator().manual_seed(0)))
    many = random_pairs(torch.arange(5000) % 50, scope, 500, torch.Generator().manual_seed(0))
    assert len(many) <= 500 and bool((many[:, 0] != many[:, 1]).all())
    assert len(many) > (100 if scope == "within" else 400)


def captured(*ids, page_size=8, sinks=2, kept=None):
    readings = []
    for number, own in enumerate(ids):
        pages = (len(own) - sinks) // page_size
        held = torch.arange(pages) if kept is None else torch.tensor(kept[number])
        readings.append(Reading(f"p{number}", torch.tensor(own), len(own), pages, held))
    return Captured(page_size, sinks, readings)


def test_text_is_found_again_at_any_offset():
    passage = list(range(100, 116))
    first = [*range(7), *passage, *range(20, 40), *passage, *range(60, 70)]  # at 7 and at 43
    found = find_repeats(captured(first))
    assert found["across"] == []
    assert [(r.page, r.reading, r.start) for r in found["within"]] == [(6, 0, 50 - 36)], "the page at 50, by that at 14"
    other = [5, 5, 5, *passage, *range(300, 330)]
    two = find_repeats(captured(first, other))
    pages = (len(first) - 2) // 8
    assert two["within"] == found["within"]
    assert [(r.page, r.reading, r.start) for r in two["across"]] == [(1, 1, 6), (6, 1, 10), (pages + 1, 0, 14)]


def test_a_span_is_held_only_in_one_piece():
    own = captured(list(range(60)), list(range(60)), kept=[[0, 1, 3], [2, 3, 4]])
    assert own.slot(0, 1) is None, "sinks are not held"
    assert own.slot(0, 2) == 0 and own.slot(0, 5) == 3 and own.slot(0, 10) == 8
    assert own.slot(0, 11) is None, "its second page is not held"
    assert own.slot(0, 18) is None and own.slot(0, 26) == 16
    assert own.slot(1, 18) == 24 and own.slot(1, 30) == 36 and own.slot(1, 40) is None
    assert own.starts.tolist() == [2, 10, 26, 18, 26, 34] and own.owner.tolist() == [0, 0, 0, 1, 1, 1]


def test_common_beginnings():
    ids = [torch.tensor(own) for own in ([1, 2, 3, 4], [1, 2, 9], [7], [1, 2, 3])]
    assert shared_prefix(ids) == [3, 2, 0, 3]
