"""The video policy, and a stream of frames in one cache: positions, kept keys, memory."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import hf_kvcompress as kvc
from hf_kvcompress.policies.base import Candidates
from hf_kvcompress.policies.video import VideoPolicy

SCRIPT = Path(__file__).parents[2] / "eval" / "long_video.py"
SIZE, TURN = 32, 18  # a frame of 32 pixels takes 16 tokens, and one before and after it
OPENING = 12
PAGES = dict(page_size=8, residual_length=8, sink_length=2)


def load_script():
    spec = importlib.util.spec_from_file_location("long_video", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["long_video"] = module
    spec.loader.exec_module(module)
    return module


video = load_script()


@pytest.fixture(scope="module")
def model():
    return video.tiny_model()


@pytest.fixture(scope="module")
def turns(model):
    """An opening, text, then frames, a clip of four frames among them, text last."""
    make = video.TinyTurns(model)
    frames = [make.frame(frame) for frame in video.synthetic_frames(SIZE, 12)]
    return [make.opening(), *frames[:4], clip(make, 4), *frames[4:8], video.text_turn(torch.arange(30, 37)[None])]


def clip(make, number):
    """A turn with a video, and nothing behind it."""
    frames = list(video.synthetic_frames(SIZE, number, seed=3))[::2]
    pixels = torch.cat([make.patches(frame)[0] for frame in frames])
    grid = make.patches(frames[0])[1] * torch.tensor([len(frames), 1, 1])
    ids = torch.tensor([[92, *[91] * (int(grid.prod()) // 4)]])
    inputs = {"input_ids": ids, "mm_token_type_ids": 2 * (ids == 91).long(), "second_per_grid_ts": torch.tensor([1.5])}
    return {**inputs, "pixel_values_videos": pixels, "video_grid_thw": grid}


def in_one_pass(turns):
    """All turns as one prompt."""
    names = dict.fromkeys(name for turn in turns for name in turn)
    by_token = ("input_ids", "mm_token_type_ids")
    return {n: torch.cat([turn[n] for turn in turns if n in turn], dim=1 if n in by_token else 0) for n in names}


def feed_all(model, cache, turns):
    stream = video.VideoStream(model, cache)
    return stream, torch.cat([stream.feed(turn, logits_to_keep=0) for turn in turns], dim=1)


def kept(layer):
    """Positions `[H, N]` and keys `[H, N, D]` of what one layer of a one-row cache has sealed, -1 where none."""
    pages = layer.storage.pages
    table = pages.table([0])
    return pages.look_up("positions", table, -1).long(), pages.decode("key", table)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_positions_of_turns_are_those_of_one_pass(model, turns):
    stream = video.VideoStream(model, None)
    placed = torch.cat([stream.place(turn) for turn in turns], dim=2)
    whole = in_one_pass(turns)
    grids = {name: whole[name] for name in video.GRIDS}
    expected, _ = model.model.get_rope_index(whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"], **grids)
    assert torch.equal(placed, expected)
    assert len(set(map(tuple, placed[:, 0].T.tolist()))) > 100  # the three coordinates do differ


@pytest.mark.parametrize("attention", ["sdpa", "kvcompress"])
def test_turns_in_an_unlimited_cache_equal_one_pass(model, turns, attention):
    model.model.rope_deltas = None
    expected = model(**in_one_pass(turns)).logits
    question = torch.arange(20, 26)[None]
    whole = in_one_pass([*turns, video.text_turn(question)])
    answer = model.generate(**whole, max_new_tokens=6, do_sample=False)[:, -6:]
    after = in_one_pass([*turns, video.text_turn(torch.cat([question, answer], 1)), turns[1]])
    model.model.rope_deltas = None
    last = model(**after).logits[:, -TURN:]
    cache = kvc.CompressedCache(model.config, codec="identity", policy="video", **PAGES)
    if attention == "kvcompress":
        kvc.enable(model)
    try:
        stream, logits = feed_all(model, cache, turns)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(stream.ask(question, 6), answer)
        torch.testing.assert_close(stream.feed(turns[1], 0), last, atol=2e-5, rtol=1e-5)
    finally:
        kvc.disable(model)


def test_kept_keys_carry_the_rotation_they_came_with(model, turns):
    plain = DynamicCache(config=model.config)
    feed_all(model, plain, turns)
    cache = kvc.VideoCache(model.config, tokens_per_frame=TURN, codec="identity", budget=40, **PAGES)
    start = 0
    for turn in turns:  # the uncompressed model's own keys, as it made them turn by turn
        end = start + turn["input_ids"].shape[1]
        for index, layer in enumerate(plain.layers):
            cache.update(layer.keys[:, :, start:end], layer.values[:, :, start:end], index)
        start = end
    cache.commit()
    for index, layer in enumerate(plain.layers):
        positions, keys = kept(cache.layers[index])
        assert positions.shape[1] < start / 3 and bool((positions >= 0).all())
        for head in range(2):
            assert torch.equal(keys[head], layer.keys[0, head, positions[head]])
        dense = cache.layers[index].dense("key")[0]
        assert torch.equal(dense[:, -8:], layer.keys[0, :, -8:])  # the exact window behind them


def test_the_models_own_keys_under_a_budget(model, turns):
    """The first layer's keys depend on no other token: what the stream keeps of them is bit-equal as well."""
    plain = DynamicCache(config=model.config)
    feed_all(model, plain, turns)
    cache = kvc.VideoCache(model.config, tokens_per_frame=TURN, codec="identity", budget=40, **PAGES)
    with kvc.enable(model):
        feed_all(model, cache, turns)
    positions, keys = kept(cache.layers[0])
    for head in range(2):
        assert torch.equal(keys[head], plain.layers[0].keys[0, head, positions[head]])


