"""Tiers that many machines share: a Redis server, or any place that fsspec reaches."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from ..config import expect
from .tiers import Tier

SPACE = "hf_kvcompress:"
LARGEST = 512 * 2**20  # bytes that Redis takes in one value


class RedisTier(Tier):
    """Entries as values of a Redis or Valkey server.

    Args:
        url: `redis://host:port/number`.
        seconds: how long an entry lives after its last use; None leaves that to the server.
        timeout: seconds to wait for the server before going on without it.
    """

    def __init__(self, url: str, seconds: int | None = None, timeout: float = 5.0):
        super().__init__()
        try:
            import redis
        except ImportError:
            raise ImportError("a redis:// tier needs the redis package: pip install 'hf_kvcompress[redis]'") from None
        self.name, self.seconds = f"redis tier {url.rsplit('@', 1)[-1]}", seconds
        self.errors = (redis.RedisError, OSError)
        self._client = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)

    def _find(self, keys: Sequence[str]) -> str | None:
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.exists(SPACE + key)
        return next((key for key, there in zip(keys, pipe.execute(), strict=True) if there), None)

    def _get(self, key: str) -> bytes | None:
        data = self._client.get(SPACE + key)
        if data is not None and self.seconds is not None:
            self._client.expire(SPACE + key, self.seconds)
        return data  # type: ignore[return-value]

    def _put(self, key: str, data: bytes) -> None:
        if len(data) > LARGEST:
            raise OSError(f"an entry of {len(data):,} bytes is more than Redis takes in one value")
        self._client.set(SPACE + key, data, ex=self.seconds)

    def _delete(self, key: str) -> None:
        self._client.delete(SPACE + key)

    def close(self) -> None:
        self._client.close()


class FileSystemTier(Tier):
    """Entries as files under a URL that fsspec knows: s3://, gs://, az://, nfs and so on."""

    errors = (Exception,)  # every file system of fsspec has its own

    def __init__(self, url: str):
        super().__init__()
        try:
            import fsspec
        except ImportError:
            raise ImportError(f"a tier at {url} needs fsspec: pip install 'hf_kvcompress[fsspec]'") from None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except ValueError as error:
            raise expect("tier", "a path, a redis:// URL or one that fsspec knows", url) from error
        self.name = f"file system tier {url}"

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key}.safetensors"

    def _find(self, keys: Sequence[str]) -> str | None:
        return next((key for key in keys if self._fs.exists(self._path(key))), None)

    def _get(self, key: str) -> bytes | None:
        try:
            return self._fs.cat_file(self._path(key))
        except FileNotFoundError:
            return None

    def _put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if getattr(self._fs, "local_file", False) or "file" in self._fs.protocol:  # object stores are atomic themselves
            part = f"{path}.{uuid.uuid4().hex}.part"
            self._fs.pipe_file(part, data)
            self._fs.mv(part, path)
        else:
            self._fs.pipe_file(path, data)

    def _delete(self, key: str) -> None:
        if self._fs.exists(self._path(key)):
            self._fs.rm_file(self._path(key))
