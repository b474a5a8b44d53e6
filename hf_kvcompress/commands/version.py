"""`kvcompress --version`: of the package and of what it runs on."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..environment import versions


def _print(wanted: bool) -> None:
    if wanted:
        found = versions()
        on = ", ".join(f"{name} {found[name]}" for name in ("transformers", "torch", "python"))
        print(f"kvcompress {__version__} ({on})")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print, is_eager=True, help="Show versions and end.")
    ] = False,
) -> None:
    """Compressed key-value caches for transformers."""
