"""Layers to attend to, by kernels and by torch."""

import torch

from hf_kvcompress.layer import CompressedLayer
from hf_kvcompress.masks import CausalMask
from hf_kvcompress.ops import kernels
from hf_kvcompress.packed_attention import packed_attention
from hf_kvcompress.softmax import Extras

from . import build


def emulate(schedule="forward", **texts):
    """An emulator for macros that no line `// variants: ...` lists as well; there are too many to do so."""
    return build.Emulator(schedule, texts={f"{name}.cu": text for name, text in texts.items()}, undeclared=True)


def kernel_of(emulator):
    """The attention kernel that ran last."""
    return next(name for name in reversed(emulator.launches) if name in ("attention_mma", "attention_plain"))


def filled(config, batch=1, heads=2, dim=64, tokens=150, dtype=torch.float32, new=1, size=1.0, growth=0.0):
    """A layer that has stored `tokens` and holds `new` more in flight.

    Values are about `size` at the end, and by 2^growth smaller at the beginning.
    """
    torch.manual_seed(0)
    layer = CompressedLayer(config, 0, None)
    spread, shift = torch.rand(1, heads, 1, dim) * 3 + 0.1, torch.randn(1, heads, 1, dim)
    for length in (tokens, new):
        keys = torch.randn(batch, heads, length, dim) * spread + shift
        values = torch.randn(batch, heads, length, dim) * size
        if length == tokens:
            values *= torch.exp2(torch.linspace(-growth, 0.0, length))[:, None]
        layer.update(keys.to(dtype), values.to(dtype))
        if length == tokens:
            layer.commit()
    return layer


def causal(layer, queries):
    """No mask but that of a causal model."""
    return CausalMask(queries, layer.chunk.start, True, torch.device("cpu"))


def attend(layer, query, mask=None, emulator=None, extras=None):
    """Output of the kernels under `emulator`, or of the torch path in float32."""
    mask = mask or causal(layer, query.shape[2])
    with kernels.emulate(emulator):
        return packed_attention(layer, query, mask, query.shape[-1] ** -0.5, extras or Extras())


def both(layer, query, emulator, mask=None, extras=None):
    """Output of the torch path and of the kernels, float32."""
    reference = attend(layer, query, mask, None, extras)
    out = attend(layer, query, mask, emulator, extras)
    assert emulator.launches[-1] == "attention_combine"
    return reference.float(), out.float()
