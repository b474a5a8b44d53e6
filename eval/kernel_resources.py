"""Registers, shared memory and spills of every kernel, from NVRTC; writes the table of docs/kernels.md.

    python eval/kernel_resources.py                      # prints the table
    python eval/kernel_resources.py docs/kernels.md      # puts it between the page's two marks

Needs no GPU, only `pip install nvidia-cuda-nvrtc nvidia-cuda-runtime` (extra "test").
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_kvcompress.ops import nvrtc, sources

SHOWN = ((8, 0), (9, 0), (10, 0))
BEGIN, END = "<!-- resources -->", "<!-- /resources -->"


def most(found: list[nvrtc.Resources]) -> nvrtc.Resources:
    """The largest of each number."""
    return nvrtc.Resources(*map(max, zip(*found, strict=True)))


def rows() -> list[str]:
    """One line a kernel but the probes: the most that any of its variants takes on each architecture."""
    lines = []
    for name in (name for name in sources.names() if not name.startswith("probes")):
        text = sources.expand(name)
        every = sources.variants(text)
        taken: dict[str, dict[tuple[int, int], nvrtc.Resources]] = {kernel: {} for kernel in sources.kernels(text)}
        for capability in (x for x in SHOWN if x >= sources.needs(text)):
            reports = [nvrtc.resources(nvrtc.compile_log(text, capability, defines)) for defines in every]
            for kernel, found in taken.items():
                found[capability] = most([report[kernel] for report in reports if kernel in report])
        for kernel, found in taken.items():
            every_arch = most(list(found.values()))
            registers = [str(found[x].registers) if x in found else "-" for x in SHOWN]
            spills = f"{every_arch.spills} B" if every_arch.spills else "none"
            cells = [f"`{name}`", f"`{kernel}`", str(len(every)), *registers, f"{every_arch.shared} B", spills]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def table() -> str:
    """Markdown."""
    version = nvrtc.version()
    assert version is not None
    head = ["source", "kernel", "variants", *map(nvrtc.architecture, SHOWN), "static shared", "spills"]
    lines = [f"NVRTC {version[0]}.{version[1]}; the most of all variants.", "", "| " + " | ".join(head) + " |"]
    return "\n".join([*lines, "|" + " --- |" * len(head), *rows()])


def main() -> None:
    """Print the table, or put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="a page with both marks")
    page = parser.parse_args().page
    if page is None:
        print(table())
        return
    text = page.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"page: expected {BEGIN} and {END} in {page}")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
