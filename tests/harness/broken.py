"""Caches that a harness must tell apart: one that is exact and does not look like it, one that is broken."""

import torch
from transformers import DynamicCache


class Copy(DynamicCache):
    """Exact: a DynamicCache by another name."""


class ShuffledKeys(DynamicCache):
    """Forgets the order of the keys that it was given before."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        order = torch.randperm(layer.keys.shape[2], generator=torch.Generator().manual_seed(layer_idx))
        layer.keys = layer.keys[:, :, order]
        return keys, values


def copy_of(config):
    return Copy(config=config)


def shuffled(config):
    return ShuffledKeys(config=config)


class TooLarge(DynamicCache):
    """Does not fit."""

    def update(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation.")


def too_large(config):
    return TooLarge(config=config)
