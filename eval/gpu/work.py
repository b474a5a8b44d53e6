"""Copy bandwidth, launch overhead, packing and unpacking, and whole models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.ops import kernels

from .attention import DRY, make_cache
from .timing import Bench, device_ms, step_ms


def copy_bandwidth(bench: Bench) -> float:
    """GB/s of a copy much larger than the cache, bytes read plus bytes written."""
    size = 1 << 16 if bench.dry else 1 << 32
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms, _ = device_ms(bench, [lambda: target.copy_(source)], seconds=0.0 if bench.dry else 0.5)
    return 2 * size / ms / 1e6


def launch_us(bench: Bench) -> float:
    """Host microseconds of one launch through `kernels.load(...)(...)`."""
    x = torch.zeros(4, 32, dtype=torch.int32, device=bench.device)
    kernel = kernels.load("probes.cu", "probe_lop3")
    return step_ms(bench, lambda: kernel(1, 32, [x[0], x[1], x[2], x]), 20 if bench.dry else 2000)[1] * 1e3


def packing(bench: Bench) -> Iterator[dict[str, Any]]:
    """Milliseconds of packing and unpacking 1,000 tokens of a layer (8 heads, keys and values), and of a page."""
    heads, dim, page = (1, 64, 32) if bench.dry else (8, 128, 32)
    for name in ("int4",) if bench.dry else ("eqrot4", "eqrot3", "int8", "int4", "int2", "turbo4", "channel4", "fp8"):
        for tokens in (page,) if bench.dry else (16384, 512, page):
            sets = []
            for role in ("key", "value"):
                codec = make_codec(name, role, dim, page_size=page, group_size=page)
                x = torch.randn(
                    heads, tokens, dim, device=bench.device, dtype=torch.float32 if bench.dry else torch.bfloat16
                )
                segment = codec.begin_segment(x)
                sets.append((codec, x, segment, codec.encode(x, segment)))
            encode = [
                lambda codec=codec, x=x, segment=segment: codec.encode(x, segment) for codec, x, segment, _ in sets
            ]
            decode = [
                lambda codec=codec, packed={**packed, **segment}: codec.decode(packed)
                for codec, _, segment, packed in sets
            ]
            row: dict[str, Any] = {"codec": name, "tokens": tokens}
            for what, runs in (("pack", encode), ("unpack", decode)):
                ms, how = device_ms(bench, runs, seconds=0.0 if bench.dry else 0.1)
                row |= {f"{what}_ms": 2 * ms, f"{what}_ms_per_1000": 2 * ms / tokens * 1000, "timed_by": how}
            yield row
            if bench.seconds_left < 0:
                return


SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128),
    "tiny": dict(hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=64),
}


def model_of(bench: Bench, shape: str) -> LlamaForCausalLM:
    """Random weights of a Llama shape."""
    heads, words = (1, 64) if bench.dry else (8, 128256)
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=heads, vocab_size=words, max_position_embeddings=1 << 18)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if bench.dry else torch.bfloat16)
    try:
        with bench.device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def generate(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens a second of `generate` after a prompt, with DynamicCache and with presets."""
    cases = [("1B", 1, 8192), ("8B", 1, 32768), ("8B", 8, 32768), ("1B", 32, 8192)]
    shapes: dict[str, LlamaForCausalLM] = {}
    for shape, batch, prompt in [("tiny", 1, 70)] if bench.dry else cases:
        if shape not in shapes:
            shapes.clear()
            bench.free()
            shapes[shape] = model_of(bench, shape)
        model = shapes[shape]
        for name in ("DynamicCache", *((DRY,) if bench.dry else ("near-lossless", "balanced", "tiny"))):
            if bench.seconds_left < 0:
                return
            row: dict[str, Any] = {"model": shape, "batch": batch, "prompt": prompt, "cache": name}
            try:
                yield row | generated(bench, model, name, batch, prompt)
            except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                yield row | {"error": str(error)[:300]}
            bench.free()


def generated(bench: Bench, model: LlamaForCausalLM, name: str, batch: int, prompt: int) -> dict[str, Any]:
    """Seconds of a prompt, tokens a second after it, bytes of the cache and of the most that was allocated."""
    cache = make_cache(name, model.config)
    generator = torch.Generator(bench.device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator, device=bench.device)
    length = 3 if bench.dry else 64
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    with kvc.enable(model), torch.inference_mode():
        begin = time.perf_counter()
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
        bench.wait()
        first = time.perf_counter()
        more = torch.cat([ids, ids[:, :1]], dim=1)
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        model.generate(more, past_key_values=cache, **settings)
        bench.wait()
        end = time.perf_counter()
    found = {
        "prompt_s": first - begin,
        "tokens_per_s": batch * length / (end - first),
        "step_ms": (end - first) / length * 1e3,
    }
    found["cache_bytes"] = kvc.tensor_bytes(cache)
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(bench.device)} if cuda else {})
