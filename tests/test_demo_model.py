"""The demo model is converted once, and never half."""

from pathlib import Path

import pytest
import torch

from hf_kvcompress import calibrating
from hf_kvcompress.calibrating import calibration_of_keys
from hf_kvcompress.calibration import Calibration
from hf_kvcompress.integrations import demo_model as module
from hf_kvcompress.scoring import calibration_texts

from .tiny_model import tiny_llama


@pytest.fixture(autouse=True)
def extra_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())


def convert(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")


def test_demo_model_is_converted_once(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(module, "_convert", convert)
    folder = module.demo_model(lines.append)
    assert folder == tmp_path / "hf_kvcompress" / "gemma-3-270m-1"
    assert len(lines) == 1
    monkeypatch.setattr(module, "_convert", lambda *paths: pytest.fail("converted again"))
    assert module.demo_model(lines.append) == folder
    assert len(lines) == 1


def test_demo_model_leaves_nothing_when_it_is_cut_off(monkeypatch, tmp_path):
    def broken(source, target):
        convert(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        module.demo_model()
    assert list((tmp_path / "hf_kvcompress").iterdir()) == []


def test_demo_model_takes_the_folder_of_a_faster_process(monkeypatch, tmp_path):
    folder = tmp_path / "hf_kvcompress" / "gemma-3-270m-1"

    def slower(source, target):
        convert(source, target)
        convert(source, folder)
        (folder / "config.json").write_text("first")

    monkeypatch.setattr(module, "_convert", slower)
    assert module.demo_model() == folder
    assert (folder / "config.json").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_demo_model_refuses_a_tokenizer_that_lost_its_merges():
    with pytest.raises(ImportError, match="transformers 5.23 or newer"):
        module._check_tokenizer(lambda text: {"input_ids": list(range(len(text)))})
    module._check_tokenizer(lambda text: {"input_ids": text.split()})


def test_the_demo_model_is_calibrated_once(monkeypatch):
    config = tiny_llama().config
    made, seen = calibration_of_keys(config, torch.randn(256, config.head_dim)), []

    def calibrate(model, texts, tokenizer, on_progress=None):
        seen.append(texts)
        return made

    monkeypatch.setattr(calibrating, "calibrate", calibrate)
    file = module.demo_calibration("model", "tokenizer")
    assert module.demo_calibration("model", "tokenizer") == file and seen == [calibration_texts()]
    assert Calibration.open(file).fingerprint == made.fingerprint
    assert list(file.parent.iterdir()) == [file], "nothing half written is left"
