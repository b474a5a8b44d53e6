"""The learned score: what teachers say, what the fit learns of it, its file, and the policy in a cache."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import hf_kvcompress as kvc
from hf_kvcompress import cli
from hf_kvcompress.policies.base import Candidates
from hf_kvcompress.policies.learned import LearnedConfig, LearnedPolicy, LearnedWeights, feature_size, features
from hf_kvcompress.shapes import LayerShape, layer_shapes
from hf_kvcompress.training import train_policy
from hf_kvcompress.training.fit import fit_layer
from hf_kvcompress.training.teacher import Lesson, Passage, future_passage, lessons, replay_passage

from ..tiny_model import byte_tokenizer, save_tiny, tiny_llama

TEXT = "".join(f"Sentence {number} says that {number * number % 97} is not {number % 13}. " for number in range(120))
SMALL = dict(tokens=4096, length=512, hidden=8, epochs=2)
PAGES = dict(page_size=8, residual_length=8, sink_length=2)


def random_weights(heads=2, key_dim=16, value_dim=16, layers=(0, 1), num_layers=2, hidden=8):
    size = feature_size(key_dim, value_dim)
    networks = {
        layer: {
            "hidden.weight": torch.randn(heads, size, hidden) / size**0.5,
            "hidden.bias": torch.randn(heads, hidden),
            "out.weight": torch.randn(heads, hidden),
            "out.bias": torch.randn(heads),
        }
        for layer in layers
    }
    shapes = {layer: (heads, key_dim, value_dim) for layer in layers}
    config = LearnedConfig("llama", num_layers, shapes, hidden, max_age=1000, training={"teacher": "both"})
    return LearnedWeights(config, networks)


def candidates(rows=3, number=20, heads=2, dim=16, layer=0, shift=0):
    lanes = rows * heads
    keys, values = torch.randn(2, lanes, number, dim)
    positions = torch.arange(number).expand(lanes, -1) + shift
    near = torch.arange(number, number + 4).expand(lanes, -1) + shift
    context = lambda: (torch.randn(lanes, 4, dim), near)  # noqa: E731
    return Candidates(positions, heads, lambda: keys, lambda: values, context, layer=layer)


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama()


@pytest.fixture(scope="module")
def trained(tiny):
    return train_policy(tiny, byte_tokenizer(), [TEXT], **SMALL)


# -- teachers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("target", ["mass", "error"])
def test_teacher_says_what_attention_weights_say(target, window):
    model = tiny_llama()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 256, (1, 384))
    (shape,) = [shape for shape in layer_shapes(model.config) if shape.layer == 1]
    shape = LayerShape(1, "full", 2, 16, 16, 4, window, True)
    (found,) = lessons(model, [Passage(ids, (256,), (384,))], [shape], target)
    assert model.config._attn_implementation == "eager"
    lesson = found[1]
    cache = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(lesson.keys, cache.layers[1].keys[0])
    if window is not None:
        return
    weights = model(ids, output_attentions=True).attentions[1][0].unflatten(0, (2, 2))  # [H, G, q, n]
    past, later = weights[:, :, :256].sum((1, 2)), weights[:, :, 256:]
    torch.testing.assert_close(lesson.past[0], past, rtol=1e-4, atol=1e-4)
    if target == "mass":
        worth = later.sum((1, 2)) / 128
    else:
        values = lesson.values
        out = later @ values[:, None]
        gap = (values[:, None, None] - out[..., None, :]).square().sum(-1)
        worth = (later.square() * gap).sum((1, 2)) / 128
    power = 2 if target == "error" else 1
    torch.testing.assert_close(lesson.worth[0].mul(power).exp(), worth + 1e-6, rtol=1e-3, atol=1e-6)


def test_teacher_counts_only_what_a_sliding_window_shows():
    shape = LayerShape(0, "sliding", 2, 16, 16, 4, 64, True)
    passage = Passage(torch.randint(0, 256, (1, 384)), (256,), (384,))
    ((found),) = lessons(tiny_llama(sliding_window=64), [passage], [shape], "mass")
    worth = found[0].worth[0].exp()
    assert (worth[:, :193] < 2e-6).all() and (worth[:, 193:256] > 2e-6).any()


def test_teacher_leaves_the_model_as_it_was_when_it_fails(tiny):
    before = tiny.config._attn_implementation
    shape = LayerShape(0, "full", 4, 16, 16, 4, None, True)
    with pytest.raises(ValueError, match="layer 0 as a cache stores them"):
        list(lessons(tiny, [Passage(torch.zeros(1, 256, dtype=torch.long), (128,), (256,))], [shape], "mass"))
    assert tiny.config._attn_implementation == before


def test_passages():
    ids = torch.arange(2570)[None]
    passage = future_passage(ids)
    assert passage.ids.shape == (1, 2560)
    assert passage.cuts[0] == 512 and passage.cuts[-1] == 2048 and passage.ends[-1] == 2560
    assert future_passage(ids[:, :512]).cuts == (256,)
    again = replay_passage(ids, prefix=1)
    assert again.cuts == (1280,) and again.ends == (2559,)
    assert again.ids[0, 1280:].tolist() == list(range(1, 1280))


# -- the fit -------------------------------------------------------------------------------------------------------


def test_fit_learns_a_planted_signal_in_each_head():
    def lesson():
        keys, values = torch.randn(2, 2, 256, 16)
        worth = torch.stack([2 * keys[0, :, 3], 2 * values[1, :, 5]])[None]
        return Lesson(keys, values, (256,), worth, torch.rand(1, 2, 256))

    shape = LayerShape(0, "full", 2, 16, 16, 4, None, True)
    network, report = fit_layer(shape, [lesson() for _ in range(24)], hidden=16, epochs=30, seed=0)
    assert report.loss[1] < report.loss[0] / 4
    assert report.rank > 0.9 > 0.2 > report.h2o_rank
    assert report.h2o_share < report.share <= report.best_share
    assert network["hidden.weight"].shape == (2, feature_size(16, 16), 16)


def test_training_lowers_the_loss_and_is_repeatable(tiny, trained):
    assert [own.layer for own in trained.layers] == [0, 1]
    assert all(own.loss[1] < own.loss[0] for own in trained.layers)
    again = train_policy(tiny, byte_tokenizer(), [TEXT], **SMALL)
    device = torch.device("cpu")
    for layer in (0, 1):
        for part, tensor in trained.weights.network(layer, 2, device).items():
            assert torch.equal(tensor, again.weights.network(layer, 2, device)[part])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": "past"}, "teacher: expected 'future', 'replay' or 'both', got 'past'"),
        ({"target": "rank"}, "target: expected 'mass' or 'error', got 'rank'"),
        ({"tokens": 512}, "tokens: expected at least 4096"),
        ({"tokens": 65536}, "texts: expected 128 passages of 512 tokens"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
    ],
)
def test_training_refuses(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        train_policy(tiny, byte_tokenizer(), [TEXT], **{**SMALL, **changes})


# -- the file ------------------------------------------------------------------------------------------------------


def test_file_gives_the_same_scores(tmp_path):
    weights = random_weights()
    weights.save(tmp_path / "policy.safetensors")
    opened = LearnedWeights.open(tmp_path / "policy.safetensors")
    assert opened.config == weights.config
    assert LearnedWeights.open(str(tmp_path / "policy.safetensors")) is opened
    asked = candidates(layer=1)
    assert torch.equal(LearnedPolicy(weights).score(asked), LearnedPolicy(tmp_path / "policy.safetensors").score(asked))


def test_scores_are_each_head_s_own_and_only_ages_count():
    weights = random_weights()
    policy, asked = LearnedPolicy(weights), candidates()
    scores = policy.score(asked)
    assert scores.shape == (6, 20)
    network = weights.network(0, 2, torch.device("cpu"))
    for lane in range(6):
        x = features(asked.keys[lane], asked.values[lane], 23 - asked.positions[lane])
        own = {name: tensor[lane % 2] for name, tensor in network.items()}
        hidden = torch.nn.functional.silu(x @ own["hidden.weight"] + own["hidden.bias"])
        torch.testing.assert_close(scores[lane], hidden @ own["out.weight"] + own["out.bias"], rtol=1e-4, atol=1e-4)
    moved = Candidates(asked.positions + 7, 2, lambda: asked.keys, lambda: asked.values, lambda: (None, near + 7))
    near = asked.context[1]
    assert torch.equal(policy.score(moved), scores)


def header(**changes):
    return {**random_weights().config.to_metadata(), **changes}


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "format 'hf_kvcompress.learned'.*got None in other.safetensors"),
        (header(format="other"), "got 'other' in other.safetensors"),
        (header(version="9"), "expected format version 1, got 9"),
        (header(), "expected tensor layers.0.hidden.bias, got none"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, metadata, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        LearnedPolicy(tmp_path / "other.safetensors")


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="weights: expected a file that .* No such file"):
        kvc.LearnedCache(weights=tmp_path / "none.safetensors")
    (tmp_path / "text.txt").write_text("not tensors")
    with pytest.raises(ValueError, match="weights: expected a safetensors file"):
        LearnedPolicy(str(tmp_path / "text.txt"))
    with pytest.raises(ValueError, match="policy_options: missing 1 required positional argument: 'weights'"):
        kvc.CompressedCache(policy="learned", budget=64)


@pytest.mark.parametrize(
    "shape, message",
    [
        (dict(heads=4), "expected 2 key-value heads .* in layer 0, got 4 key-value heads"),
        (dict(key_dim=8), "keys of 16 and values of 16 in layer 0, got 2 key-value heads with keys of 8"),
        (dict(layers=(0,)), "expected a network for layer 1, got layers 0 in weights .for llama, 2 layers"),
        (dict(num_layers=5), "expected weights for a model of 2 layers, got weights .for llama, 5 layers"),
    ],
)
def test_weights_for_another_model_are_refused(tiny, shape, message):
    with pytest.raises(ValueError, match=message):
        kvc.LearnedCache(tiny.config, weights=random_weights(**shape))


def test_without_a_config_the_first_eviction_refuses(tiny):
    cache = kvc.LearnedCache(weights=random_weights(heads=4), budget=64, **PAGES)
    with pytest.raises(ValueError, match="expected 2 key-value heads"):
        tiny(torch.randint(0, 256, (1, 100)), past_key_values=cache)


# -- in a cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["identity", "eqrot4"])
@pytest.mark.parametrize("plain", [True, False])
def test_generate_holds_to_the_budget(tiny, trained, tmp_path, codec, plain):
    file = tmp_path / "policy.safetensors"
    trained.weights.save(file)
    cache = kvc.LearnedCache(tiny.config, weights=str(file), budget=64, codec=codec, **PAGES)
    other = kvc.KeyDiffCache(tiny.config, budget=64, codec=codec, **PAGES)
    ids = torch.randint(0, 256, (1, 150))
    if not plain:
        kvc.enable(tiny)
    try:
        for own in (cache, other):
            out = tiny.generate(ids, past_key_values=own, max_new_tokens=30, do_sample=False, eos_token_id=None)
            assert out.shape == (1, 180)
    finally:
        kvc.disable(tiny)
    assert max(max(layer.storage.tokens_stored()) for layer in cache.packed_layers()) <= 64
    assert cache.nbytes == other.nbytes, "weights are no part of the cache"
    assert json.loads(json.dumps(cache.settings.to_dict()))["policy_options"] == {"weights": str(file)}


@pytest.mark.parametrize("in_memory", [True, False])
def test_copied_and_saved_caches_go_on(tiny, tmp_path, in_memory):
    weights = random_weights()
    weights.save(tmp_path / "policy.safetensors")
    cache = kvc.LearnedCache(
        tiny.config, weights=weights if in_memory else tmp_path / "policy.safetensors", budget=64, **PAGES
    )
    ids = torch.randint(0, 256, (1, 150))
    with kvc.enable(tiny):
        tiny(ids[:, :100], past_key_values=cache)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        outputs = [tiny(ids[:, 100:], past_key_values=own).logits for own in (cache, *copies)]
        again = [tiny(ids[:, :9], past_key_values=own).logits for own in (cache, *copies)]
    for results in (outputs, again):
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_command_writes_a_file_that_a_cache_takes(tmp_path, tiny):
    folder, file, text = save_tiny(tmp_path / "model"), tmp_path / "policy.safetensors", tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["--model", folder, "--text", text, "--output", file, "--tokens", 4096, "--length", 512, "--epochs", 1]
    result = CliRunner().invoke(cli.build(), ["train-policy", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "rank, H2O" in result.output and "LearnedCache" in result.output
    kvc.LearnedCache(tiny.config, weights=file)
    bad = CliRunner().invoke(cli.build(), ["train-policy", *map(str, arguments), "--teacher", "past"])
    assert bad.exit_code == 2
    assert "kvcompress train-policy: teacher: expected 'future', 'replay' or 'both', got 'past'" in bad.output
