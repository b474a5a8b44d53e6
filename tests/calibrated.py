"""Calibrations for tests: of tiny models, and of no model at all."""

import functools

import torch

from hf_kvcompress.calibrating import LEVELS, _solve_head, calibrate
from hf_kvcompress.calibration import PARTS, Calibration, CalibrationConfig, _frame, describe_rotation
from hf_kvcompress.codecs.base import CodecContext
from hf_kvcompress.codecs.registry import codec_class
from hf_kvcompress.rotary import Rotary
from hf_kvcompress.shapes import layer_shapes

HEADS = 8


class Words:
    """A tokenizer: numbers separated by blanks."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}


def text_for(tokens, seed=0):
    """A text of so many tokens of the zoo's."""
    ids = torch.randint(3, 90, (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(map(str, ids.tolist()))


def calibration_of(model, **settings):
    """A calibration of a tiny model, from random tokens."""
    return calibrate(model, [text_for(400)], Words(), tokens=384, length=96, **settings)


_KNOWN: dict = {}


def calibration_for(config):
    """Of the zoo's model with this very config; without such a model one that fits standard normal keys."""
    from .conformance.zoo import ENTRIES

    if id(config) not in _KNOWN:
        same = [entry.model for entry in ENTRIES if entry.model.config is config]
        made = calibration_of(same[0]) if same else normal_calibration(config)
        _KNOWN[id(config)] = (config, made)  # the config stays, so that its number is not used again
    return _KNOWN[id(config)][1]


def normal_calibration(config):
    """What calibrating a model of this shape would find, were its keys standard normal."""
    shapes = {shape.layer: shape for shape in layer_shapes(config)}
    own = CalibrationConfig(
        model_type=config.model_type,
        num_layers=len(shapes),
        shapes={layer: (shape.heads, shape.key_dim) for layer, shape in shapes.items()},
        rotations={layer: describe_rotation(config, layer) for layer in shapes},
        rotated=False,
    )
    return Calibration(own, {layer: _layer(shape.key_dim) for layer, shape in shapes.items()})


@functools.cache
def _layer(dim):
    g = torch.Generator().manual_seed(dim)
    keys = torch.randn(2048, dim, generator=g, dtype=torch.float64)
    own = _solve_head(keys, torch.ones(2048, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    assert own["levels"].shape == (dim, LEVELS)
    return {part: own[part].float().expand(HEADS, *own[part].shape) for part in PARTS}


class NoModel:
    """A calibration of standard normal keys, for any head size up to 8 heads."""

    def __init__(self, dim):
        self.dim = dim

    @functools.cache  # noqa: B019
    def frame(self, layer, nbits):
        return _frame(_layer(self.dim), nbits, rotated=True)


@functools.cache
def context_for(name, role, dim):
    """What a codec that needs a context gets in tests without a model; None for the others."""
    if not codec_class(name, role).wants_context:
        return None
    return CodecContext(0, Rotary(None), "", NoModel(dim))
