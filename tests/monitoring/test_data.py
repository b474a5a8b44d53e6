"""What is written, read back and shown."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import hf_kvcompress as kvc
from hf_kvcompress.monitoring import Report, files, read
from hf_kvcompress.monitoring.live import html_of, sparkline, table_of

from .helpers import compressed, generate, model, prompt


@pytest.fixture
def recorded(tmp_path, every_pass):
    """A monitor that has ended, and its folder."""
    own = model()
    cache = compressed(own)
    with kvc.enable(own), kvc.monitor(cache, model=own, output_dir=tmp_path / "data") as seen:
        generate(own, cache, 12, ids=prompt(48).repeat(1, 3))
    return seen, tmp_path / "data"


def test_what_is_written_is_read_back(recorded):
    seen, folder = recorded
    again = read(folder)
    assert again.steps == seen.recording.steps and again.events == seen.recording.events
    for lane, series in seen.recording.masses.items():
        for a, b in zip(series, again.masses[lane], strict=True):
            assert (a.step, a.seen, a.time) == (b.step, b.seen, b.time)
            assert torch.equal(a.mass, b.mass) and torch.equal(a.held, b.held)
    assert {lane: sorted(pages) for lane, pages in again.pages.items()} == {
        lane: sorted(pages) for lane, pages in seen.recording.pages.items()
    }
    before, after = seen.report().to_dict(), Report(again).to_dict()
    after["header"].pop("format")
    assert after == before
    written = json.loads((folder / files.REPORT).read_text())
    assert written == json.loads(json.dumps(before)) and written["schema"] == 1 and written["header"]["passes"] >= 12


def test_header_and_snapshots(recorded):
    seen, folder = recorded
    header = json.loads((folder / files.HEADER).read_text())
    assert header["format"] == 1 and header["cache"] == "CompressedCache" and header["page_size"] == 8
    assert header["versions"]["torch"] and header["settings"]["share"] == 0.05
    steps = [json.loads(line) for line in (folder / files.STEPS).read_text().splitlines()]
    assert steps[-1]["nbytes"] > 0 and steps[-1]["seen"] == 48 * 3 + 11
    (file,) = (folder / files.FOLDER).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        contents = [name for name in tensors.keys() if name.endswith(".keys")]  # noqa: SIM118
        assert contents and all(tensors.get_tensor(name).shape[1:] == (8, 16) for name in contents)
        assert all(len(tensors.get_tensor(name)) <= 8 for name in contents)


def test_a_killed_process_leaves_what_was_written(recorded):
    _, folder = recorded
    whole = read(folder)
    (folder / files.REPORT).unlink()
    with open(folder / files.STEPS, "a") as lines:
        lines.write('{"step": 99, "se')
    assert read(folder).steps == whole.steps
    file = next((folder / files.FOLDER).iterdir())
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="expected a whole file"):
        read(folder)


def test_another_format_is_refused(recorded):
    _, folder = recorded
    header = json.loads((folder / files.HEADER).read_text())
    (folder / files.HEADER).write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(ValueError, match="expected a recording of format 1"):
        read(folder)


def test_a_crop_is_read_back_as_it_was(tmp_path, every_pass):
    own = model()
    cache = compressed(own, codec="identity")
    with kvc.enable(own), kvc.monitor(cache, output_dir=tmp_path / "data") as seen:
        generate(own, cache, 4, ids=prompt(64))
        cache.crop(-40)
        own(prompt(24, seed=9), past_key_values=cache)
        own(prompt(1), past_key_values=cache)
    again = read(tmp_path / "data")
    for lane, series in seen.recording.masses.items():
        assert [len(mass.mass) for mass in series] == [len(mass.mass) for mass in again.masses[lane]]
    for lane, pages in seen.recording.pages.items():
        for number, page in pages.items():
            assert torch.equal(page["value_norm"], again.pages[lane][number]["value_norm"])


def test_a_disk_that_refuses_ends_the_writing_only(tmp_path, every_pass, monkeypatch):
    def refuses(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Writer, "tick", refuses)
    own = model()
    cache = compressed(own)
    with kvc.enable(own), kvc.monitor(cache, output_dir=tmp_path / "data") as seen:
        generate(own, cache)
    assert len(seen.recording.steps) == 16 and seen.recording.masses
    assert "No space left on device" in " ".join(seen.report().notes())


def test_the_disk_limit_holds(tmp_path, every_pass):
    own = model()
    cache = compressed(own)
    with kvc.enable(own), kvc.monitor(cache, output_dir=tmp_path / "data", max_disk_bytes=20_000) as seen:
        generate(own, cache)
    data = sum(f.stat().st_size for f in (tmp_path / "data").rglob("*") if f.is_file() and f.name != files.REPORT)
    assert data <= 20_000 + 2000 and seen.recording.masses
    assert (tmp_path / "data" / files.REPORT).is_file()


def test_shown_in_a_terminal_and_a_notebook(recorded):
    seen, _ = recorded
    out = Console(file=io.StringIO(), width=110, force_terminal=False)
    out.print(table_of(seen.recording, "title"))
    out.print(seen)
    text = out.file.getvalue()
    assert "attention, first page to last" in text and "page" in text and "hottest" in text
    assert text.count("CompressedCache: 155 tokens seen") == 1
    assert seen._repr_html_().count("<tr>") == 5 and "<td>" in html_of(seen.recording)
    assert sparkline(torch.tensor([1.0, 0.0, 0.25, 0.01]), 8) == "█ ▄▁"
    assert len(sparkline(torch.full((100,), 0.01), 32)) == 32


def test_live(every_pass):
    own = model()
    cache = compressed(own)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with kvc.enable(own), kvc.monitor(cache) as seen:
        seen.live(console)
        generate(own, cache, 6)
    shown = console.file.getvalue()
    assert "tokens seen" in shown and "layer" in shown and "the monitor takes" in shown


def test_live_in_a_notebook(monkeypatch, every_pass):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html.data)

    monkeypatch.setattr(display, "display", lambda html, display_id: Handle())
    own = model()
    cache = compressed(own)
    with kvc.enable(own), kvc.monitor(cache) as seen:
        seen.live(Console(file=io.StringIO(), force_jupyter=True))
        generate(own, cache, 4)
    assert "<table>" in shown[-1] and "tokens seen" in shown[-1]


def test_data_frames(recorded):
    pytest.importorskip("pandas", reason="pandas is not installed")
    seen, _ = recorded
    assert list(seen.to_pandas().columns[:3]) == ["step", "time", "seen"]
    attention = seen.to_pandas("attention")
    sums = attention.groupby(["layer", "head", "step"]).mass.sum()
    assert sums.between(0.999, 1.001).all() and set(attention.layer) == {0, 1}
    alike = seen.to_pandas("alike")
    assert len(alike) == len(seen.report().alike) > 0 and alike.cosine.between(0.85, 1.01).all()
    with pytest.raises(ValueError, match="what: expected 'steps', 'attention' or 'alike', got 'pages'"):
        seen.to_pandas("pages")


def test_figures(recorded, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    seen, _ = recorded
    figure = seen.plot()
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    for axes in figure.axes[:4]:
        assert axes.get_title() and (axes.get_xlabel() or not axes.get_xticks().size)
    with pytest.raises(ValueError, match="lane: expected one of"):
        seen.plot(lane=(9, 9))


def test_a_figure_of_nothing():
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = kvc.monitor(compressed(model())).plot()
    figure.canvas.draw()
    assert "nothing was captured" in [text.get_text() for text in figure.axes[0].texts]
