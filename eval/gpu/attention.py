"""Decode attention and whole decode steps of one layer's shape, against SDPA and DynamicCache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcompress as kvc
from hf_kvcompress.attention import kvcompress_attention
from hf_kvcompress.masks import CausalMask
from hf_kvcompress.packed_attention import packed_attention
from hf_kvcompress.pages import SEGMENT_LENGTH
from hf_kvcompress.softmax import Extras

from .timing import Bench, by_torch, device_ms, no_waiting, step_ms

QUERY_HEADS, HEADS, DIM = 32, 8, 128
CACHE_BYTES = 150 << 20  # layers are taken in turn until they hold more than the second-level cache does
CODECS = ("int8", "int4", "int2", "balanced")
DRY = "tiny"


def make_cache(name: str, config: LlamaConfig) -> Cache:
    """DynamicCache, a preset or a codec."""
    if name == "DynamicCache":
        return DynamicCache(config=config)
    return kvc.CompressedCache(config, **({"preset": name} if name in kvc.PRESETS else {"codec": name}))


class Module(torch.nn.Module):
    """What an attention function reads from the module that calls it."""

    num_key_value_groups = QUERY_HEADS // HEADS
    is_causal = True

    def __init__(self, index: int):
        super().__init__()
        self.layer_idx = index


class Layers:
    """The same text in several layers of a cache, stored a part at a time."""

    def __init__(self, bench: Bench, name: str, batch: int, tokens: int, dim: int):
        self.bench, self.batch, self.dim, self.tokens = bench, batch, dim, tokens
        uncompressed = batch * HEADS * tokens * dim * 2 * 2
        self.count = 1 if bench.dry else min(16, max(1, CACHE_BYTES // (uncompressed // 8)))
        shape = {"hidden_size": QUERY_HEADS * dim, "num_attention_heads": QUERY_HEADS, "num_key_value_heads": HEADS}
        config = LlamaConfig(**shape, num_hidden_layers=self.count)
        self.dynamic = name == "DynamicCache"
        self.cache = make_cache(name, config)
        self.attention = sdpa_attention_forward if self.dynamic else kvcompress_attention
        self.modules = [Module(index) for index in range(self.count)]
        self.dtype = torch.float32 if bench.dry else torch.bfloat16
        self.generator = torch.Generator(bench.device).manual_seed(0)
        part = max(64, 131072 // batch)
        for start in range(0, tokens, part):
            keys, values = self.draw(HEADS, min(part, tokens - start)), self.draw(HEADS, min(part, tokens - start))
            for index in range(self.count):
                self.cache.update(keys, values, index)
            if not self.dynamic:
                self.cache.commit()
        self.new = self.draw(QUERY_HEADS, 1), self.draw(HEADS, 1), self.draw(HEADS, 1)
        self.turn = 0

    def draw(self, heads: int, tokens: int) -> torch.Tensor:
        shape = self.batch, heads, tokens, self.dim
        return torch.randn(shape, generator=self.generator, device=self.bench.device, dtype=self.dtype)

    @property
    def bytes_a_layer(self) -> float:
        """What attention has to read of a layer: codes, scales and statistics, without the room that is still free."""
        if self.dynamic:
            return 2 * self.batch * HEADS * self.tokens * self.dim * self.dtype.itemsize
        with by_torch():
            return self.batch * HEADS * self.tokens * sum(map(self._bytes_a_token, ("key", "value")))

    def _bytes_a_token(self, role: str) -> float:
        codec = self.cache.layers[0].storage.pages.codecs[role]
        x = torch.randn(1, SEGMENT_LENGTH, self.dim, dtype=self.dtype)
        segment = codec.begin_segment(x)
        return sum(y.numel() * y.element_size() for y in (codec.encode(x, segment) | segment).values()) / SEGMENT_LENGTH

    def step(self) -> None:
        """Update and attention of one token in the layer whose turn it is."""
        index = self.turn % self.count
        self.turn += 1
        query, keys, values = self.new
        handles = self.cache.update(keys, values, index)
        self.attention(self.modules[index], query, *handles, None, scaling=self.dim**-0.5)

    def attend(self, index: int) -> torch.Tensor:
        """Attention alone, over what is stored."""
        query = self.new[0]
        if self.dynamic:
            layer: Any = self.cache.layers[index]
            return torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)
        layer = self.cache.layers[index]
        mask = CausalMask(1, self.tokens, True, self.bench.device)
        return packed_attention(layer, query, mask, self.dim**-0.5, Extras())


def sizes(bench: Bench) -> list[tuple[int, int]]:
    """Batch and tokens, the most telling first."""
    if bench.dry:
        return [(1, 70)]
    return [
        (1, 32768),
        (8, 32768),
        (1, 131072),
        (32, 8192),
        (1, 8192),
        (8, 8192),
        (32, 32768),
        (8, 131072),
        (32, 131072),
    ]


def measure(bench: Bench, name: str, batch: int, tokens: int) -> dict[str, Any]:
    """One row of the table."""
    dim = 64 if bench.dry else DIM
    layers = Layers(bench, name, batch, tokens, dim)
    row: dict[str, Any] = {"cache": name, "batch": batch, "tokens": tokens, "layers": layers.count}
    runs = [lambda index=index: layers.attend(index) for index in range(layers.count)]
    ms, how = device_ms(bench, runs, seconds=0.0 if bench.dry else 0.3)
    held = layers.bytes_a_layer
    gbs = held / ms / 1e6
    row |= {"bytes": held, "attention_ms": ms, "timed_by": how, "gbs": gbs, "percent": 100 * gbs / bench.copy_gbs}
    wall, host = step_ms(bench, layers.step, 2 if bench.dry else 64)
    row |= {"step_ms": wall, "host_us": host * 1e3, "waits": waits(bench, layers) if name != "DynamicCache" else ""}
    return row


def waits(bench: Bench, layers: Layers) -> str:
    """What in 40 steps, seals of pages among them, waits for the device; "" if nothing does."""
    try:
        with no_waiting(bench):
            for _ in range(2 if bench.dry else 40 * layers.count):
                layers.step()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    return ""


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows; stops when the time is up."""
    for batch, tokens in sizes(bench):
        base: dict[str, Any] | None = None
        for name in ("DynamicCache", *((DRY,) if bench.dry else CODECS)):
            if bench.seconds_left < 0:
                return
            try:
                row = measure(bench, name, batch, tokens)
            except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                row = {"cache": name, "batch": batch, "tokens": tokens, "error": str(error)[:300]}
            bench.free()
            if name == "DynamicCache":
                base = row
            if base is not None and "error" not in row and "error" not in base:
                row["attention_ratio"] = base["attention_ms"] / row["attention_ms"]
                row["step_ratio"] = base["step_ms"] / row["step_ms"]
            yield row
