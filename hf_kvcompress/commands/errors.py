"""How commands end: 0 done, 1 a run failed, 2 bad input, 130 interrupted; a failure is one sentence on stderr."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..harness.errors import sentence

PROGRAM = "kvcompress"
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
#: typer has click's exceptions under another roof from one version to the next
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
#: of the machine, not of what was asked for
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)


class Failed(Exception):
    """A run that was asked for rightly and did not succeed: exit code 1."""


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that needs no traceback; None for what only a programmer can understand."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, Failed | MemoryError) or isinstance(error, OSError) and error.errno in _MACHINE:
        return FAILED
    if isinstance(error, RuntimeError):
        return FAILED if "memory" in str(error).lower() else None
    return BAD_INPUT if isinstance(error, _ClickException | ValueError | OSError | ImportError) else None


class Command(TyperCommand):
    """A command whose `--json` may stand without a file, for stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        whole = list(args)
        if any("--json" in parameter.opts for parameter in self.params):
            for index in reversed([index for index, word in enumerate(args) if word == "--json"]):
                following = args[index + 1 : index + 2]
                if not following or following[0].startswith("-") and following[0] != "-":
                    whole.insert(index + 1, "-")
        return super().parse_args(ctx, whole)


class Group(TyperGroup):
    """All commands, which end in one way."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        extra = {**extra, "prog_name": PROGRAM, "standalone_mode": False}
        try:
            code = super().main(words or ["--help"], **extra)
            if code == INTERRUPTED:  # newer typers say no more of it
                raise KeyboardInterrupt
        except (Exception, KeyboardInterrupt) as error:
            code = exit_code(error)
            if code is None:
                raise
            name = next((word for word in words if not word.startswith("-")), None)
            program = f"{PROGRAM} {name}" if name in self.commands else PROGRAM
            text = error.format_message() if isinstance(error, _ClickException) else sentence(error)
            line = "interrupted" if code == INTERRUPTED else " ".join(text.split())
            print(f"{program}: {line}", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)
