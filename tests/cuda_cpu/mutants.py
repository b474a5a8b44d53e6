"""Kernels with a planted bug, which a test must catch."""

from hf_kvcompress.ops import kernels, sources

from . import build


def caught(run, source, after, old, new, schedules=build.SCHEDULES):
    """Whether `run()` raises under some schedule once the first `old` behind `after` in `cuda/<source>` is `new`."""
    text = (sources.folder() / source).read_text()
    assert text.count(after) == 1, f"{source} has {text.count(after)} times: {after}"
    start = text.index(old, text.index(after))
    planted = text[:start] + new + text[start + len(old) :]
    for schedule in schedules:
        emulator = build.Emulator(schedule, texts={source: planted})
        try:
            with kernels.emulate(emulator):
                run()
        except (AssertionError, build.EmulationError):
            assert emulator.launches, "the kernel did not run"
            return True
    return False
