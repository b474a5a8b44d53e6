"""Scores against the same written out token by token, on lanes of different lengths; mass against eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_kvcompress as kvc
from hf_kvcompress.ops.select import highest
from hf_kvcompress.policies.base import Candidates, Observers
from hf_kvcompress.policies.layer_budgets import layer_weights
from hf_kvcompress.policies.registry import make_policy

from ..conformance.factories import SMALL
from ..conformance.state import held
from ..tiny_model import tiny_llama
from .reference import SCORES, WINDOWS, Lane

HEADS, DIM, GROUPS = 2, 12, 2
EVERY = pytest.mark.parametrize("name", SCORES)


def lanes(name: str, counts: list[int], near: int = 5, seed: int = 0) -> list[list[Lane]]:
    """Random rows of two heads with so many candidates each; the newest queries of a row may be few."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = []
    for row, start in enumerate(range(0, len(counts), HEADS)):
        total = max(counts) * 2 + 10
        sinks_and_window = [0, 1, *range(total, total + near - 2)]
        asked = list(range(total + near - 2 - min(WINDOWS.get(name, 1), 9 - 4 * row), total + near - 2))
        own = []
        for head, count in enumerate(counts[start : start + HEADS]):
            at = (torch.randperm(total - 2, generator=generator)[:count].sort().values + 2).tolist()
            own.append(
                Lane(
                    normal(count, DIM),
                    normal(count, DIM),
                    at,
                    normal(near, DIM),
                    sinks_and_window,
                    normal(count).abs(),
                    normal(GROUPS * len(asked), DIM) / 2,
                    asked * GROUPS,
                    head,
                    groups=GROUPS,
                )
            )
        rows.append(own)
    return rows


def candidates(rows: list[list[Lane]]) -> Candidates:
    """All lanes side by side: zeros and -1 where one has fewer tokens or queries than another."""
    flat = [lane for row in rows for lane in row]

    def pad(tensors: list[torch.Tensor], value: float = 0.0) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    keys, values = pad([lane.keys for lane in flat]), pad([lane.values for lane in flat])
    near = torch.stack([lane.near_keys for lane in flat]), torch.tensor([lane.near_positions for lane in flat])
    asked = max(len(lane.queries) for lane in flat) // GROUPS
    queries = torch.zeros(len(flat), GROUPS, asked, DIM)
    at = torch.full((len(flat), GROUPS, asked), -1)
    for number, lane in enumerate(flat):
        own = len(lane.queries) // GROUPS
        queries[number, :, :own] = lane.queries.unflatten(0, (GROUPS, own))
        at[number, :, :own] = torch.tensor(lane.query_positions).view(GROUPS, own)
    observers = Observers(queries.flatten(1, 2), at.flatten(1, 2), GROUPS)
    return Candidates(
        pad([torch.tensor(lane.positions) for lane in flat], -1),
        HEADS,
        keys=lambda: keys,
        values=lambda: values,
        context=lambda: near,
        mass=pad([lane.mass for lane in flat]),
        observers=observers,
    )


