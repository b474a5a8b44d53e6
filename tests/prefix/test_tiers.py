"""Tiers below the memory: survive restarts and kills, are shared by processes, and their failures cost only time."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcompress.prefix.disk import DiskTier
from hf_kvcompress.prefix.tiers import BACK_OFF, Tier, open_tier

from ..redis_server import RedisServer, installed
from .helpers import by_itself, by_store, prefix_cache, text

KEYS = [f"{number:032x}" for number in range(20)]


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    if installed() is None:
        pytest.skip("no redis-server is installed: the Redis tier is not tested")
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["disk", "memory", "file", "redis"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    where: Any = tmp_path / "tier"
    if request.param == "redis":
        where = request.getfixturevalue("redis_server").url
    elif request.param != "disk":
        where = f"{request.param}://{tmp_path}/tier"
    opened = open_tier(where)
    yield opened
    for key in KEYS:
        opened.delete(key)
    opened.close()


def test_every_tier_finds_gets_and_deletes(tier: Tier) -> None:
    assert tier.find(KEYS) is None and tier.get(KEYS[0]) is None
    assert tier.put(KEYS[3], b"three") and tier.put(KEYS[5], b"five" * 1000)
    assert tier.find(KEYS) == KEYS[3] and tier.find(KEYS[::-1]) == KEYS[5]
    assert tier.get(KEYS[5]) == b"five" * 1000
    assert tier.put(KEYS[3], b"anew") and tier.get(KEYS[3]) == b"anew"
    tier.delete(KEYS[3])
    assert tier.find(KEYS[:5]) is None and tier.failures == 0


@pytest.mark.parametrize("codec", ["identity", "eqrot3"])
def test_another_store_begins_with_what_a_tier_has(tier: Tier, codec: str) -> None:
    """Bit for bit, as after a restart or on another machine."""
    ids = text(120) + text(30, 1)
    first = prefix_cache(codec=codec, remote=tier, salt=f"{time.time()}")
    first.add_prefix(ids[:50])
    first.add_prefix(ids[:120])  # goes on from the other: is written with all its pages
    expected, _ = by_store(first, ids)
    second = prefix_cache(codec=codec, remote=tier, salt=first.reader.salt)
    got, reused = by_store(second, ids)
    assert reused == 112 and second.store.stats.tokens_fetched == 112
    assert torch.equal(got, expected) and torch.equal(got, by_itself(second, ids, [48, 112, 144]))
    other = prefix_cache(codec=codec, remote=tier, salt="another")
    assert by_store(other, ids, steps=0)[1] == 0


def test_entries_that_leave_the_memory_go_to_the_tier(tmp_path: Path) -> None:
    one = prefix_cache()
    one.add_prefix(text(64))
    store = prefix_cache(max_cache_size_gb=1.5 * one.nbytes / 2**30, disk=tmp_path)
    prompts = [text(70, seed) for seed in range(4)]
    for ids in prompts:
        by_store(store, ids, steps=0)
        by_store(store, ids, steps=0)  # a use: worth keeping
    assert len(store) == 1
    for ids in prompts:
        got, reused = by_store(store, ids)
        assert reused == 64 and torch.equal(got, by_itself(store, ids, [64]))
    assert store.store.stats.fetches == 4


def test_the_bound_of_the_folder_holds(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, max_bytes=2500)
    for key in KEYS[:5]:
        tier.put(key, bytes(1000))
        time.sleep(0.002)
        tier.get(KEYS[0])
    assert tier.keys() == [KEYS[4], KEYS[0]] and tier.nbytes == 2000
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path) -> None:
    store = prefix_cache(disk=tmp_path)
    ids = text(64) + [1, 2]
    store.add_prefix(ids[:64])
    (path,) = tmp_path.glob("*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    fresh = prefix_cache(disk=tmp_path)
    with pytest.warns(RuntimeWarning, match="contents that were changed since it was written.*it is deleted"):
        got, reused = by_store(fresh, ids)
    assert reused == 0 and torch.equal(got, by_itself(fresh, ids, [64])) and not path.exists()


def test_an_index_without_files_and_files_without_an_index(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    tier.put(KEYS[0], b"zero")
    tier.put(KEYS[1], b"one")
    tier._path(KEYS[0]).unlink()
    assert tier.find(KEYS) == KEYS[0] and tier.get(KEYS[0]) is None and tier.find(KEYS) == KEYS[1]
    tier.close()
    (tmp_path / "index.sqlite").unlink()
    assert DiskTier(tmp_path).get(KEYS[1]) == b"one" and DiskTier(tmp_path).find(KEYS) == KEYS[1]


class Broken(Tier):
    """Fails at everything."""

    name = "broken tier"

    def _find(self, keys: Any) -> Any:
        raise OSError("no space left on device")

    _get = _put = _delete = _find  # type: ignore[assignment]


def test_a_full_disk_or_a_lost_server_costs_a_warning() -> None:
    tier = Broken()
    store = prefix_cache(remote=tier)
    with pytest.warns(RuntimeWarning, match=f"broken tier: could not .*no space left.*for {BACK_OFF:g} seconds"):
        prefix_id = store.add_prefix(text(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and then silence
        first = store.generate_with_prefix(prefix_id, text(9, 1), max_tokens=4, do_sample=False)
        assert torch.equal(store.generate_with_prefix(prefix_id, text(9, 1), max_tokens=4, do_sample=False), first)
    assert len(store) == 1 and store.hit_rate > 0.5 and tier.failures == 1


def test_a_redis_that_goes_away_and_comes_back(redis_server: RedisServer) -> None:
    """Killed in the middle: answers go on, with one warning, and the server is used again when it is back."""
    store = prefix_cache(remote=redis_server.url)
    first = store.add_prefix(text(64))
    other = prefix_cache(remote=redis_server.url)
    assert by_store(other, text(64) + [1], steps=0)[1] == 64  # it is really in the server
    expected = other.generate_with_prefix(other.add_prefix(text(64)), [1, 2], max_tokens=3, do_sample=False)
    redis_server.kill()
    with pytest.warns(RuntimeWarning, match="redis tier redis://127.0.0.1.*going on without it") as warned:
        second = store.add_prefix(text(64, 1))
        got = store.generate_with_prefix(first, [1, 2], max_tokens=3, do_sample=False)
    assert torch.equal(got, expected) and len(store) == 2 and store.hit_rate > 0
    assert sum("going on without it" in str(one.message) for one in warned) == 1
    redis_server.start()
    (tier,) = store.store.tiers
    tier._silent_until = 0.0  # the 30 seconds are over
    store.store.persist(store.reader.origin.root, store.prefix_tokens(second))
    assert tier.failures == 1 and by_store(prefix_cache(remote=redis_server.url), text(64, 1) + [1], steps=0)[1] == 64


# -- processes ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from hf_kvcompress.prefix.disk import DiskTier
tier, number = DiskTier(sys.argv[1]), int(sys.argv[2])
for turn in range(100000):
    key = f"{number:02x}{turn:030x}"
    tier.put(key, key.encode() * 4096)
    print(key, flush=True)
"""


