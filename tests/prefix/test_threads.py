"""Threads that put, lease and release entries of one small store, switched as often as Python can."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_kvcompress.config import CacheConfig
from hf_kvcompress.prefix.ranking import Ranking
from hf_kvcompress.prefix.store import PrefixStore
from hf_kvcompress.prefix.tree import Origin
from hf_kvcompress.snapshots import Snapshot

BLOCK, TURNS, THREADS = 4, 150, 6
ORIGIN = Origin("root", CacheConfig(), None)


@pytest.fixture
def hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _entry(tokens: tuple[int, ...]) -> Snapshot:
    """Its tensor tells the tokens."""
    return Snapshot([], {"page": torch.tensor(tokens)})


def test_threads_never_see_another_entry_and_bytes_add_up(hasty: None) -> None:
    store = PrefixStore(40 * 8 * BLOCK, Ranking("adaptive"), BLOCK)
    failed: list[Any] = []

    def work(number: int) -> None:
        draw = random.Random(number)
        try:
            for _ in range(TURNS):
                blocks = [draw.randrange(3) for _ in range(draw.randint(1, 4))]
                tokens = tuple(block for block in blocks for _ in range(BLOCK))
                lease = store.lease("root", (*tokens, 9), partial=False)
                if lease.node is not None:
                    held = lease.states()[-1].tensors["page"].tolist()
                    assert tuple(held) == tokens[: lease.tokens] == lease.node.all_tokens()
                    assert lease.node.state is not None  # held: nobody may evict it
                if lease.tokens < len(tokens):
                    store.release(store.put(tokens, _entry(tokens), ORIGIN, None, 1.0, False))
                store.release(lease)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    nodes = list(store.tree.nodes())
    assert store.nbytes == sum(node.nbytes for node in nodes) <= store.max_bytes
    assert not any(node.users for node in nodes) and store.stats.evictions > 0
    for node in nodes:
        assert node.parent is not None and node.parent.children[node.hashes[0]] is node
