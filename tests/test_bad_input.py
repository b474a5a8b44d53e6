"""Bad input gets an error that names the argument, what was expected and what came, before anything is stored."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig

import hf_kvcompress as kvc

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None
)


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"codec": "eqrot5"}, ["codec", "4 or 3 or 2 bits", "eqrot5"]),
        ({"codec": "eqrt4"}, ["codec", "eqrot4", "eqrt4"]),
        ({"keys": "int5"}, ["keys", "8 or 4 or 3 or 2 bits", "int5"]),
        ({"values": 4}, ["values", "a name", "4"]),
        ({"preset": "blanced"}, ["preset", "did you mean 'balanced'", "blanced"]),
        ({"page_size": 48}, ["page_size", "8, 16, 32, 64, 128", "48"]),
        ({"page_size": 0}, ["page_size"]),
        ({"codec": "kivi4", "page_size": 64, "group_size": 48}, ["group_size", "divisor of page_size 64", "48"]),
        ({"codec": "kivi4", "group_size": 1000}, ["group_size", "1000"]),
        ({"residual_length": 0}, ["residual_length", "at least 1", "0"]),
        ({"residual_length": -5}, ["residual_length", "-5"]),
        ({"sink_length": -1}, ["sink_length", "at least 0", "-1"]),
        ({"sink_length": 2.5}, ["sink_length", "2.5"]),
        ({"sliding": "drop"}, ["sliding", "compress, exact", "drop"]),
        ({"layers": {7: {"codec": "int8"}}}, ["layers", "0 to 1", "7"]),
        ({"layers": {"one": {"codec": "int8"}}}, ["layers", "one"]),
        ({"layers": {0: "int8"}}, ["layers[0]", "mapping", "int8"]),
        ({"layers": {0: {"codec": "int9"}}}, ["codec", "int9"]),
        ({"layers": {0: {"bits": 4}}}, ["layers[0]", "bits"]),
        ({"residual_lenght": 3}, ["residual_length", "residual_lenght"]),
    ],
    ids=str,
)
def test_settings(settings, names):
    with pytest.raises(ValueError) as error:
        kvc.CompressedCache(CONFIG, **settings)
    for name in names:
        assert name in str(error.value)


def test_environment(monkeypatch):
    monkeypatch.setenv("HF_KVCOMPRESS_PRESET", "tinny")
    with pytest.raises(ValueError, match="HF_KVCOMPRESS_PRESET.*tiny.*tinny"):
        kvc.CompressedCache()
    monkeypatch.setenv("HF_KVCOMPRESS_PRESET", "tiny")
    monkeypatch.setenv("HF_KVCOMPRESS_PAGE_SIZE", "many")
    with pytest.raises(ValueError, match="page_size: expected one of 8, 16, 32, 64, 128, got 'many'"):
        kvc.CompressedCache()
    monkeypatch.setenv("HF_KVCOMPRESS_PAGE_SIZE", "64")
    settings = kvc.CompressedCache().settings.default
    assert (settings.values, settings.page_size) == ("eqrot2", 64)
    assert kvc.CompressedCache(codec="int8").settings.default.values == "int8", "an argument wins over the environment"


def test_a_config_that_is_none():
    with pytest.raises(ValueError, match="config: expected a transformers PreTrainedConfig.*dict"):
        kvc.CompressedCache({"hidden_size": 3})


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="config: expected a model with attention layers, got 'mamba'"):
        kvc.CompressedCache(MambaConfig(num_hidden_layers=2))


def test_a_batch_size_that_changes_is_refused_before_anything_is_stored():
    cache = kvc.CompressedCache(CONFIG)
    keys = torch.randn(2, 2, 5, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match=r"key_states: expected batch size 2.*layer 0, got 3"):
        cache.update(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 16), 0)
    assert cache.get_seq_length() == 5


def test_a_cache_implementation_beside_it_is_refused():
    model = LlamaForCausalLM(CONFIG).eval()
    for implementation in ("static", "quantized"):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(
                torch.tensor([[1, 2, 3]]),
                past_key_values=kvc.CompressedCache(CONFIG),
                cache_implementation=implementation,
                max_new_tokens=2,
            )


def test_enable_wants_a_model():
    with pytest.raises(ValueError, match="model: expected a transformers PreTrainedModel, got Linear"):
        kvc.enable(torch.nn.Linear(2, 2))


def test_crop_with_a_positive_length():
    cache = kvc.CompressedCache(CONFIG)
    cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or a negative number of tokens, got 3"):
        cache.crop(3)


def test_reconstruction_error_without_a_monitor():
    with pytest.raises(ValueError, match="reconstruction_error: expected a cache made with monitor=True"):
        _ = kvc.CompressedCache(CONFIG).reconstruction_error
