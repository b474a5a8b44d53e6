"""`enable(model)` changes nothing for other caches, is undone exactly, and importing the package touches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import hf_kvcompress as kvc

from .factories import EXACT, LOSSY
from .generation import MODES, Outcome, generate
from .helpers import BY_NAME, TOLERANCE, assert_same, dynamic_cache, maker
from .prompts import ids_of, prompt, text_ids
from .zoo import ENTRIES, Entry

SEVERAL = ("llama", "mistral", "gemma3", "qwen2_5_vl", "whisper", "deepseek_v3", "gemma4", "t5", "gpt_oss")
OTHER_MODES = ("greedy", "beams", "left_padded", "chunk_loop", "prefill_chunks", "assistant", "second_turn")


def entries(*names: str) -> Any:
    return pytest.mark.parametrize("entry", [BY_NAME[name] for name in names], ids=names)


def both(entry: Entry, run: Any) -> tuple[Outcome, Outcome]:
    """What `run()` gives under the model's own attention and under ours."""
    plain = run()
    with kvc.enable(entry.model):
        return plain, run()


# -- other caches ------------------------------------------------------------------------------------------------------


@entries(*[entry.name for entry in ENTRIES])
@pytest.mark.parametrize("lengths", [(37,), (23, 37, 30)], ids=["one_row", "left_padded"])
def test_no_cache_gives_what_the_plain_attention_gives(entry: Entry, lengths: tuple[int, ...]) -> None:
    inputs = prompt(entry, lengths)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))

    def run() -> Outcome:
        logits = entry.model(**inputs, use_cache=False).logits
        return Outcome(ids_of(entry, inputs), logits[mask == 1])

    plain, ours = both(entry, run)
    assert_same(ours, plain)


@entries(*SEVERAL)
@pytest.mark.parametrize("mode", OTHER_MODES)
def test_dynamic_cache_gives_what_the_plain_attention_gives(entry: Entry, mode: str) -> None:
    if entry.can(mode):
        plain, ours = both(entry, lambda: MODES[mode](entry, entry.model, lambda: dynamic_cache(entry)))
        assert_same(ours, plain)


@entries("llama", "mistral", "gemma3", "qwen2_5_vl", "deepseek_v3", "gpt_oss", "whisper")
@pytest.mark.parametrize("lengths", [(37,), (23, 37, 30)], ids=["one_row", "left_padded"])
def test_static_cache_gives_what_the_plain_attention_gives(entry: Entry, lengths: tuple[int, ...]) -> None:
    model = entry.model

    def static() -> Any:
        if entry.kind == "encoder_decoder":
            encoded = model.config.max_source_positions
            return EncoderDecoderCache(StaticCache(model.config, 64), StaticCache(model.config, encoded))
        return StaticCache(model.config, max_cache_len=64)

    plain, ours = both(entry, lambda: generate(entry, model, prompt(entry, lengths), static(), disable_compile=True))
    assert_same(ours, plain)


@entries("llama", "gemma3", "whisper")
def test_an_enabled_assistant_drafts_as_before(entry: Entry) -> None:
    """Our attention on both models, our cache on the main one, transformers' own cache in the assistant."""
    if entry.can("assistant"):
        make = maker(entry, EXACT[0])
        expected = MODES["assistant"](entry, entry.model, make)
        with kvc.enable(entry.model), kvc.enable(entry.assistant):
            assert_same(MODES["assistant"](entry, entry.model, make), expected)


@entries("llama", "gemma3")
def test_caches_of_all_kinds_take_turns_on_an_enabled_model(entry: Entry) -> None:
    """A forward with one cache leaves nothing behind that the next forward with another cache could see."""
    model = entry.model
    text = text_ids(1, 48, seed=9)
    expected = [model(text[:, :end]).logits[:, -1] for end in (20, 29, 30, 48)]
    caches = [EXACT[0](model.config), LOSSY[0](model.config), DynamicCache(config=model.config), EXACT[0](None)]
    caches.append(StaticCache(model.config, max_cache_len=48))
    with kvc.enable(model):
        for (start, end), logits in zip(((0, 20), (20, 29), (29, 30), (30, 48)), expected, strict=True):
            for index, cache in enumerate(caches):
                out = model(text[:, start:end], past_key_values=cache).logits[:, -1]
                error = (out - logits).abs().max().item()
                lossy = index == 1 and end > 20  # its first pass is exact, too
                assert error <= (1.0 if lossy else TOLERANCE), f"cache {index}, tokens {start} to {end}"
            error = (model(text[:, :end], use_cache=False).logits[:, -1] - logits).abs().max().item()
            assert error <= TOLERANCE


# -- undone exactly ----------------------------------------------------------------------------------------------------


def implementations(model: Any) -> dict[str, Any]:
    """The attention implementation of every config of a model, by the path that leads to it."""
    found: dict[str, Any] = {}

    def visit(path: str, config: Any) -> None:
        found[path] = config._attn_implementation
        for name in getattr(config, "sub_configs", {}):
            if getattr(config, name, None) is not None:
                visit(f"{path}.{name}", getattr(config, name))

    for name, module in model.named_modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            visit(name, module.config)
    return found


