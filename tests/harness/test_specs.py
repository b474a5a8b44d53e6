"""Caches by text: what each name makes, what is written back, and what is said about mistakes."""

import json
from types import SimpleNamespace

import pytest
from transformers import DynamicCache

from hf_kvcompress import CompressedCache, KIVICache, SnapKVCache
from hf_kvcompress.harness import specs
from hf_kvcompress.harness.specs import BASELINE, CacheSpec, known

from ..tiny_model import tiny_llama

CONFIG = tiny_llama().config


@pytest.mark.parametrize(
    "text, head, settings",
    [
        ("balanced", "balanced", {}),
        ("int8/int4", "int8/int4", {}),
        ("none", "none", {}),
        ("uncompressed", "none", {}),
        ("quanto4", "transformers:quanto4", {}),
        ("transformers:quanto4-full", "transformers:quanto4-full", {}),
        ("h2o:budget=0.25,codec=kivi4", "h2o", {"budget": 0.25, "codec": "kivi4"}),
        (" h2o : budget = .25 ".replace(" : ", ":"), "h2o", {"budget": 0.25}),
        ("snapkv:budget=64MB,policy_options.window_size=8", "snapkv",
         {"budget": "64MB", "policy_options": {"window_size": 8}}),
        ("KIVICache:nbits=4", "KIVICache", {"nbits": 4}),
        ("balanced:layers.1.codec=int8,layers.0.keys=int4", "balanced",
         {"layers": {"1": {"codec": "int8"}, "0": {"keys": "int4"}}}),
        ("h2o:budget=0.5,demote_to=[int4,eqrot2],pin=[[0,2]],merge=False", "h2o",
         {"budget": 0.5, "demote_to": ["int4", "eqrot2"], "pin": [[0, 2]], "merge": False}),
        ('LearnedCache:weights="a,b=c.json"', "LearnedCache", {"weights": "a,b=c.json"}),
        ("h2o:budget=none", "h2o", {"budget": None}),
        ('KIVICache:page_size="8"', "KIVICache", {"page_size": "8"}),
    ],
)  # fmt: skip
def test_a_text_is_read_and_written_back(text, head, settings):
    spec = CacheSpec.parse(text)
    assert (spec.head, dict(spec.settings)) == (head, settings)
    assert CacheSpec.parse(str(spec)) == spec
    assert CacheSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


#: they need a file that a command of this package writes
FILES = [name for name in known() if name.startswith("pca") or name in ("learned", "LearnedCache", "TransformCache")]


@pytest.mark.parametrize("name", FILES)
def test_a_cache_that_needs_a_file_says_so(name):
    with pytest.raises(ValueError, match=f"cache '{name}.*(calibration|weights)"):
        CacheSpec.parse(name).entrant(CONFIG)


@pytest.mark.parametrize("name", [name for name in known() if name not in (*FILES, *specs.PEERS)])
def test_every_known_name_makes_a_cache(name):
    needs = {"video": "policy_options.tokens_per_frame=8,", "VideoCache": "tokens_per_frame=8,"}
    text = f"{name}:{needs[name]}budget=0.5" if name in needs else name
    entrant = CacheSpec.parse(text).entrant(CONFIG)
    assert entrant.name == (BASELINE if name == "none" else str(CacheSpec.parse(text)))
    assert isinstance(entrant.make(), DynamicCache if name == "none" else CompressedCache)
    assert entrant.make() is not entrant.make()


def test_settings_reach_the_cache():
    cache = CacheSpec.parse("h2o:budget=0.25,codec=kivi4").entrant(CONFIG).make()
    own = cache.settings.default
    assert (own.keys, own.values, own.eviction.policy, own.eviction.budget) == ("kivi4", "kivi4", "h2o", 0.25)
    assert isinstance(CacheSpec.parse("KIVICache:nbits=4").entrant(CONFIG).make(), KIVICache)
    snap = CacheSpec.parse("SnapKVCache:window_size=16").entrant(CONFIG).make()
    assert isinstance(snap, SnapKVCache) and snap.settings.default.eviction.policy_options["window_size"] == 16


@pytest.mark.parametrize(
    "text, message",
    [
        ("balancd", "got 'balancd'; did you mean 'balanced'"),
        ("h2p:budget=0.5", "got 'h2p'; did you mean 'h2o'"),
        ("int8/int5", "got 'int5'; did you mean"),
        ("int8/int8/int8", "expected one codec, or KEYS/VALUES"),
        ("transformers:quanto5", "got 'transformers:quanto5'; did you mean 'transformers:quanto"),
        ("h2o:budget", "expected name=value after the colon, got 'budget'"),
        ("h2o:", "expected name=value after the colon, got ''"),
        ("h2o:budget=", "expected name=value after the colon, got 'budget='"),
        ("h2o:budget=0.5,budget=0.25", "expected 'budget' once"),
        ("h2o:pin=[[0,2]", "expected every bracket and quote to be closed"),
        ("none:budget=0.5", "cache 'none': expected no settings, got budget"),
        ("h2o:policy_options=1,policy_options.a=2", "expected 'policy_options' to be given once"),
        ("no.such.module", "expected a class or function that can be imported"),
        ("json.JSONDecodeErrors", "expected a class or function that can be imported"),
        ("os.sep", "expected a class or function, got str"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(ValueError, match="cache.*") as raised:
        CacheSpec.parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("h2o:bugdet=0.5", "cache 'h2o:bugdet=0.5': argument: expected one of .* did you mean 'budget'"),
        ("h2o:budget=1.5", "cache 'h2o:budget=1.5': budget: expected .* got 1.5"),
        ("balanced:layers.7.codec=int8", "layers: expected layer numbers from 0 to 1, got 7"),
        ("KIVICache:nbits=5", "cache 'KIVICache:nbits=5': codec: expected"),
        ("LearnedCache", "cache 'LearnedCache': .*weights"),
    ],
)
def test_a_wrong_setting_is_named_with_its_cache(text, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec.parse(text).entrant(CONFIG)


def test_a_function_of_yours_by_its_path():
    entrant = CacheSpec.parse("transformers.DynamicCache").entrant(None)
    assert type(entrant.make()) is DynamicCache
    assert entrant.around(SimpleNamespace()) is not None  # the model's own attention: nothing is enabled
