"""Bytes are counted by storage: each once, all of it, wherever it hangs."""

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from hf_kvcompress.measure import iter_tensors, tensor_bytes


class Slotted:
    __slots__ = ("tensor", "unset")

    def __init__(self, tensor):
        self.tensor = tensor


@dataclass
class Held:
    tensor: torch.Tensor


class Wrapper(torch.Tensor):
    """A tensor subclass as quantization libraries make them: a shape, and parts that hold the bytes."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, (1000, 1000), dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran: counting must not compute")


class Flattened(Wrapper):
    def __tensor_flatten__(self):
        return ["codes", "scale"], None


def test_tensor_bytes_counts_containers_attributes_and_slots():
    tensors = [torch.zeros(10, dtype=torch.float16) for _ in range(6)]
    tree = {"a": [tensors[0], (tensors[1],)], "b": Slotted(tensors[2]), "c": Held(tensors[3])}
    tree["d"] = {"e": {1: tensors[4]}}
    tree["again"] = tree  # a cycle ends
    assert tensor_bytes(tree) == 5 * 20
    assert len(list(iter_tensors(tree))) == 5


def test_tensor_bytes_counts_a_shared_storage_once_and_whole():
    base = torch.zeros(100, 8)
    assert tensor_bytes([base[:1], base[50:], base.view(-1), base]) == 100 * 8 * 4
    assert tensor_bytes(base[:1]) == 100 * 8 * 4, "a slice keeps the whole storage alive"


@pytest.mark.parametrize("kind", [Wrapper, Flattened])
def test_tensor_bytes_counts_the_parts_of_a_wrapper(kind):
    wrapped = kind(torch.zeros(64, dtype=torch.uint8), torch.zeros(4, dtype=torch.float16))
    assert tensor_bytes({"w": wrapped}) == 64 + 8


def test_tensor_bytes_ignores_what_holds_nothing():
    assert tensor_bytes([None, 3, "text", torch.empty(5, device="meta"), torch.empty(0), len, Held]) == 0


def test_tensor_bytes_of_a_dynamic_cache_is_its_keys_and_values():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 7, 16), torch.zeros(1, 2, 7, 16), layer)
    assert tensor_bytes(cache) == 3 * 2 * (2 * 7 * 16 * 4)


def test_tensor_bytes_refuses_layouts_it_cannot_count():
    with pytest.raises(ValueError, match="strided"):
        tensor_bytes(torch.eye(3).to_sparse())
