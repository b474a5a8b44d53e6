"""Fills the folder of a disk tier until it refuses, goes on, and makes room: run by `test_full_disk`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from hf_kvcompress.prefix.disk import DiskTier

from .helpers import by_itself, by_store, prefix_cache, text

LENGTH, MOST = 64, 60
LARGE = 400  # tokens of a prefix that is more than the limit of file sizes


def main() -> None:
    torch.set_grad_enabled(False)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    store = prefix_cache(disk=folder / "tier")
    (tier,) = store.store.tiers
    prompts = [text(LENGTH if kind == "full" else (LENGTH, LARGE)[i % 2], i) for i in range(MOST)]
    names, stored = [], 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for ids in prompts:
            names.append(store.add_prefix(ids))
            stored = len(list((folder / "tier").glob("*/*.safetensors")))
            if tier.failures:
                break
    (told,) = [str(one.message) for one in warned if "going on without it" in str(one.message)]
    print(told)
    assert 0 < stored == len(names) - 1  # all but the one that had no room
    assert len(store) == len(names)  # nothing lost in memory
    for ids in prompts[: len(names)]:
        got, reused = by_store(store, [*ids, 1])
        assert reused == len(ids) // 16 * 16 and torch.equal(got, by_itself(store, [*ids, 1], [reused]))
    again = prefix_cache(disk=folder / "tier")  # the folder opens on the full disk, with every complete entry
    for ids in prompts[:stored]:
        assert by_store(again, [*ids, 1], steps=0)[1] == len(ids) // 16 * 16
    if kind == "full":  # no room for the index either
        fill = folder / "fill"
        with fill.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        full = DiskTier(folder / "tier", max_bytes=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not full.put("ab" * 16, bytes(5000)) and full.failures == 1
        assert full.get(full.keys()[0]) is None  # the tier is left alone for 30 seconds
        full._silent_until = 0.0
        assert full.get(full.keys()[0])
        for key in full.keys()[: stored // 2]:  # entries can be deleted, and make room
            full.delete(key)
        assert full.failures == 1
        fill.unlink()
    else:
        names.append(store.add_prefix(prompts[0]))
    tier._silent_until = 0.0  # the 30 seconds are over
    store.add_prefix(text(LENGTH, 999))
    assert by_store(prefix_cache(disk=folder / "tier"), [*text(LENGTH, 999), 1], steps=0)[1] == LENGTH
    print("all right")


if __name__ == "__main__":
    main()
