"""Keys without their rotation are what the model had before it rotated them, on every model of the zoo."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from hf_kvcompress.rotary import Rotary, rotary_of
from hf_kvcompress.shapes import layer_shapes

from .conformance.helpers import BY_NAME
from .conformance.zoo import _MOE, _SMALL, Entry, _decoder, make_model

REFUSED = {
    "deepseek_v3": "latent attention",
    "qwen2_5_vl": "M-RoPE",
    "whisper": "rope_parameters",
    "t5": "rope_parameters",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [2.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 64,
}
#: kinds of models and rotations that the zoo does not have
MORE = [
    Entry("llama-yarn", _decoder("Llama", rope_parameters=YARN)),
    Entry("llama-llama3", _decoder("Llama", rope_parameters=LLAMA3)),
    Entry("llama-linear", _decoder("Llama", rope_parameters=LINEAR)),
    Entry("gpt_neox-linear", _decoder("GPTNeoX", num_key_value_heads=None, rope_parameters=LINEAR)),
    *(
        Entry(name.lower(), _decoder(name))
        for name in ("Qwen2", "Gemma", "Olmo2", "Glm", "Glm4", "Cohere", "Phi", "StableLm", "SmolLM3", "Granite")
    ),
    *(
        Entry(name.lower(), _decoder(name, head_dim=8))
        for name in ("Starcoder2", "Ernie4_5", "Olmo", "Arcee", "SeedOss", "Helium", "Ministral", "Olmo3")
    ),
    Entry("qwen2_moe", _decoder("Qwen2Moe", **{**_MOE, "shared_expert_intermediate_size": 16})),
    Entry("exaone4", _decoder("Exaone4", sliding_window=24, layer_types=["sliding_attention", "full_attention"])),
]


def unrotated_keys(model, inputs):
    """Every layer's keys `[B, H, T, D]` as its projection, or the norm behind it, gave them; and the cache."""
    found, handles = {}, []
    shapes = layer_shapes(model.config)

    def note(layer, fused, module, args, out):
        heads, dim = shapes[layer].heads, shapes[layer].key_dim
        if fused == "query_key_value":
            out = out.unflatten(-1, (heads, 3 * dim))[..., dim : 2 * dim]
        elif fused == "qkv_proj":
            out = out[..., shapes[layer].query_heads * dim :][..., : heads * dim].unflatten(-1, (heads, dim))
        elif out.shape[-1] != dim or out.dim() == 3:
            out = out.unflatten(-1, (heads, dim))
        found[layer] = out if out.shape[1] == heads and out.shape[2] != heads else out.transpose(1, 2)

    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        for name in ("k_norm", "k_layernorm", "k_proj", "qkv_proj", "query_key_value"):
            child = getattr(module, name, None)
            if layer is not None and child is not None:
                handles.append(child.register_forward_hook(partial(note, layer, name)))
                break
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    return found, cache


def assert_undone(model, inputs, at):
    keys, cache = unrotated_keys(model, inputs)
    own = [shape.layer for shape in layer_shapes(model.config) if shape.heads]
    assert own
    for layer in own:
        expected, rotary = keys[layer], rotary_of(model.config, layer)
        stored = cache.layers[layer].keys
        if model.config.model_type.startswith("llama4") and rotary.frequencies is not None:
            expected = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + 1e-5)  # normed behind the turn
        expected, own_at = expected[:, :, -stored.shape[2] :], at[:, -stored.shape[2] :]
        real = own_at >= 0
        undone = rotary.undo(stored, own_at[:, None])
        error = (undone - expected).abs().amax((1, 3))[real].max() / expected.abs().max()
        assert error <= 1e-5, f"layer {layer}: {error:.1e}"
        torch.testing.assert_close(rotary.apply(undone, own_at[:, None]), stored, rtol=1e-5, atol=1e-5)
        if rotary.frequencies is not None:
            assert (stored - expected).abs().max() > 0.1  # the layer does rotate


@pytest.mark.parametrize("name", BY_NAME)
def test_every_model_is_exact_or_refused(name):
    model = BY_NAME[name].model
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            rotary_of(model.config, 0)
        return
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    assert_undone(model, {"input_ids": ids}, torch.arange(40)[None])


@pytest.mark.parametrize("entry", MORE, ids=lambda e: e.name)
def test_other_models_and_rotations(entry):
    ids = torch.randint(3, 90, (1, 100), generator=torch.Generator().manual_seed(1))
    assert_undone(make_model(entry, seed=0), {"input_ids": ids}, torch.arange(100)[None])


def test_positions_count_from_the_first_real_token():
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    at = mask.cumsum(1) - 1
    at_or_none = at.masked_fill(mask == 0, -1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": at.clamp(min=0)}
    assert_undone(BY_NAME["llama"].model, inputs, at_or_none)


def test_positions_broadcast():
    rotary = Rotary(torch.tensor([1.0, 0.1]))
    x = torch.randn(2, 3, 1, 8, 6)
    at = torch.arange(5, 13, dtype=torch.int32)
    whole = rotary.apply(x, at)
    torch.testing.assert_close(whole, rotary.apply(x, at.expand(2, 3, 1, 8)), rtol=0, atol=0)
    torch.testing.assert_close(whole[..., 4:], x[..., 4:], rtol=0, atol=0)
    torch.testing.assert_close(rotary.undo(whole, at), x)


def test_rotations_that_change_with_the_text_are_refused():
    entry = Entry("phi3-long", _decoder("Phi3", rope_parameters=LONG))
    with pytest.raises(ValueError, match="longrope"):
        rotary_of(entry.build()[0], 0)


def test_unknown_pairing_and_layers_are_named():
    config = BY_NAME["llama"].model.config
    with pytest.raises(ValueError, match=r"layer_index: .*\[0, 1, 2\].* got 3"):
        rotary_of(config, 3)
    stranger = type(config)(**_SMALL)
    stranger.model_type = "stranger"
    with pytest.raises(ValueError, match="pairing is known, got 'stranger'"):
        rotary_of(stranger, 0)
