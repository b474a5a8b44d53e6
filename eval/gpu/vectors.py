"""The operations on the device against their torch references, over one set of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import hf_kvcompress as kvc
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.config import LayerConfig
from hf_kvcompress.layer import CompressedLayer
from hf_kvcompress.masks import CausalMask
from hf_kvcompress.ops import delta, features, kernels, mass, select
from hf_kvcompress.packed_attention import packed_attention
from hf_kvcompress.softmax import Extras

from .timing import Bench, by_torch

#: keys, values, query heads a key-value head, dtype: each compiles a kernel, which takes some seconds
ATTENTION = [
    *((name, name, 4, torch.bfloat16) for name in ("eqrot4", "int8", "int4", "int2", "turbo4", "channel4", "fp8")),
    *(("eqrot4", "eqrot4", groups, torch.float16) for groups in (1, 7, 8)),
    ("eqrot3", "eqrot2", 4, torch.bfloat16),
    ("identity", "identity", 4, torch.bfloat16),  # served by the kernel with shuffles
]

Check = Callable[[Bench], str]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Channels of unequal mean and spread, as real keys have; on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(1, 1, shape[-1], generator=generator) * 4 + 0.2
    return (torch.randn(*shape, generator=generator) * spread + 1.5).to(dtype)


def different(name: str, got: torch.Tensor, expected: torch.Tensor) -> str:
    """How many entries differ, "" if none does."""
    got = got.cpu()
    wrong = (got != expected) & ~(got.isnan() & expected.isnan()) if got.is_floating_point() else got != expected
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} differ" if wrong.any() else ""


def further(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """The largest distance between two tensors if it is above `tolerance` times the largest entry."""
    got = got.to(expected.device)
    error = ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return "" if error <= tolerance else f"{name}: relative error {error:.2g}"


def codec(name: str, role: str, dim: int, dtype: torch.dtype) -> Check:
    """Packed bytes are those of the CPU's torch code; decoded numbers too, to the last bits of a rotation."""

    def check(bench: Bench) -> str:
        x = numbers(2, 96, dim, dtype=dtype)
        made = make_codec(name, role, dim, page_size=32, group_size=32)
        with by_torch():
            segment = made.begin_segment(x)
            expected = made.encode(x, segment)
            values = made.decode({**expected, **segment})
        segment = {key: value.to(bench.device) for key, value in segment.items()}
        got = made.encode(x.to(bench.device), segment)
        decoded = made.decode({**{key: value.to(bench.device) for key, value in expected.items()}, **segment})
        wrong = [different(key, got[key], expected[key]) for key in expected]
        return "; ".join(filter(None, [*wrong, further("decoded", decoded.cpu(), values, 1e-5)]))

    return check


def attention(keys: str, values: str, dim: int, groups: int, dtype: torch.dtype, tokens: int = 300) -> Check:
    """The fused kernel against the torch path over the same packed pages, both on the device."""

    def check(bench: Bench) -> str:
        layer = CompressedLayer(LayerConfig(keys, values), 0, None)
        for length in (tokens, 1):
            both = (numbers(2, 2, length, dim, dtype=dtype, seed=seed).to(bench.device) for seed in (1, 2))
            layer.update(*both)
            if length > 1:
                layer.commit()
        query = numbers(2, 2 * groups, 1, dim, dtype=dtype, seed=3).to(bench.device)
        mask = CausalMask(1, tokens, True, bench.device)

        def attend() -> torch.Tensor:
            return packed_attention(layer, query, mask, dim**-0.5, Extras())

        got = attend()
        with by_torch():
            expected = attend()
        if bench.device.type == "cuda":
            replayed = replay(attend)
            if not torch.equal(replayed, got):
                return "a replayed CUDA graph gives something else"
        return further("output", got, expected, max(2 * torch.finfo(dtype).eps, 1e-5))

    return check


def replay(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` gives when it is captured in a CUDA graph and the graph is replayed."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    return out


def selection(bench: Bench) -> str:
    scores, k = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 9, 400, 650, 700])
    args = scores, k.int(), 650, torch.tensor([[[0, 4, 9], [690, 700, 8]]]).expand(6, -1, -1).int().contiguous()
    with by_torch():
        expected = select.select_tokens(*args)
    return different(
        "kept", select.select_tokens(*(x if isinstance(x, int) else x.to(bench.device) for x in args)), expected
    )


def mass_of_tokens(bench: Bench) -> str:
    weights = torch.rand(4, 4 * 3, 200, generator=torch.Generator().manual_seed(0))
    with by_torch():
        expected = mass.attention_mass(weights, 4, 2)
    return further("mass", mass.attention_mass(weights.to(bench.device), 4, 2).cpu(), expected, 1e-5)


def deltas(bench: Bench) -> str:
    pages, members = numbers(6, 32, 64), torch.tensor([1, 2, 4])
    args = pages, pages[[0, 3]].contiguous(), members, torch.tensor([0, 0, 1])
    with by_torch():
        expected = delta.encode_delta(*args, 4)
        values = delta.decode_delta(expected, args[1], args[3])
    there = [x.to(bench.device) for x in args]
    got = delta.encode_delta(*there, 4)
    wrong = different("codes", got.codes, expected.codes)
    return wrong or further("decoded", delta.decode_delta(got, there[1], there[3]).cpu(), values, 1e-5)


def page_features(bench: Bench) -> str:
    pages = numbers(12, 32, 64)
    with by_torch():
        expected = features.page_features(pages).all
    return further("features", features.page_features(pages.to(bench.device)).all.cpu(), expected, 1e-4)


def every(bench: Bench) -> Iterator[tuple[str, Check]]:
    """Names and checks; a few of each kind when dry."""
    names = ["int4"] if bench.dry else [name for name in kvc.codec_names() if name != "identity"]
    for name in names:
        for role in ("key",) if bench.dry else ("key", "value"):
            for dim, dtype in ((64, torch.float32),) if bench.dry else ((128, torch.bfloat16), (80, torch.float16)):
                yield f"codec {name} {role} {dim} {str(dtype)[6:]}", codec(name, role, dim, dtype)
    yield "select", selection
    yield "mass", mass_of_tokens
    yield "delta", deltas
    yield "features", page_features
    for keys, values, groups, dtype in [("eqrot3", "eqrot2", 4, torch.float32)] if bench.dry else ATTENTION:
        made = attention(keys, values, 64 if bench.dry else 128, groups, dtype)
        yield f"attention {keys} {values} {groups} {str(dtype)[6:]}", made


def run(bench: Bench) -> dict[str, str]:
    """What is wrong, by name; empty where all is well."""
    found = {}
    for name, check in every(bench):
        try:
            found[name] = check(bench)
        except Exception as error:  # one kernel that fails must not hide what the others do
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    assert kernels.serves(torch.empty(0, device=bench.device)), "the checks compared torch with itself"
    return found