@EVERY
@pytest.mark.parametrize("counts", [[9, 9], [1, 1], [14, 14, 6, 6], [3, 3, 20, 20]], ids=str)
def test_score_is_that_of_the_formula(name: str, counts: list[int]) -> None:
    rows = lanes(name, counts)
    scores = make_policy(name).score(candidates(rows))
    expected = [score for row in rows for score in SCORES[name](row)]
    assert scores.shape == (len(counts), max(counts)) and scores.isfinite().all()
    for got, wanted, count in zip(scores, expected, counts, strict=True):
        torch.testing.assert_close(got[:count].double(), wanted.double(), atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("name", ["snapkv", "expected", "keydiff", "rkv", "h2o", "random"])
def test_heads_may_hold_different_numbers(name: str) -> None:
    rows = lanes(name, [17, 4])
    scores = make_policy(name).score(candidates(rows))
    for got, wanted in zip(scores, SCORES[name](rows[0]), strict=True):
        torch.testing.assert_close(got[: len(wanted)].double(), wanted.double(), atol=2e-6, rtol=2e-4)


def test_options_do_what_they_say() -> None:
    row = lanes("snapkv", [12, 12])
    known = candidates(row)
    plain = make_policy("snapkv", {"kernel_size": 1}).score(known)
    torch.testing.assert_close(plain[0], row[0][0].attention().mean(0), atol=1e-6, rtol=1e-5)
    assert make_policy("snapkv", {"window_size": 7}).window == 7
    redundant, attended = (make_policy("rkv", {"weight": weight}).score(known) for weight in (0.0, 1.0))
    torch.testing.assert_close(attended, make_policy("snapkv").score(known))
    torch.testing.assert_close(make_policy("rkv", {"weight": 0.5}).score(known), (redundant + attended) / 2)
    heads = (row[0][0].queries @ row[0][0].keys.mT).unflatten(0, (GROUPS, -1))
    mean = heads.mean(1).softmax(-1).mean(0) + 0.1
    first = make_policy("expected", {"use_covariance": False, "epsilon": 0.1}).score(known)[0]
    torch.testing.assert_close(first, mean * row[0][0].values.norm(dim=-1))
    one, two = (make_policy("random", {"seed": seed}).score(known) for seed in (0, 1))
    assert (one != two).all() and (one >= 0).all() and (one < 1).all()
    assert torch.equal(one, make_policy("random").score(known))


def test_tova_keeps_the_same_for_all_heads() -> None:
    scores = make_policy("tova").score(candidates(lanes("tova", [10, 10, 8, 8])))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[2], scores[3])
    assert not torch.equal(scores[0], scores[2])


# -- choosing ----------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(-2, 4), min_size=6, max_size=6), min_size=1, max_size=4),
    number=st.integers(0, 9),
)
def test_highest_takes_as_many_and_the_last_of_equals(rows: list[list[int]], number: int) -> None:
    found = highest(torch.tensor(rows, dtype=torch.float64), number)
    for row, own in zip(rows, found, strict=True):
        best = sorted(range(6), key=lambda i: (row[i], i), reverse=True)[:number]
        assert own.nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("uniform", [1, 1, 1]),
        ("pyramid:2", [1.5, 1.0, 0.5]),
        ("pyramid", [1.95, 1.0, 0.05]),
        ([2, 1, 1], [1.5, 0.75, 0.75]),
    ],
    ids=str,
)
def test_layer_weights(rule: str | list[float], expected: list[float]) -> None:
    assert layer_weights(rule, 3) == pytest.approx(expected)
    assert layer_weights("pyramid", 1) == [1.0]


# -- attention mass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("draft", [False, True], ids=["plain", "drafts"])
def test_mass_is_what_eager_attention_pays(draft: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over queries and query group, padding excluded, however the text is cut and whatever is taken back."""
    if blocks:  # a few queries at once, as in long passes
        monkeypatch.setattr("hf_kvcompress.packed_attention.SCORES", 2 * 4 * 2048 * 5)
        monkeypatch.setattr("hf_kvcompress.mass.SCORES", 2 * 4 * 73 * 9)
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 120), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    weights = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    cache = kvc.CompressedCache(model.config, codec="identity", policy="h2o", **SMALL)
    if draft:
        cache.activate_past_recording()
    with kvc.enable(model):
        start = 0
        for size in (70, 1, 1, 8, 40):
            extra, end = 3 * draft, start + size
            longer = [torch.nn.functional.pad(x, (0, 3), value=1) for x in (ids[:, :end], mask[:, :end])]
            at = torch.cat([positions[:, :end], positions[:, end - 1 :][:, :1] + torch.arange(1, 4)], 1)
            fed = slice(start, end + extra)
            seen = longer[1][:, : end + extra]
            model(longer[0][:, fed], attention_mask=seen, position_ids=at[:, fed], past_key_values=cache)
            if draft:
                cache.crop(-3)
            start = end
    for row in range(2):
        real = mask[row].bool()
        for layer, paid in zip(held(cache, row), weights, strict=True):
            expected = paid[row][:, real].unflatten(0, (2, 2)).sum((1, 2))[:, real]
            torch.testing.assert_close(layer.mass, expected, atol=2e-5, rtol=1e-4)