# -- scores ------------------------------------------------------------------------------------------------------------


def candidates(keys, values, positions=None, heads=1):
    """Lanes of one key-value head."""
    if positions is None:
        positions = torch.arange(keys.shape[1]).expand(keys.shape[0], -1)
    nothing = keys[:, :0], positions[:, :0]
    return Candidates(positions, heads, lambda: keys, lambda: values, lambda: nothing)


def frames_of(scenes, patches=6, dim=16, noise=0.02):
    """Keys and values `[1, frames * patches, dim]` of frames that show the scenes with these numbers."""
    made = torch.randn(2, max(scenes) + 1, patches, dim)
    keys, values = made[:, scenes] + noise * torch.randn(2, len(scenes), patches, dim)
    return keys.flatten(0, 1)[None], values.flatten(0, 1)[None]


def test_old_copies_go_first_and_the_newest_stays():
    keys, values = frames_of([0, 0, 0, 0, 1, 0, 0, 0])
    score = VideoPolicy(tokens_per_frame=6, value_weight=0.0).score(candidates(keys, values)).unflatten(1, (8, 6))[0]
    copies, rare, newest = score[[0, 1, 2, 3, 5, 6]], score[4], score[7]
    assert copies.max() < 0.1 < 0.3 < rare.min()
    assert bool((newest == 1).all())  # nothing newer to compare with


def test_a_rotation_between_frames_changes_nothing():
    keys, values = frames_of([0, 0, 0, 1, 0, 0])
    angles = torch.arange(36).div(6, rounding_mode="floor")[:, None] * torch.rand(8) * 3
    cos, sin = angles.cos(), angles.sin()
    a, b = keys[..., :8], keys[..., 8:]
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    policy = VideoPolicy(tokens_per_frame=6)
    expected = policy.score(candidates(keys, values))
    torch.testing.assert_close(policy.score(candidates(rotated, values)), expected, atol=1e-4, rtol=1e-4)


def test_tokens_are_compared_with_the_next_that_is_left_of_their_place():
    keys, values = frames_of([0, 1, 2, 0, 0])
    left = torch.tensor([0, 1, 2, 3, 6, 7, 12, 18, 19, 24, 26])
    policy = VideoPolicy(tokens_per_frame=6, value_weight=0.0)
    score = policy.score(candidates(keys[:, left], values[:, left], left[None]))[0]
    old, unique = torch.isin(left, torch.tensor([0, 1, 2, 18])), torch.isin(left, torch.tensor([6, 7, 12]))
    assert score[old].max() < 0.1 < 0.3 < score[unique].min()
    assert bool((score[~old & ~unique] == 1).all())


def test_absent_candidates_and_shifted_lanes_do_not_matter():
    keys, values = frames_of([0, 0, 1, 0])
    policy = VideoPolicy(tokens_per_frame=6)
    alone = policy.score(candidates(keys, values))
    padded = torch.nn.functional.pad(keys, (0, 0, 0, 5)), torch.nn.functional.pad(values, (0, 0, 0, 5))
    lanes = [torch.cat([x, torch.randn_like(x)]) for x in padded]
    positions = torch.arange(29).masked_fill(torch.arange(29) >= 24, -1)
    both = policy.score(candidates(*lanes, torch.stack([positions, torch.arange(29)])))
    torch.testing.assert_close(both[:1, :24], alone)
    assert bool(torch.isfinite(both).all())


