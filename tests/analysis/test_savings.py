"""Planted redundancy is found: the right pages, the right saving; without it there is none."""

import pytest
import torch

from hf_kvcompress.analysis.analyze import _look
from hf_kvcompress.analysis.capture import Captured, LayerStore, Reading
from hf_kvcompress.clustered.residual import member_bytes, plain_bytes
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.config import LayerConfig
from hf_kvcompress.shapes import LayerShape

SIZE, DIM, SINKS, HEADS = 16, 32, 4, 2
THRESHOLDS = (0.7, 0.9)
BASE = LayerConfig(residual_length=32)


def planted(readings=2, pages=12, window=None, plant=()):
    """Random keys and values without a rotation; `plant` copies pages (role, to, from, noise) in all heads."""
    draw = torch.Generator().manual_seed(0)
    tokens = readings * pages * SIZE
    numbers = {role: torch.randn(tokens, HEADS, DIM, generator=draw) for role in ("key", "value")}
    for role, to, source, noise in plant:
        own = numbers[role].unflatten(0, (-1, SIZE))
        own[to] = own[source] + noise * torch.randn(SIZE, HEADS, DIM, generator=draw)
    length = SINKS + pages * SIZE + BASE.residual_length
    found = Captured(SIZE, SINKS)
    for number in range(readings):
        ids = torch.randint(100_000, (length,), generator=draw)
        found.readings.append(Reading(f"p{number}", ids, length, pages, torch.arange(pages)))
    shape = LayerShape(0, "full" if window is None else "sliding", HEADS, DIM, DIM, HEADS, window, True)
    parts = {role: list(own.split(pages * SIZE)) for role, own in numbers.items()}
    found.layers[0] = LayerStore(shape, None, parts["key"], parts["value"])
    return found


def look(captured):
    return _look(captured, THRESHOLDS, 200, 0, BASE, None, None)


def totals(found, role):
    return {(r["scope"], r["threshold"]): r for r in found["savings"]["layers"] if r["role"] == role}


def saved(role, alike, twins=0, heads=HEADS, pages=24):
    codec = make_codec(BASE.keys, role, DIM, page_size=SIZE)
    plain, member, twin = (plain_bytes(codec, SIZE), member_bytes(codec, SIZE, 1), member_bytes(codec, SIZE, 0))
    own = alike * (plain - member) + twins * (member - twin) - 6 * pages - 4 * 2
    return round(heads * max(own, 0))


def test_planted_pages_are_named():
    # page 7 of the first prompt is like its page 2, page 3 of the second (15 of all) like page 5 of the first
    found = look(planted(plant=[("key", 7, 2, 0.1), ("value", 15, 5, 0.1)]))
    rows = {(r["kind"], r["scope"]): r for r in reversed(found["similar_pages"])}
    within, across = rows["key_after_rope", "within"], rows["value", "across"]
    assert within["page"] == {"prompt": "p0", "start": SINKS + 7 * SIZE, "end": SINKS + 8 * SIZE}
    assert within["other"]["start"] == SINKS + 2 * SIZE and within["other"]["prompt"] == "p0"
    assert within["share_of_heads"] == 1 and within["mean_cosine"] > 0.98
    both = {(r["page"]["prompt"], r["page"]["start"]) for r in (across,)} | {
        (r["other"]["prompt"], r["other"]["start"]) for r in (across,)
    }
    assert both == {("p1", SINKS + 3 * SIZE), ("p0", SINKS + 5 * SIZE)}
    assert ("value", "within") not in rows or rows["value", "within"]["mean_cosine"] < 0.5


def test_planted_pages_save_what_their_bytes_say():
    # 6 similar pages of the first prompt (one base), 5 exact copies between prompts
    near = [("key", to, 0, 0.1) for to in range(1, 7)]
    equal = [("value", 12 + i, i, 0.0) for i in range(5)]
    found = look(planted(plant=near + equal))
    keys, values = totals(found, "key"), totals(found, "value")
    for threshold in THRESHOLDS:
        own = keys["within", threshold]
        assert (own["pages"], own["alike"], own["duplicates"]) == (24 * HEADS, 6 * HEADS, 0)
        assert own["saved_bytes"] == saved("key", 6) and own["alike_shuffled"] == 0
        assert values["within", threshold]["alike"] == 0 and values["within", threshold]["saved_bytes"] == 0
        batch = values["batch", threshold]
        assert (batch["alike"], batch["duplicates"]) == (5 * HEADS, 5 * HEADS)
        assert batch["saved_bytes"] == saved("value", 5, twins=5)
    (row,) = [r for r in found["savings"]["total"] if (r["scope"], r["threshold"]) == ("batch", 0.9)]
    assert row["saved_bytes"] == keys["batch", 0.9]["saved_bytes"] + values["batch", 0.9]["saved_bytes"]
    assert row["ratio"] == pytest.approx(row["dense_bytes"] / (row["plain_bytes"] - row["saved_bytes"]))
    assert sum(r["duplicates"] for r in found["heads"] if r["kind"] == "value") == 5 * HEADS


def test_a_threshold_between_two_similarities_tells_them_apart():
    found = look(planted(plant=[("key", 9, 1, 0.1), ("key", 10, 2, 0.75)]))  # cosines about .995 and .8
    keys = totals(found, "key")
    assert keys["within", 0.7]["alike"] == 2 * HEADS and keys["within", 0.9]["alike"] == HEADS


def test_no_page_hangs_on_one_that_is_a_member_itself():
    found = look(planted(plant=[("key", 3, 2, 0.1), ("key", 5, 3, 0.1), ("key", 7, 5, 0.1)]))
    assert totals(found, "key")["within", 0.9]["alike"] == 3 * HEADS, "all hang on page 2"
    chain = look(planted(plant=[("key", 3, 2, 0.41), ("key", 5, 3, 0.41)]))  # cosines .92, .92 and, from 2 to 5, .86
    keys = totals(chain, "key")
    assert keys["within", 0.9]["alike"] == HEADS, "5 is like 3, which is a member, but not like 2"
    assert keys["within", 0.7]["alike"] == 2 * HEADS


def test_what_a_window_has_left_saves_nothing():
    plant = [("key", 3, 1, 0.1), ("key", 10, 9, 0.1)]
    assert totals(look(planted(plant=plant)), "key")["within", 0.9]["alike"] == 2 * HEADS
    found = totals(look(planted(window=6 * SIZE, plant=plant)), "key")["within", 0.9]
    # the window of 96 sees 95 tokens, of which 32 are recent: 3 whole pages of each prompt
    assert found["pages"] == 2 * 3 * HEADS and found["alike"] == HEADS


def test_random_pages_show_nothing():
    found = look(planted(pages=80))
    for row in found["savings"]["total"]:
        assert row["alike"] == row["saved_bytes"] == row["duplicates"] == 0
    shares = [row["beyond_baseline"][scope] for row in found["heads"] for scope in ("within", "across")]
    assert sum(shares) / len(shares) < 0.05
