"""Joining a chain of snapshots into one that needs no other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .snapshots import Snapshot

State = dict[str, Any]


def join(chain: Sequence[Snapshot]) -> Snapshot:
    """The last snapshot of a chain with the pages of all of them; other tensors are the same."""
    if len(chain) == 1:
        return chain[0]
    last = chain[-1]
    layers, tensors = copy.deepcopy(last.layers), dict(last.tensors)
    for index, layer in enumerate(layers):
        state = _pages(layer)
        if state is None:
            continue
        low = state["slabs"][0]["start"] if state["slabs"] else state["to"]
        pieces = list(_pieces(chain, index, low))
        for name in next((own["runs"] for _, own, _, _ in pieces if own["runs"]), {}):
            parts = [part for one, own, a, b in pieces if (part := _cut(one, own, name, a, b)) is not None]
            told = next(own["runs"][name] for _, own, _, _ in pieces if name in own["runs"])
            tensors[told["tensor"]] = torch.cat(parts, dim=told["axis"])
            state["runs"][name] = told
        state["from"] = low
    return Snapshot(layers, tensors)


def _pages(layer: dict[str, Any]) -> State | None:
    """What a layer of a snapshot tells of its sealed pages, if they are in slabs."""
    if "storage" not in layer:
        return None
    told = layer["storage"]["state"]["pages"]
    return told["state"] if told["class"] == "PageStore" else None


def _pieces(chain: Sequence[Snapshot], index: int, low: int) -> Iterator[tuple[Snapshot, State, int, int]]:
    """Each snapshot with its state and the tokens that are taken of it: up to where the next one begins."""
    states = [_pages(one.layers[index]) for one in chain]
    for number, (one, own) in enumerate(zip(chain, states, strict=True)):
        if own is None:  # a layer that had read nothing yet
            continue
        later = [after["from"] for after in states[number + 1 :] if after is not None]
        begin, end = max(own["from"], low), min([own["to"], *later])
        if begin < end:
            yield one, own, begin, end


def _cut(snapshot: Snapshot, state: State, name: str, begin: int, end: int) -> torch.Tensor | None:
    told = state["runs"].get(name)
    if told is None:
        return None
    first, per = state["from"], told["per"]
    return snapshot.tensors[told["tensor"]].narrow(told["axis"], (begin - first) // per, (end - begin) // per)
