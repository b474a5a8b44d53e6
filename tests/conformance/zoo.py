"""Tiny random models, one for each kind of cache a transformers model can ask for.

Built from configs alone: float32, evaluation mode, seeded, 2-4 layers, heads in groups. Each `Entry` says as data which
ways of generating the model cannot do with an uncompressed `DynamicCache`, so no test has to find out by failing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from packaging.version import Version

VOCAB = 99
WINDOW = 24  # sliding window and attention chunk: shorter than the prompts, longer than what stays exact
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 90, 91, 92, 93
TEXT_TOKENS = (3, 90)  # ids that are neither special nor image tokens
TRANSFORMERS, NEWEST = Version(transformers.__version__), Version("5.23.0.dev0")


@dataclass(frozen=True)
class Entry:
    """One model of the zoo, and what transformers itself can do with it.

    Args:
        build: makes the config and the model class.
        attentions: plain attention implementations the model supports.
        kind: "text", "image" (the prompt holds an image) or "encoder_decoder".
        cannot: way of generating -> why `DynamicCache` cannot do it.
        needs_config: `DynamicCache()` without a config does not work for it: linear-attention layers must be known.
        gain: spread of the random weights; lower where the architecture itself amplifies rounding errors.
        query_norm: weight of the query norm, for models that do not divide scores by sqrt(head size).
        cross: what an encoder-decoder puts beside our cache for cross attention: "same" kind or a "dynamic" one.
    """

    name: str
    build: Callable[[], tuple[transformers.PreTrainedConfig, type]]
    attentions: tuple[str, ...] = ("sdpa", "eager")
    kind: str = "text"
    cannot: dict[str, str] = field(default_factory=dict)
    needs_config: bool = False
    gain: float = 1.2
    query_norm: float = 1.0
    cross: str = "same"

    def can(self, mode: str) -> bool:
        return mode not in self.cannot

    @functools.cached_property
    def model(self) -> transformers.PreTrainedModel:
        return make_model(self, seed=0)

    @functools.cached_property
    def assistant(self) -> transformers.PreTrainedModel:
        """The same model with noise on its weights: agrees often, not always, so drafts are kept and rolled back.

        Its windows do not slide: before transformers 5.23 an assistant's own sliding cache breaks after a few tokens.
        """
        model = make_model(self, seed=0, window=256)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.05 * parameter.std() * noise
        return model


def make_model(entry: Entry, seed: int, window: int = WINDOW) -> transformers.PreTrainedModel:
    """Build the model and give it weights that make attention matter: peaked, with biased keys, far from uniform."""
    config, model_class = entry.build()
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            setattr(config, name, window)
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=entry.attentions[0]).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # an embedding that is also the head must keep logits moderate; T5 divides them by itself
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False) and config.model_type != "t5"
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            # an expert tensor is [experts, in, out] or [experts, out, in]: the smaller side keeps activations bounded
            fan_in = parameter.shape[-1] if "experts" not in name else max(parameter.shape[-2:])
            is_table = "embed" in name or "shared.weight" in name
            scale = 1.0 if is_table and not tied else entry.gain / fan_in**0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith(("bias", "sinks")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif name.endswith("q_norm.weight"):
            parameter.mul_(entry.query_norm)
    model.generation_config.eos_token_id = None  # every row runs to the end
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    return model


_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_HYBRID = dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def _decoder(name: str, **overrides) -> Callable[[], tuple[transformers.PreTrainedConfig, type]]:
    """Builder for `<name>Config` and `<name>ForCausalLM` (the config may be called `<name>TextConfig`)."""

    def build():
        config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
        return config_class(**{**_SMALL, **overrides}), getattr(transformers, f"{name}ForCausalLM")

    return build


def _qwen2_5_vl():
    text = {**_SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=16,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return config, transformers.Qwen2_5_VLForConditionalGeneration


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=24,
        max_target_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return config, transformers.WhisperForConditionalGeneration


def _t5():
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,  # not the padding token
    )
    return config, transformers.T5ForConditionalGeneration


_MLA = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,  # kept as "keys", one head
    qk_rope_head_dim=8,  # kept as "values", one head
    qk_nope_head_dim=8,
    v_head_dim=12,
    q_lora_rank=16,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
)
_LINEAR = dict(
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
)
_MOE = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_CONV = dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
_STATE_SPACE = dict(  # every layer holds a recurrent state and keys and values
    head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8
)
_GPT_OSS = dict(
    head_dim=8,
    sliding_window=WINDOW,
    num_local_experts=4,
    num_experts_per_tok=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
_LLAMA4 = dict(
    num_hidden_layers=3,
    no_rope_layers=[1, 0, 1],  # chunked, full without RoPE, chunked
    attention_chunk_size=WINDOW,
    head_dim=8,
    num_local_experts=4,
    intermediate_size_mlp=48,
)
_SHARED = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    num_kv_shared_layers=2,
    head_dim=8,
    sliding_window=WINDOW,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
)

# What an uncompressed DynamicCache cannot do: way of generating -> reason. Modes are named in generation.py.
_STATEFUL = {
    "prompt_lookup": "generate refuses to roll back a model with a recurrent state",
    "assistant": "generate refuses to roll back a model with a recurrent state",
}
_NO_EMBEDS = {**_STATEFUL, "inputs_embeds": "generate: the model does not forward inputs_embeds"}
_PADDING_COUNTS = {"rows_alone": "the attention temperature of Llama 4 counts padding as tokens"}
_CHUNKS = ("prefill_chunks", "prefill_chunks_left_padded")
_NO_CHUNKS = dict.fromkeys(_CHUNKS, "generate passes input_ids to Whisper's decoder twice")
_OLD_IMAGE_CHUNKS = (
    dict.fromkeys(_CHUNKS, "generate cannot split a prompt with an image before 5.23") if TRANSFORMERS < NEWEST else {}
)

_OLD_RESET = (
    {"reset": "before 5.23 DynamicCache.reset zeroes its states and keeps their length"}
    if TRANSFORMERS < NEWEST
    else {}
)

ENTRIES = [
    Entry("llama", _decoder("Llama", num_hidden_layers=3)),
    Entry("mistral", _decoder("Mistral", sliding_window=WINDOW)),
    Entry("gemma3", _decoder("Gemma3", head_dim=16, sliding_window=WINDOW, **_HYBRID)),
    Entry("qwen3", _decoder("Qwen3", head_dim=12)),
    Entry("phi3", _decoder("Phi3")),
    Entry("gpt_neox", _decoder("GPTNeoX", num_key_value_heads=None)),
    Entry("mixtral", _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2)),
    Entry("qwen3_moe", _decoder("Qwen3Moe", **_MOE)),
    Entry("deepseek_v3", _decoder("DeepseekV3", **_MLA)),
    Entry("gemma2", _decoder("Gemma2", head_dim=8, sliding_window=WINDOW), attentions=("eager",)),
    Entry("gpt_oss", _decoder("GptOss", **_GPT_OSS), attentions=("eager",)),
    Entry("llama4", _decoder("Llama4", **_LLAMA4)),
    Entry("llama4_temperature", _decoder("Llama4", **_LLAMA4, floor_scale=8), cannot=_PADDING_COUNTS),
    Entry("cohere2", _decoder("Cohere2", sliding_window=WINDOW, logit_scale=1.0, **_HYBRID)),
    Entry("qwen3_next", _decoder("Qwen3Next", **_LINEAR), cannot=_STATEFUL, needs_config=True, gain=0.8),
    Entry("lfm2", _decoder("Lfm2", **_CONV), needs_config=True),
    Entry("falcon_h1", _decoder("FalconH1", **_STATE_SPACE), cannot=_NO_EMBEDS, needs_config=True),
    Entry("gemma3n", _decoder("Gemma3n", **_SHARED)),
    Entry("gemma4", _decoder("Gemma4", global_head_dim=16, **_SHARED), query_norm=0.25, gain=0.8),
    Entry("qwen2_5_vl", _qwen2_5_vl, kind="image", cannot=_OLD_IMAGE_CHUNKS),
    Entry("whisper", _whisper, kind="encoder_decoder", cannot=_NO_CHUNKS),
    Entry("t5", _t5, kind="encoder_decoder", cannot=_OLD_RESET, cross="dynamic"),
]
