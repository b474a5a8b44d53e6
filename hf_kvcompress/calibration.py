"""What `kvcompress calibrate` learned of a model's keys, in a file or in memory, and the frames that codecs take.

By layer and key-value head: a mean, a basis with its inverse, the best levels of every channel at 1 to 6 bits, and what
each number of bits leaves of the error that counts. Bits are given out when a codec asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .codecs.channel_bits import MOST_BITS, bytes_of
from .codecs.transform import Frame
from .rotary import rotary_of
from .shapes import layer_shapes

FORMAT, VERSION = "kvcompress-calibration", 1
DTYPE = torch.float16  # of the tensors, in a file and in memory: both pack alike
PARTS = ("mean", "to", "back", "levels", "loss")
LEVELS = 2 ** (MOST_BITS + 1) - 2  # of one channel: 2 of one bit, 4 of two ...

Layer = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class CalibrationConfig:
    """What a calibration is for.

    Args:
        model_type: of the model it was made with.
        num_layers: of that model.
        shapes: key-value heads and head size of each calibrated layer.
        rotations: what is known of each layer's rotation, as `describe_rotation` says it.
        rotated: the keys were taken with their rotation.
        made_of: tokens, texts' hashes and the like.
    """

    model_type: str
    num_layers: int
    shapes: Mapping[int, tuple[int, int]]
    rotations: Mapping[int, str]
    rotated: bool
    made_of: Mapping[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The header of a safetensors file, which holds strings only."""
        own = asdict(self)
        own["shapes"] = {str(layer): list(shape) for layer, shape in self.shapes.items()}
        own["rotations"] = {str(layer): text for layer, text in self.rotations.items()}
        return {"format": FORMAT, "version": str(VERSION), "config": json.dumps(own, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, name: str) -> CalibrationConfig:
        """Raises ValueError if the header is not of this format and version."""
        found = (metadata or {}).get("format")
        if found != FORMAT:
            raise refuse(f"a file of format {FORMAT!r}, as `kvcompress calibrate` writes", f"{found!r} in {name}")
        if (metadata or {}).get("version") != str(VERSION):
            raise refuse(f"format version {VERSION}", f"{(metadata or {}).get('version')} in {name}")
        own = json.loads((metadata or {})["config"])
        shapes = {int(layer): (int(h), int(d)) for layer, (h, d) in own.pop("shapes").items()}
        rotations = {int(layer): text for layer, text in own.pop("rotations").items()}
        return cls(shapes=shapes, rotations=rotations, **own)


class Calibration:
    """A calibration in memory; `Calibration.open` reads a file. Caches share it, as they share the model.

    Args:
        config: what it is for.
        layers: by number, `PARTS` each with an entry a head.
        name: for messages.
        path: the file that it came from, if any.
    """

    _opened: WeakValueDictionary[tuple[Any, ...], Calibration] = WeakValueDictionary()

    def __init__(
        self,
        config: CalibrationConfig,
        layers: Mapping[int, Layer],
        name: str = "calibration",
        path: str | None = None,
    ):
        self.config, self.name, self.path = config, name, path
        self.layers = {
            layer: {part: own[part].to("cpu", DTYPE).contiguous() for part in PARTS} for layer, own in layers.items()
        }
        self._frames: dict[tuple[int, float], Frame] = {}

    @staticmethod
    def open(source: str | Path | Calibration) -> Calibration:
        """A file that `kvcompress calibrate` wrote, or a calibration as it is.

        Raises ValueError if there is no such file, or it is of another format, version or dtype.
        """
        if isinstance(source, Calibration):
            return source
        if not isinstance(source, str | Path):
            raise refuse("a file that `kvcompress calibrate` wrote, or a Calibration", repr(source))
        path = Path(source).expanduser()
        if not path.is_file():
            raise refuse("a file that `kvcompress calibrate` wrote", f"{str(source)!r}, which is no file")
        told = path.stat()
        key = (path.resolve(), told.st_ino, told.st_size, told.st_mtime_ns)  # a file that is written anew is read anew
        found = Calibration._opened.get(key)
        if found is None:
            found = Calibration._opened[key] = Calibration._read(path)
        return found

    @staticmethod
    def _read(path: Path) -> Calibration:
        try:
            with safe_open(path, framework="pt") as file:
                config = CalibrationConfig.from_metadata(file.metadata(), path.name)
                names = {_key(layer, part) for layer in config.shapes for part in PARTS}
                if missing := names - set(file.keys()):
                    raise refuse(f"tensor {min(missing)}", f"none in {path.name}")
                stored = {name: file.get_tensor(name) for name in sorted(names)}
        except SafetensorError as error:
            raise refuse("a safetensors file", f"{path.name!r}: {error}") from None
        for name, tensor in stored.items():
            if tensor.dtype != DTYPE:
                raise refuse(f"tensors of dtype {DTYPE}", f"{tensor.dtype} for {name} in {path.name}")
        for layer, (heads, dim) in config.shapes.items():
            if stored[_key(layer, "to")].shape != (heads, dim, dim):
                shape = tuple(stored[_key(layer, "to")].shape)
                raise refuse(f"a basis of shape {(heads, dim, dim)} in layer {layer}", f"{shape} in {path.name}")
        layers = {layer: {part: stored[_key(layer, part)] for part in PARTS} for layer in config.shapes}
        return Calibration(config, layers, path.name, str(path))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, the config in its header."""
        save_file(self._tensors(), path, metadata=self.config.to_metadata())
        self.name, self.path = Path(path).name, str(path)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {_key(layer, part): tensor for layer, own in self.layers.items() for part, tensor in own.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what it is for and of every number: caches that are saved keep it."""
        digest = hashlib.sha256(self.config.to_metadata()["config"].encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def check(self, config: Any) -> None:
        """Raise ValueError, saying what differs, unless the calibration is for the model of this config."""
        own, shapes = self.config, layer_shapes(config)
        if own.model_type != model_type(config):
            raise refuse(
                f"a calibration of model type {model_type(config)!r}", f"one of {own.model_type!r} ({self.name})"
            )
        if own.num_layers != len(shapes):
            raise refuse(f"a calibration of {len(shapes)} layers", f"one of {own.num_layers} ({self.name})")
        for layer, (heads, dim) in own.shapes.items():
            if (heads, dim) != (shapes[layer].heads, shapes[layer].key_dim):
                expected = f"{shapes[layer].heads} key-value heads of size {shapes[layer].key_dim} in layer {layer}"
                raise refuse(expected, f"{heads} of size {dim} ({self.name})")
            if not own.rotated and describe_rotation(config, layer) != own.rotations[layer]:
                expected = f"the rotation {describe_rotation(config, layer)} in layer {layer}"
                raise refuse(expected, f"{own.rotations[layer]} ({self.name})")

    def frame(self, layer: int, nbits: float) -> Frame:
        """A layer's basis, with `nbits` for a channel on average. Raises ValueError if the layer has none."""
        if layer not in self.layers:
            raise refuse(f"layer {layer}", f"layers {', '.join(map(str, self.layers))} in {self.name}")
        if (layer, nbits) not in self._frames:
            self._frames[layer, nbits] = _frame(self.layers[layer], nbits, self.config.rotated)
        return self._frames[layer, nbits]

    @property
    def nbytes(self) -> int:
        """Bytes of the file's tensors. They belong to the model: caches share them and do not count them."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def storages_held(self) -> dict[Hashable, int]:
        """Nothing that a cache counts: it belongs to the model, as its weights do."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self  # copies of a cache share it

    def __repr__(self) -> str:
        return f"Calibration({self.name}, {self.config.model_type}, {len(self.layers)} layers)"


def model_type(config: Any) -> str:
    """The type of a model's decoder."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return str(text.model_type)


def describe_rotation(config: Any, layer: int) -> str:
    """A layer's rotation in a few words, the same for the same rotation; "unknown" where it is not known."""
    try:
        rotary = rotary_of(config, layer)
    except ValueError:
        return "unknown"
    if rotary.frequencies is None:
        return "none"
    mean = rotary.frequencies.double().log().clamp(min=-50).mean()
    pairs = "neighbours" if rotary.neighbours else "halves"
    return f"{len(rotary.frequencies)} {pairs}, mean log frequency {mean:.4f}, scaling {rotary.scaling:.4f}"


def share_bits(loss: torch.Tensor, total: int) -> list[int]:
    """Bits of each channel, at most `total` in all, each bit where it takes most of the loss `[D, 7]` away.

    This is reverse water-filling with the losses that were measured.
    """
    bits = [0] * len(loss)
    gains = (loss[:, :-1] - loss[:, 1:]).clamp(min=0)
    next_gain = gains[:, 0].clone()
    for _ in range(min(total, MOST_BITS * len(loss))):
        channel = int(next_gain.argmax())
        bits[channel] += 1
        next_gain[channel] = gains[channel, bits[channel]] if bits[channel] < MOST_BITS else -1.0
    return bits


def _frame(own: Layer, nbits: float, rotated: bool) -> Frame:
    mean, to, back, levels, loss = (own[part].float() for part in PARTS)
    bits = share_bits(loss.mean(0), 8 * bytes_of(mean.shape[1], nbits))  # all heads alike: a head's r-th channel
    order = sorted((c for c, own_bits in enumerate(bits) if own_bits), key=lambda c: -bits[c])
    kept = torch.tensor(order, dtype=torch.long)
    most = 2**MOST_BITS
    table = levels.new_empty(len(mean), len(order), most)
    edges = torch.full((len(mean), len(order), most - 1), torch.inf)
    for place, channel in enumerate(order):
        n = 2 ** bits[channel]
        found = levels[:, channel, n - 2 : 2 * n - 2]
        table[:, place, :n], table[:, place, n:] = found, found[:, -1:]
        edges[:, place, : n - 1] = (found[:, 1:] + found[:, :-1]) / 2
    given = tuple(bits[c] for c in order)
    return Frame(mean, to[:, :, kept].contiguous(), back[:, kept].contiguous(), edges, table, given, rotated)


def _key(layer: int, part: str) -> str:
    return f"layers.{layer}.{part}"


def refuse(expected: str, got: str) -> ValueError:
    return ValueError(f"calibration: expected {expected}, got {got}")
