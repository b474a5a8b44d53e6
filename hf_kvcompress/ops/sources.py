"""Text of the kernels in `cuda/`, and what each source says of itself in its first comment.

// needs: sm_80                        the oldest architecture it compiles for; sm_75 without the line
// variants: BITS=2,3,4 DTYPE=1,2      macros that it is launched with, every combination; several lines add up
// spills: 16                          bytes a thread that may be spilled to memory; 0 without the line
// fmad: off                           products and sums stay two operations, so that results equal torch's
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path

OLDEST = (7, 5)  # compute capability
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # cupy adds them by itself
INCLUDE = re.compile(r'^\s*#include "([\w.]+)"\s*$')
MARK = re.compile(r"^// (needs|variants|spills|fmad): (.+)$", re.MULTILINE)
MACRO = re.compile(r"(\w+)=(-?\d+(?:,-?\d+)*)")
BOUNDS = r"(?:__launch_bounds__\([^)]*\)\s*)?"
KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(')
NEEDED = re.compile(r"sm_(\d+)(\d)")


def folder() -> Path:
    """Where the sources are: `cuda/` beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside, beside = package / "cuda", package.parent / "cuda"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Files that hold kernels."""
    return sorted(path.name for path in folder().glob("*.cu"))


@cache
def expand(source: str) -> str:
    """Text of `cuda/<source>` with our own headers put in once each: cupy's disk cache does not look into headers."""
    path = folder() / source
    if not path.is_file():
        raise ValueError(f"source: expected a file of {path.parent}, got {source!r}")
    return inlined(path.read_text(), source)


def inlined(text: str, source: str) -> str:
    """As `expand`, for a text of one's own that is called `source` in messages of compilers."""
    return _inlined(text, source, {source})


def _inlined(text: str, source: str, seen: set[str]) -> str:
    lines = [f'#line 1 "{source}"']
    for number, line in enumerate(text.splitlines(), 1):
        found = INCLUDE.match(line)
        if found is None:
            lines.append("" if line.strip() == "#pragma once" else line)
        elif found[1] in seen:
            lines.append("")
        else:
            seen.add(found[1])
            path = folder() / found[1]
            if not path.is_file():
                raise ValueError(f"{source}:{number}: expected a file of {path.parent}, got {found[1]!r}")
            lines += [_inlined(path.read_text(), found[1], seen), f'#line {number + 1} "{source}"']
    return "\n".join(lines)


def kernels(text: str) -> list[str]:
    """Names of the kernels in a source."""
    return KERNEL.findall(text)


def marks(text: str, name: str) -> list[str]:
    """What the lines `// <name>: ...` of a source say."""
    return [found[2].strip() for found in MARK.finditer(text) if found[1] == name]


def fused_multiply_add(text: str) -> bool:
    """Whether the compiler may fuse a product and a sum: not where the source says `// fmad: off`."""
    return "off" not in marks(text, "fmad")


def needs(text: str) -> tuple[int, int]:
    """The oldest compute capability that a source compiles for."""
    found = marks(text, "needs")
    if not found:
        return OLDEST
    match = NEEDED.fullmatch(found[0])
    if match is None:
        raise ValueError(f"needs: expected sm_ and a number, got {found[0]!r}")
    return int(match[1]), int(match[2])


def variants(text: str) -> list[dict[str, int]]:
    """Sets of macros that the kernels of a source are launched with; one empty set if it takes none."""
    every: list[dict[str, int]] = []
    for line in marks(text, "variants"):
        macros = [MACRO.fullmatch(part) for part in line.split()]
        if None in macros:
            raise ValueError(f"variants: expected NAME=1,2 separated by spaces, got {line!r}")
        lists = [[(m[1], int(value)) for value in m[2].split(",")] for m in macros if m is not None]
        every += [dict(chosen) for chosen in itertools.product(*lists)]
    return every or [{}]


def options(text: str, defines: dict[str, int]) -> tuple[str, ...]:
    """Options for a source, without the architecture, the folders of CUDA's headers and CUPY_OPTIONS."""
    flags = ["-std=c++17"]
    if not fused_multiply_add(text):
        flags.append("--fmad=false")
    return (*flags, *(f"-D{name}={value}" for name, value in sorted(defines.items())))
