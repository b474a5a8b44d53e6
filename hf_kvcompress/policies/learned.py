"""A learned score (after KVzap, arXiv 2601.07891): a small network on key, value and age, taught by what came later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import silu

from ..shards import first_head, is_part
from .base import Candidates, Policy

FORMAT = "hf_kvcompress.learned"
VERSION = 1
#: of one layer: weights and biases of the hidden layer `[H, F, M]`, `[H, M]` and of the output `[H, M]`, `[H]`
PARTS = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
TINY = 1e-6
Network = dict[str, torch.Tensor]


def features(keys: torch.Tensor, values: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """What the network sees of tokens: `[..., D]`, `[..., Dv]` and `[...]` -> `[..., F]` float32.

    Key and value as stored; the key's pairs of channels that RoPE turns together, by their length, which no position
    changes; both norms; the age, by its logarithm.
    """
    keys, values = keys.float(), values.float()
    half = keys.shape[-1] // 2
    pairs = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
    norms = torch.stack([keys.norm(dim=-1), values.norm(dim=-1)], dim=-1)
    age = ages.float().clamp(min=0).log1p()[..., None]
    return torch.cat([keys, values, (torch.cat([pairs, norms], dim=-1) + TINY).log(), age], dim=-1)


def feature_size(key_dim: int, value_dim: int) -> int:
    """F of `features`."""
    return key_dim + value_dim + key_dim // 2 + 3


def run_network(network: Network, x: torch.Tensor) -> torch.Tensor:
    """Features `[H, n, F]` -> scores `[H, n]`, every head by its own weights."""
    hidden = silu(torch.baddbmm(network["hidden.bias"][:, None], x, network["hidden.weight"]))
    return torch.baddbmm(network["out.bias"][:, None, None], hidden, network["out.weight"][..., None])[..., 0]


@dataclass(frozen=True)
class LearnedConfig:
    """What a file of weights is for, and how it came about.

    Args:
        model_type: of the model's config.
        num_layers: layers of the model; `shapes` has those with weights: (heads, key size, value size) by number.
        hidden: width of the hidden layer.
        max_age: highest age in training; older tokens count as of that age.
        training: teacher, texts' hashes and the like.
    """

    model_type: str
    num_layers: int
    shapes: Mapping[int, tuple[int, int, int]]
    hidden: int
    max_age: int
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The header of a safetensors file, which holds strings only."""
        own = asdict(self)
        own["shapes"] = {str(layer): list(shape) for layer, shape in self.shapes.items()}
        return {"format": FORMAT, "version": str(VERSION), "config": json.dumps(own, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, name: str) -> LearnedConfig:
        """Raises ValueError if the header is not of this format and version."""
        found = (metadata or {}).get("format")
        if found != FORMAT:
            raise _refuse(f"a file of format {FORMAT!r}, as `kvcompress train-policy` writes", f"{found!r} in {name}")
        if (metadata or {}).get("version") != str(VERSION):
            raise _refuse(f"format version {VERSION}", f"{(metadata or {}).get('version')} in {name}")
        own = json.loads((metadata or {})["config"])
        shapes = {int(layer): (int(h), int(k), int(v)) for layer, (h, k, v) in own.pop("shapes").items()}
        return cls(shapes=shapes, **own)


class LearnedWeights:
    """The networks of all layers, in memory or in a file that is read layer by layer as they are needed.

    Args:
        config: what they are for.
        source: the networks by layer, float32, or the file that has them.
    """

    def __init__(self, config: LearnedConfig, source: Mapping[int, Network] | Path):
        self.config, self.source = config, source
        self.name = source.name if isinstance(source, Path) else "weights"
        self._ready: dict[tuple[int, int, int, torch.device], Network] = {}

    @staticmethod
    def open(path: str | Path) -> LearnedWeights:
        """A file of weights; its header is read now, each layer when first asked for. One object a file.

        Raises ValueError if there is no such file or it is of another format.
        """
        path = Path(path).expanduser().resolve()
        try:
            stamp = path.stat()
        except OSError as error:
            raise _refuse("a file that `kvcompress train-policy` wrote", f"{str(path)!r}: {error.strerror}") from None
        return _open(path, stamp.st_mtime_ns, stamp.st_size)

    def __reduce__(self) -> tuple[Any, ...]:  # a saved cache names its file, as it names no weights of the model
        if isinstance(self.source, Path):
            return LearnedWeights.open, (self.source,)
        return LearnedWeights, (self.config, dict(self.source))

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedWeights:
        return self  # copies of a cache share them

    def _read(self, layer: int) -> Network:
        if not isinstance(self.source, Path):
            return self.source[layer]
        with safe_open(self.source, framework="pt") as file:
            return {part: file.get_tensor(_key(layer, part)).float() for part in PARTS}

    def network(self, layer: int, heads: int, device: torch.device) -> Network:
        """Of the heads of one layer that this process has, on the device. Raises ValueError if the layer has none."""
        first = first_head(self._shape(layer)[0], heads)
        key = layer, first, heads, device
        if key not in self._ready:
            self._ready[key] = {part: t[first : first + heads].to(device) for part, t in self._read(layer).items()}
        return self._ready[key]

    def check(self, layer: int, heads: int, key_dim: int, value_dim: int) -> None:
        """Raise ValueError unless the layer's network is for this shape, or these heads are a rank's part of it."""
        wanted, got = (heads, key_dim, value_dim), self._shape(layer)
        if wanted != got and not (wanted[1:] == got[1:] and is_part(got[0], heads)):
            raise _refuse(f"{_words(wanted)} in layer {layer}", f"{_words(got)} in {self}")

    def check_layers(self, number: int) -> None:
        """Raise ValueError unless the weights are for a model of so many layers."""
        if number != self.config.num_layers:
            raise _refuse(f"weights for a model of {number} layers", str(self))

    def _shape(self, layer: int) -> tuple[int, int, int]:
        if layer not in self.config.shapes:
            raise _refuse(f"a network for layer {layer}", f"layers {', '.join(map(str, self.config.shapes))} in {self}")
        return self.config.shapes[layer]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, the config in its header."""
        tensors = {
            _key(layer, part): tensor.cpu().contiguous()
            for layer in self.config.shapes
            for part, tensor in self._read(layer).items()
        }
        save_file(tensors, path, metadata=self.config.to_metadata())

    def __str__(self) -> str:
        return f"{self.name} (for {self.config.model_type}, {self.config.num_layers} layers)"


@lru_cache(maxsize=16)
def _open(path: Path, modified: int, size: int) -> LearnedWeights:
    try:
        with safe_open(path, framework="pt") as file:
            config = LearnedConfig.from_metadata(file.metadata(), path.name)
            missing = {_key(layer, part) for layer in config.shapes for part in PARTS} - set(file.keys())
    except SafetensorError as error:
        raise _refuse("a safetensors file", f"{str(path)!r}: {error}") from None
    if missing:
        raise _refuse(f"tensor {min(missing)}", f"none in {path.name}")
    return LearnedWeights(config, path)


class LearnedPolicy(Policy):
    """What a network trained by `kvcompress train-policy` expects a token to be worth to the queries to come.

    It needs no queries, so it works in prefill and in decoding and under any attention.

    Args:
        weights: a file, or weights in memory.
    """

    name = "learned"

    def __init__(self, weights: str | Path | LearnedWeights):
        opened = weights if isinstance(weights, LearnedWeights) else LearnedWeights.open(weights)
        self.file, self.config = opened.name, opened.config
        # Weights belong to the model and caches share them: held by methods, they are not in a cache's `nbytes`.
        self._check, self._network = opened.check, opened.network

    def score(self, candidates: Candidates) -> torch.Tensor:
        """The network's output: the logarithm of what the token will be worth."""
        keys, values, heads = candidates.keys, candidates.values, candidates.heads
        self._check(candidates.layer, heads, keys.shape[-1], values.shape[-1])
        _, near = candidates.context
        newest = torch.cat([candidates.positions, near], dim=1).amax(1, keepdim=True)
        ages = (newest - candidates.positions).clamp(max=self.config.max_age)
        x = features(keys, values, ages)  # [L, N, F]
        by_head = x.unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2)  # [H, B * N, F]
        scores = run_network(self._network(candidates.layer, heads, x.device), by_head)
        return scores.unflatten(1, (-1, x.shape[1])).transpose(0, 1).flatten(0, 1)

    def __repr__(self) -> str:
        return f"LearnedPolicy(weights={self.file})"


def _key(layer: int, part: str) -> str:
    return f"layers.{layer}.{part}"


def _words(shape: tuple[int, int, int]) -> str:
    return "{} key-value heads with keys of {} and values of {}".format(*shape)


def _refuse(expected: str, got: str) -> ValueError:
    return ValueError(f"weights: expected {expected}, got {got}")
