"""A real Redis server on a free port of this machine, with nothing kept on disk."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("redis-server", "valkey-server")
ATTEMPTS = 5  # at a free port, which another process may take first


def installed() -> str | None:
    """A server beside this Python, where `make test` puts one, or of the system."""
    beside = Path(sys.executable).parent
    return next(
        (found for name in NAMES for found in (shutil.which(name, path=beside), shutil.which(name)) if found), None
    )


class RedisServer:
    """Starts as a context; `kill` and `start` do what a crash and a restart do."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="redis-")
        self.port = 0
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """At the port it had, or at a free one. Raises RuntimeError if no server comes up."""
        name = installed()
        assert name is not None, "ask installed() first"
        for _ in range(ATTEMPTS):
            port = self.port or _free_port()
            options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
            command = [name, *options, "--dir", self.folder.name]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if _answers(port, self.process):
                self.port = port
                return
            self.kill()
        raise RuntimeError(f"{name} did not come up")

    def kill(self) -> None:
        """At once, as kill -9 does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.folder.cleanup()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answers(port: int, process: subprocess.Popen) -> bool:
    for _ in range(200):
        if process.poll() is not None:
            return False
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                probe.sendall(b"PING\r\n")
                return probe.recv(7) == b"+PONG\r\n"
        time.sleep(0.05)
    return False
