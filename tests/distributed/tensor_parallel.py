"""One of two ranks that share a tiny Llama's heads: every cache beside the whole model in one process.

    torchrun --standalone --nproc_per_node 2 -m tests.distributed.tensor_parallel MODEL OUT.json

The whole model adds what the two halves of a row-wise layer give in the same order as the ranks do, so that nothing but
the cache could make a difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import hf_kvcompress as kvc
from hf_kvcompress.config import PRESETS
from hf_kvcompress.policies.learned import LearnedConfig, LearnedWeights, feature_size

from ..calibrated import calibration_of
from ..conformance.factories import EVICTING, EXACT, KVCOMPRESS, LOSSY, SMALL, TIGHT

NEW, LENGTHS = 6, (45, 37)
BUDGET = 44_000  # bytes of a rank: too few for the whole model
Made = dict[str, tuple[Any, tuple[str, ...]]]


class Halves(torch.nn.Module):
    """A linear layer whose input features are summed half by half, as two ranks do."""

    def __init__(self, whole: torch.nn.Linear):
        super().__init__()
        self.parts = [part.contiguous() for part in whole.weight.chunk(2, dim=1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (linear(*pair) for pair in zip(x.chunk(2, dim=-1), self.parts, strict=True))
        return first + second


def whole_model(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = Halves(layer.self_attn.o_proj), Halves(layer.mlp.down_proj)
    return model


def learned_weights(config: Any) -> LearnedWeights:
    """Random networks, another one for every head."""
    heads, dim, hidden = config.num_key_value_heads, config.head_dim, 8
    size, layers = feature_size(dim, dim), range(config.num_hidden_layers)
    shapes = {"hidden.weight": (size, hidden), "hidden.bias": (hidden,), "out.weight": (hidden,), "out.bias": ()}
    random = torch.Generator().manual_seed(0)
    networks = {i: {name: torch.randn(heads, *own, generator=random) for name, own in shapes.items()} for i in layers}
    own = LearnedConfig("llama", len(layers), {i: (heads, dim, dim) for i in layers}, hidden, max_age=1000)
    return LearnedWeights(own, networks)


def caches(model: Any) -> Made:
    """Every kind of cache by name: how it is made of a config, and the attentions it runs under."""
    both, ours = ("sdpa", KVCOMPRESS), (KVCOMPRESS,)
    found: Made = {
        own.name: (own.make, tuple(name for name in both if own.runs_under(name)))
        for own in (*EXACT, *LOSSY, *EVICTING)
        if own.runs_on("llama") and own.name != "TransformCache" and not own.name.endswith(("-identity", "-kivi4"))
    }

    def add(name: str, kind: Any, attentions: tuple[str, ...] = both, **settings: Any) -> None:
        found[name] = (lambda config, **_: kind(config, **{**SMALL, **settings}), attentions)

    calibration = calibration_of(model)
    add("TransformCache", kvc.TransformCache, calibration=calibration)
    add("TransformCache 2.5", kvc.TransformCache, bits=2.5, calibration=calibration)
    for preset in PRESETS:
        add(preset, kvc.CompressedCache, preset=preset)
    for family in ("channel4", "haar3", "int3"):
        add(family, kvc.CompressedCache, codec=family)
    weights = learned_weights(model.config)
    add("LearnedCache", kvc.LearnedCache, weights=weights, budget=TIGHT)
    add("VideoCache", kvc.VideoCache, tokens_per_frame=5, budget=TIGHT)
    add("HierarchicalCache", kvc.HierarchicalCache, ours, levels=("int8", "int4", "int2"), min_length=8)
    for name in ("H2O", "StreamingLLM", "SnapKV", "PyramidKV", "AdaKV", "TOVA", "ExpectedAttention", "KeyDiff", "RKV"):
        kind = getattr(kvc, f"{name}Cache")  # the policies without a lossy codec
        sizes = {"heavy_ratio": 0.3, "recent_ratio": 0.3} if name == "H2O" else {"budget": TIGHT + 8}
        add(kind.__name__, kind, ours, codec="identity", **sizes)
    add("RandomCache", kvc.RandomCache, budget=TIGHT)
    add("quality_guard", kvc.CompressedCache, ours, codec="int2", quality_guard=0.01)
    add("bytes", kvc.CompressedCache, ours, policy="h2o", codec="int4", budget=f"{BUDGET}B")
    add("bytes tova", kvc.CompressedCache, ours, policy="tova", codec="int4", budget=f"{BUDGET}B")
    return found


def generated(model: Any, make: Any, attention: str) -> tuple[torch.Tensor, Any]:
    """Tokens and logits of a greedy run as one row of numbers, and the cache; under ours two rows of unequal length."""
    lengths = LENGTHS if attention == KVCOMPRESS else LENGTHS[:1]
    random = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), None
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 250, (length,), generator=random)
    mask = (ids > 0).long()
    model.set_attn_implementation("sdpa")
    cache = make(model.config)
    told = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    with kvc.enable(model) if attention == KVCOMPRESS else torch.no_grad():
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **told)
    return torch.cat([out.sequences.flatten().float(), torch.stack(out.logits).flatten()]), cache


def prefixes(part: Any, whole: Any, folder: Path) -> dict[str, Any]:
    """A `PrefixCache` of a part of the model: every rank its own entries, the same passes on both."""
    random = torch.Generator().manual_seed(2)
    prefix, question = (torch.randint(3, 250, (n,), generator=random).tolist() for n in (50, 9))
    told = dict(max_tokens=6, do_sample=False)

    def answer(model: Any, tier: Path | None, upset: bool = False) -> tuple[list[int], Any]:
        store = kvc.PrefixCache(1, model=model, cache={**SMALL, "codec": "int4"}, disk=tier)
        name = store.add_prefix(prefix)
        if upset and dist.get_rank() == 1:
            store.store.clear()
        return store.generate_with_prefix(name, question, **told)[0].tolist(), store

    expected = answer(whole, None)[0]
    first, store = answer(part, folder / "shared")
    dist.barrier()
    second, fetched = answer(part, folder / "shared")
    upset, alone = answer(part, None, upset=True)
    return {
        "right": [got == expected for got in (first, second, upset)],
        "root": store.reader.origin.root,
        "fetched": fetched.store.stats.tokens_fetched,
        "reused": [own.store.stats.tokens_reused for own in (store, fetched, alone)],
    }


def served(model: Any) -> list[list[int]]:
    """What an engine with a prefix cache answers to three prompts."""
    random = torch.Generator().manual_seed(3)
    system = torch.randint(3, 250, (40,), generator=random).tolist()
    prompts = [system + torch.randint(3, 250, (n,), generator=random).tolist() for n in (5, 20, 11)]
    engine = kvc.PagedAttentionEngine(model, codec="int4", residual_length=16, memory_gb=0.01, prefix_cache=True)
    return engine.generate(prompts, max_tokens=8)


def saved(part: Any, folder: Path) -> list[str]:
    """Why a rank's cache is not read by the other rank."""
    _, cache = generated(part, lambda config: kvc.CompressedCache(config, **SMALL), KVCOMPRESS)
    rank = dist.get_rank()
    cache.save(folder / f"{rank}.safetensors")
    dist.barrier()
    own = kvc.CompressedCache.load(folder / f"{rank}.safetensors", part.config)
    assert own.nbytes > 0 and own.get_seq_length() == cache.get_seq_length()
    try:
        kvc.CompressedCache.load(folder / f"{1 - rank}.safetensors", part.config)
    except ValueError as error:
        return [str(error)]
    return []


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder, target = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole, part = whole_model(folder), AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    found: dict[str, Any] = {}
    for number, (name, (make, attentions)) in enumerate(caches(whole).items()):
        for attention in attentions:
            got, cache = generated(part, make, attention)
            heads = [layer.storage.heads["key"] for layer in cache.packed_layers()]
            told: dict[str, Any] = {"heads": heads, "nbytes": cache.nbytes, "sum": got.double().sum().item()}
            told["finite"] = bool(got.isfinite().all())
            if number % 2 == rank and not name.startswith("bytes"):  # each rank has half of the comparisons
                expected, alone = generated(whole, make, attention)
                told |= {"error": (got - expected).abs().max().item(), "alone_nbytes": alone.nbytes}
            found[f"{name}, {attention}"] = told
    found["prefixes"] = prefixes(part, whole, Path(target).parent)
    found["served"] = served(part) == served(whole)
    found["refused"] = saved(part, Path(target).parent)
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        Path(target).write_text(json.dumps(everywhere))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