def test_values_of_large_norm_stay_longer():
    keys, values = frames_of([0, 0, 0, 0], noise=0.0)
    values = torch.nn.functional.normalize(values, dim=-1)
    values[:, 3::6] *= 1.5
    score = VideoPolicy(tokens_per_frame=6, value_weight=0.5).score(candidates(keys, values)).unflatten(1, (4, 6))[0]
    assert bool((score[:3].argmax(1) == 3).all())


def test_without_the_length_of_a_frame_a_neighbour_is_compared():
    keys, values = frames_of(list(range(12)), patches=1)
    keys[:, 4:8], values[:, 4:8] = keys[:, 4:5], values[:, 4:5]  # four alike in a row
    score = VideoPolicy(value_weight=0.0).score(candidates(keys, values))[0]
    assert score[4:7].max() < 1e-3 < 0.3 < score[[0, 1, 2, 7, 8, 9, 11]].min()
    lag = VideoPolicy(value_weight=0.0, lag=3).score(candidates(keys, values))[0]
    assert lag[4] < 1e-3 and lag[5:8].min() > 0.3


@pytest.mark.parametrize("number", [0, 1])
def test_few_or_no_candidates(number):
    for policy in (VideoPolicy(), VideoPolicy(tokens_per_frame=4)):
        keys, values = torch.randn(2, 2, number, 8)
        assert policy.score(candidates(keys, values)).shape == (2, number)


@pytest.mark.parametrize(
    "bad", [{"tokens_per_frame": 0}, {"tokens_per_frame": 2.5}, {"lag": 0}, {"lag": True}, {"value_weight": 1.5}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected .* got"):
        kvc.VideoCache(policy_options=bad)


# -- streams -----------------------------------------------------------------------------------------------------------

RARE, FRAMES = 8, 28


def survivors(model, policy, **options):
    """Part of a rare frame's tokens that is left at the end of a stream which otherwise hardly changes."""
    make = video.TinyTurns(model)
    still = next(iter(video.synthetic_frames(SIZE, 1)))
    frames = [still + 0.01 * torch.randn_like(still) for _ in range(FRAMES)]
    frames[RARE] = torch.rand(3, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    settings = {"policy": policy, "policy_options": options, "budget": 96, "codec": "eqrot4", **PAGES}
    stream = video.VideoStream(model, kvc.CompressedCache(model.config, **settings))
    stream.feed(make.opening())
    for frame in frames:
        stream.feed(make.frame(frame))
        assert video.tokens_stored(stream.cache) <= 96
    first = OPENING + RARE * TURN
    positions = torch.cat([kept(layer)[0] for layer in stream.cache.packed_layers()])
    inside = ((positions > first) & (positions < first + TURN - 1)).sum(1)
    return inside.float().mean().item() / (TURN - 2)


def test_a_rare_frame_outlives_a_still_scene(model):
    with kvc.enable(model):
        parts = {policy: survivors(model, policy) for policy in ("streaming", "random")}
        parts["video"] = survivors(model, "video", tokens_per_frame=TURN)
    assert parts["streaming"] == 0 and parts["random"] < 0.3
    assert parts["video"] > 0.7, parts


def options(**changes):
    own = dict(model=None, device="cpu", frames=60, size=SIZE, policy="video", codec="eqrot4", budget=112)
    return argparse.Namespace(**{**own, "attention": "kvcompress", "answer_tokens": 3, **changes})


@pytest.mark.parametrize("attention", ["kvcompress", "sdpa"])
def test_the_script_streams_at_one_size_and_answers(attention, capsys, monkeypatch):
    monkeypatch.setattr(video, "WARM_UP", 400)
    result = video.run(options(attention=attention, codec="int8"))
    assert result["growth"] <= video.FLAT and result["tokens_per_turn"] == TURN
    last = result["turns"][-1]
    assert last["stored"] <= 112 and last["seen"] == OPENING + 60 * TURN and last["cache"] < last["plain"] / 4
    assert "asked about the newest frame: token ids" in capsys.readouterr().out


def test_the_script_notices_a_cache_that_grows(monkeypatch):
    monkeypatch.setattr(video, "WARM_UP", 400)
    monkeypatch.setattr(video.kvc, "CompressedCache", lambda config, **_: kvc.EqRotCache(config))
    with pytest.raises(RuntimeError, match="grew by"):
        video.run(options())
