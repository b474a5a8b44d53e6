"""A codec that stores keys without their rotation sees the same positions when it packs and when it reads."""

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.codecs import registry
from hf_kvcompress.codecs.identity import IdentityCodec

from .conformance.factories import SMALL, TIGHT
from .conformance.generation import MODES
from .conformance.helpers import BY_NAME, assert_same


class UnrotatedCodec(IdentityCodec):
    """Keys as they are, but for their rotation; a rotation at a wrong position would show."""

    family = "unrotated"
    wants_context = wants_positions = True

    def __init__(self, nbits, role, *lengths):
        super().__init__(nbits, role, *lengths)
        self.wants_positions = role == "key"
        self.seen = []

    def bind(self, context):
        if context.rotary is None:
            raise ValueError(f"codec: expected {context.why_not}")
        self.rotary = context.rotary

    def begin_segment(self, x, query_ms=None, history=None):
        self._note(x, history)
        return {}

    def learn(self, history, x):
        self._note(x, history)
        return {}

    def encode(self, x, segment, queries=None):
        if self.role == "key":
            self._note(x, segment)
            x = self.rotary.undo(x.float(), segment["at"])
        return super().encode(x, {}, queries)

    def decode(self, packed):
        x = super().decode(packed)
        return self.rotary.apply(x, packed["at"]) if self.role == "key" else x

    def scores(self, q, packed):
        return q @ self.decode(packed).flatten(2, 3).mT

    def _note(self, x, beside):
        if self.role == "key":
            torch.broadcast_shapes(beside["at"].shape, x.shape[:-1])
            assert not beside["at"].is_floating_point() and beside["at"].min() >= 0


@pytest.fixture(autouse=True)
def unrotated(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, "unrotated", (UnrotatedCodec, UnrotatedCodec))


MODE_NAMES = [name for name in MODES if "embeds" not in name]
POLICIES = {
    "none": {},
    "random": {"policy": "random", "budget": TIGHT},
    "h2o": {"policy": "h2o", "budget": TIGHT},
    "demoting": {"policy": "h2o", "budget": TIGHT, "demote_to": "unrotated", "demote_budget": 24},
    "to-host": {"policy": "snapkv", "budget": TIGHT, "demote_to": "cpu"},
    "adaptive": {"policy": "snapkv", "budget": TIGHT, "head_budget": "adaptive"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_name", ["llama", "gemma3", "cohere2"])
def test_reads_what_identity_reads(model_name, policy):
    entry = BY_NAME[model_name]
    modes = [m for m in MODE_NAMES if entry.can(m)] if policy in ("none", "h2o") else ["greedy", "left_padded", "beams"]
    settings, config = POLICIES[policy], entry.model.config
    plain = {**settings, **({"demote_to": "identity"} if policy == "demoting" else {})}
    with kvc.enable(entry.model):
        for mode in modes:
            run = MODES[mode]
            ours = run(entry, entry.model, lambda: kvc.CompressedCache(config, codec="unrotated", **SMALL, **settings))
            same = run(entry, entry.model, lambda: kvc.CompressedCache(config, codec="identity", **SMALL, **plain))
            assert_same(ours, same, 1e-4)


def test_a_plain_attention_reads_them_too():
    entry = BY_NAME["llama"]
    config = entry.model.config
    for mode in ("greedy", "beams"):
        ours = MODES[mode](entry, entry.model, lambda: kvc.CompressedCache(config, codec="unrotated", **SMALL))
        same = MODES[mode](entry, entry.model, lambda: kvc.CompressedCache(config, codec="identity", **SMALL))
        assert_same(ours, same, 1e-4)


def test_refused_without_a_config_or_a_known_rotation():
    with pytest.raises(ValueError, match="config: expected the model's config, which codec 'unrotated' needs"):
        kvc.CompressedCache(codec="unrotated")
    with pytest.raises(ValueError, match="latent attention"):
        kvc.CompressedCache(BY_NAME["deepseek_v3"].model.config, keys="unrotated")
