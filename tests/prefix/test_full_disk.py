"""A disk that is really full: a file system of one megabyte, or a limit of file sizes, for a process of its own."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SIZE_KB = 1024
MOUNT = f"mount -t tmpfs -o size={SIZE_KB}k none $0 && exec $1 -m tests.prefix.full_disk $0 full"


def _run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _may_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(tried, capture_output=True).returncode == 0


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    """No space left for a file, then none for the index, then room again."""
    if not _may_mount(tmp_path):
        pytest.skip("this process may not mount a small file system")
    out = _run("unshare", "-Urm", "sh", "-c", MOUNT, str(tmp_path), sys.executable)
    assert "No space left on device" in out and out.endswith("all right\n")


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """Writing stops in the midst of a file."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    out = _run(sys.executable, "-m", "tests.prefix.full_disk", str(tmp_path), "limited", preexec_fn=limit)
    assert "File too large" in out and out.endswith("all right\n")
    assert not list(tmp_path.rglob("*.part"))