@entries(*[entry.name for entry in ENTRIES])
def test_disable_restores_what_was_there(entry: Entry) -> None:
    before = implementations(entry.model)
    kvc.enable(entry.model)
    during = set(implementations(entry.model).values())
    kvc.disable(entry.model)
    after = implementations(entry.model)
    assert "kvcompress" in during
    assert after == before


@entries("llama", "qwen2_5_vl", "whisper", "t5")
def test_disable_restores_eager(entry: Entry) -> None:
    model = entry.model
    model.set_attn_implementation("eager")
    try:
        before = implementations(model)
        with kvc.enable(model):
            during = implementations(model)
        after = implementations(model)
        assert during != before
        assert after == before
    finally:
        model.set_attn_implementation(entry.attentions[0])


def test_disable_restores_parts_that_differ() -> None:
    """A vision tower on eager beside a text model on sdpa stays so."""
    model = BY_NAME["qwen2_5_vl"].model
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    try:
        before = implementations(model)
        assert {"sdpa", "eager"} <= set(before.values())
        with kvc.enable(model):
            pass
        assert implementations(model) == before
    finally:
        model.set_attn_implementation("sdpa")


def test_context_manager_restores_after_an_error() -> None:
    model = BY_NAME["llama"].model
    before = implementations(model)
    with pytest.raises(KeyError), kvc.enable(model):
        raise KeyError
    assert implementations(model) == before


def test_nested_enable_is_undone_level_by_level() -> None:
    model = BY_NAME["llama"].model
    before = implementations(model)
    with kvc.enable(model):
        with kvc.enable(model):
            assert set(implementations(model).values()) == {"kvcompress"}
        assert set(implementations(model).values()) == {"kvcompress"}, "still enabled"
    assert implementations(model) == before


def test_disable_of_a_model_that_is_not_enabled_does_nothing() -> None:
    model = BY_NAME["llama"].model
    before = implementations(model)
    kvc.disable(model)
    assert implementations(model) == before


def test_enable_returns_the_model_from_with() -> None:
    model = BY_NAME["llama"].model
    with kvc.enable(model) as same:
        assert same is model


def test_enable_names_the_argument_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="model.*PreTrainedModel.*Linear"):
        kvc.enable(torch.nn.Linear(2, 2))


@entries("llama", "qwen2_5_vl", "whisper")
def test_a_model_keeps_no_hooks_and_no_attributes(entry: Entry) -> None:
    """All state is on the cache: a run leaves the model's modules as they were."""
    model = entry.model
    MODES["greedy"](
        entry, model, lambda: dynamic_cache(entry)
    )  # what a model keeps by itself (M-RoPE offsets) is there
    before = footprint(model)
    with kvc.enable(model):
        MODES["greedy"](entry, model, maker(entry, LOSSY[0]))
    MODES["greedy"](entry, model, maker(entry, LOSSY[0]))
    assert footprint(model) == before


def footprint(model: Any) -> dict[str, tuple[list[str], int, str]]:
    """Attribute names, number of hooks and forward function of every module."""
    return {
        name: (
            sorted(vars(module)),
            sum(len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")),
            module.forward.__qualname__,
        )
        for name, module in model.named_modules()
    }


# -- import ------------------------------------------------------------------------------------------------------------

SURVEY = """
import json, sys
import torch, transformers
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, GenerationMixin
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.masking_utils import AttentionMaskInterface

def survey():
    functions = lambda mapping: {str(k): id(v) for k, v in mapping.items()}
    return {
        "attention": functions(modeling_utils.ALL_ATTENTION_FUNCTIONS),
        "mask": functions(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS),
        "cache": functions(vars(cache_utils)),
        "masking": functions(vars(masking_utils)),
        "modeling": functions(vars(modeling_utils)),
        "model": functions(vars(PreTrainedModel)),
        "generation": functions(vars(GenerationMixin)),
        "layers": functions(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
        "dynamic": functions(vars(DynamicCache)),
        "module": functions(vars(torch.nn.Module)),
        "functional": functions(vars(torch.nn.functional)),
        "tensor": functions(vars(torch.Tensor)),
        "hooks": [len(v) for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global_") and "hooks" in k
                  and hasattr(v, "__len__")],
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "seed": torch.initial_seed(),
        "state": torch.get_rng_state().sum().item(),
    }

from transformers.models.llama import modeling_llama  # loaded lazily: before the survey, not in it
import transformers.integrations.sdpa_attention
before = survey()
import hf_kvcompress
print(json.dumps({"before": before, "after": survey(), "loaded": sorted(sys.modules)}))
"""


def test_import_registers_two_names_and_changes_nothing_else() -> None:
    run = subprocess.run([sys.executable, "-c", SURVEY], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    before, after = found["before"], found["after"]
    assert set(after["attention"]) - set(before["attention"]) == {"kvcompress"}
    assert set(after["mask"]) - set(before["mask"]) == {"kvcompress"}
    del after["attention"]["kvcompress"], after["mask"]["kvcompress"]
    assert after == before
    optional = {"cupy", "datasets", "evaluate", "lm_eval", "gguf", "matplotlib", "IPython"}
    assert not optional & set(found["loaded"]), "extras are imported where they are used"