def _writer(folder: Path, number: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_loses_only_what_it_was_writing(tmp_path: Path) -> None:
    """Kill -9 of two processes that write to one folder: what was reported complete is there, whole."""
    complete: list[str] = []
    writers = [_writer(tmp_path, 1), _writer(tmp_path, 2)]
    for number, writer in enumerate(writers):
        assert writer.stdout is not None
        complete += [writer.stdout.readline().strip() for _ in range(20 + number)]
        writer.send_signal(signal.SIGKILL)
        complete += [line.strip() for line in writer.communicate()[0].splitlines() if len(line) == 33]
    tier = DiskTier(tmp_path)
    known = set(tier.keys())
    assert len(complete) >= 41 and set(complete) <= known
    for key in known:
        assert tier.get(key) == key.encode() * 4096  # whole, also what was complete but not yet reported
    index = sqlite3.connect(tmp_path / "index.sqlite")
    assert index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    old = tmp_path / "ab" / ".x.part"
    old.parent.mkdir(exist_ok=True)
    old.touch()
    os.utime(old, (0, 0))
    DiskTier(tmp_path)
    assert not old.exists()


def test_a_file_that_vanishes_while_the_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DiskTier(tmp_path).put(KEYS[0], b"zero")
    vanished = tmp_path / "ab" / ".x.part"  # renamed by another process between listing and looking
    monkeypatch.setattr(Path, "glob", lambda *_: [vanished])
    assert DiskTier(tmp_path).get(KEYS[0]) == b"zero"


SIZE = 300_000  # bytes of an entry: more than one write of the system
OVERWRITER = f"""
import sys
from hf_kvcompress.prefix.disk import DiskTier
tier = DiskTier(sys.argv[1], max_bytes={6 * SIZE})
print("open", flush=True)
for turn in range(100000):
    tier.put(f"{{turn % 8:032x}}", bytes([turn % 251]) * {SIZE})
"""


def test_processes_and_threads_share_a_folder(tmp_path: Path) -> None:
    """Two processes write the same names over and over, with room for six of eight; threads read whole entries only."""
    command = [sys.executable, "-c", OVERWRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    tier, torn, whole = DiskTier(tmp_path), [], []
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "open\n"

        def read(number: int) -> None:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for key in KEYS[number::2][:4]:
                    data = tier.get(key)
                    if data is not None:
                        (whole if data == data[:1] * SIZE else torn).append(data[:1])

        threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(writer.poll() is None for writer in writers), "a writer has died"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert not torn and len(set(whole)) > 5 and tier.failures == 0
    assert tier.nbytes <= 7 * SIZE  # the bound, and what a writer had just put


def test_threads_share_a_folder(tmp_path: Path) -> None:
    tier, wrong = DiskTier(tmp_path), []

    def work(number: int) -> None:
        for turn in range(30):
            key = KEYS[(number + turn) % 20]
            tier.put(key, key.encode() * 100)
            if tier.get(key) not in (key.encode() * 100, None):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and tier.failures == 0
