"""`TransformCache`: what is calibrated, what is refused, what is stored."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, DynamicCache
from typer.testing import CliRunner

import hf_kvcompress as kvc
from hf_kvcompress import cli
from hf_kvcompress.calibrating import _levels
from hf_kvcompress.calibration import Calibration, share_bits
from hf_kvcompress.codecs.channel_bits import bytes_of, part_table
from hf_kvcompress.codecs.registry import make_codec
from hf_kvcompress.ops import native

from .calibrated import Words, calibration_for, calibration_of, context_for, text_for
from .conformance.factories import SMALL, TIGHT
from .conformance.generation import MODES
from .conformance.helpers import BY_NAME
from .conformance.prompts import text_ids
from .tiny_model import save_tiny


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].model


@pytest.fixture(scope="module")
def calibration(model):
    return calibration_for(model.config)


@pytest.fixture
def file(calibration, tmp_path):
    path = tmp_path / "llama.safetensors"
    calibration.save(path)
    return path


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_file_holds_what_was_learned(calibration, file):
    read = Calibration.open(file)
    assert read.config == calibration.config
    for layer, own in calibration.layers.items():
        for part, tensor in own.items():
            assert torch.equal(read.layers[layer][part], tensor)
    assert read.nbytes == calibration.nbytes < file.stat().st_size
    assert copy.deepcopy(read) is read and pickle.loads(pickle.dumps(read)).fingerprint == read.fingerprint


def test_a_fingerprint_is_of_every_number_and_of_what_it_is_for(calibration, file):
    assert Calibration.open(file).fingerprint == calibration.fingerprint
    layers = {layer: dict(own) for layer, own in calibration.layers.items()}
    layers[2]["mean"] = layers[2]["mean"].clone()
    layers[2]["mean"][0, 0] += 0.25
    other = replace(calibration.config, rotated=True)
    changed = Calibration(calibration.config, layers), Calibration(other, calibration.layers)
    assert len({calibration.fingerprint, *(one.fingerprint for one in changed)}) == 3


def test_a_file_is_read_once_and_anew_when_it_changes(calibration, file):
    read = Calibration.open(file)
    assert Calibration.open(str(file)) is read and read.path == str(file)
    layers = {layer: {**own, "mean": own["mean"] + 1} for layer, own in calibration.layers.items()}
    other = Calibration(calibration.config, layers)
    other.save(file)
    assert Calibration.open(file).fingerprint == other.fingerprint != read.fingerprint


def test_the_basis_has_an_inverse(calibration):
    for own in calibration.layers.values():
        product = own["to"].double() @ own["back"].double()
        torch.testing.assert_close(product, torch.eye(product.shape[-1]).double().expand_as(product), atol=4e-3, rtol=0)
        assert (own["loss"].diff(dim=-1) <= 1e-3).all()  # more bits, less loss


def test_levels_are_those_of_lloyd_and_max():
    z = torch.randn(1, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels, loss = _levels(z, torch.full((200_000,), 1 / 200_000, dtype=torch.float64))
    known = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]).double()
    torch.testing.assert_close(levels[0, 2:6], known, atol=0.02, rtol=0)
    expected = torch.tensor([1.0, 0.3634, 0.1175, 0.0345]).double()
    torch.testing.assert_close(loss[0, :4], expected, atol=0.01, rtol=0)


def test_weighed_tokens_count_more():
    z = torch.tensor([[-1.0, 0.0, 1.0, 9.0]], dtype=torch.float64)
    levels, _ = _levels(z, torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64))
    torch.testing.assert_close(levels[0, :2], torch.tensor([0.0, 9.0], dtype=torch.float64))


def test_bits_go_where_they_take_most_away():
    loss = torch.tensor([16.0, 4.0, 1.0, 0.01])[:, None] * 0.25 ** torch.arange(7)
    assert share_bits(loss, 6) == [3, 2, 1, 0]
    assert sum(share_bits(loss, 100)) == 24


@pytest.mark.parametrize("change", ["model_type", "num_layers", "head size", "version", "format", "dtype", "missing"])
def test_a_file_for_something_else_is_refused(model, file, tmp_path, change):
    config, other = model.config, tmp_path / "other.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    messages = {
        "model_type": "expected a calibration of model type 'qwen3', got one of 'llama'",
        "num_layers": "expected a calibration of 2 layers, got one of 3",
        "head size": "expected 2 key-value heads of size 16 in layer 0, got 2 of size 8",
        "version": "expected format version 1, got 2 in other.safetensors",
        "format": "expected a file of format 'kvcompress-calibration'",
        "dtype": "expected tensors of dtype torch.float16, got torch.float32",
        "missing": "expected tensor layers.0.loss, got none",
    }
    if change in ("version", "format"):
        header[change] = "2"
    if change == "dtype":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if change == "missing":
        del tensors["layers.0.loss"]
    if change == "model_type":
        config = BY_NAME["qwen3"].model.config
    if change == "num_layers":
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": 2})
    if change == "head size":
        config = type(config)(**{**config.to_dict(), "head_dim": 16})
    save_file(tensors, other, metadata=header)
    with pytest.raises(ValueError, match="calibration: " + messages[change]):
        kvc.TransformCache(config, calibration=other)


def test_another_rotation_is_refused(model, file):
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": None, "rope_theta": 5e5})
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="calibration: expected the rotation .* in layer 0, got "):
        kvc.TransformCache(config, calibration=file)


def test_what_is_missing_is_named(model, calibration, tmp_path):
    with pytest.raises(ValueError, match=r"calibration: expected a file .* for codec 'pca2', got None"):
        kvc.TransformCache(model.config)
    with pytest.raises(ValueError, match="config: expected the model's config, which codec 'pca2' needs"):
        kvc.TransformCache(calibration=calibration)
    with pytest.raises(ValueError, match="which is no file"):
        kvc.TransformCache(model.config, calibration=tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="calibration: expected a safetensors file"):
        kvc.TransformCache(model.config, calibration=tmp_path / "text")
    with pytest.raises(ValueError, match="bits: expected one of 1.6, 1.75, 2, 2.5, 3, 4, got 5"):
        kvc.TransformCache(model.config, calibration=calibration, bits=5)
    with pytest.raises(ValueError, match="codec: expected 'pca2' in a cache that has a config and a calibration"):
        make_codec("pca2", "key", 8).decode({"codes": torch.zeros(1, 2, 8, dtype=torch.uint8)})


def test_calibrating_refuses_what_it_cannot_do(model):
    with pytest.raises(ValueError, match="latent attention"):
        calibration_of(BY_NAME["deepseek_v3"].model)
    with pytest.raises(ValueError, match="expected a decoder"):
        calibration_of(BY_NAME["t5"].model)
    with pytest.raises(ValueError, match="texts: expected at least 384 tokens in text 0, got 50"):
        kvc.calibrate(model, [text_for(50)], Words(), tokens=384, length=96)
    with pytest.raises(ValueError, match="texts: expected one text or more in a list, got 'a string'"):
        kvc.calibrate(model, text_for(50), Words())


def test_the_command_writes_a_file_that_a_cache_takes(tmp_path):
    folder, out, text = save_tiny(tmp_path / "model"), tmp_path / "out.safetensors", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    sizes = ["--tokens", "512", "--length", "128"]
    arguments = ["calibrate", "--model", str(folder), "--output", str(out), "--text", str(text), *sizes]
    result = CliRunner().invoke(cli.build(), arguments)
    assert result.exit_code == 0, result.output
    assert "from 512 tokens" in result.output and "kvc.TransformCache(model.config, calibration=" in result.output
    kvc.TransformCache(AutoConfig.from_pretrained(folder), calibration=out, bits=1.6)
    bad = CliRunner().invoke(cli.build(), [*arguments, "--tokens", "99999999"])
    assert bad.exit_code == 2 and "kvcompress calibrate: texts: expected at least" in bad.output


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", [4, 2.5, 1.125, 1])
@pytest.mark.parametrize("dim", [8, 20, 96])
def test_bytes_of_a_token(dim, nbits):
    context = context_for("pca2", "key", dim)
    codec = make_codec(f"pca{nbits:g}", "key", dim, page_size=8, context=context)
    x = torch.randn(2, 3, 1, 16, dim, generator=torch.Generator().manual_seed(1))
    segment = codec.begin_segment(x)
    packed = {**codec.encode(x, segment), **segment}
    assert packed["codes"].shape == (2, 3, 1, bytes_of(dim, nbits), 16)
    assert bytes_of(dim, nbits) == max(int(dim * nbits) // 8, 1)
    # a head, a row and a token by itself are the same
    for row, head in ((0, 0), (1, 2)):
        own = {name: t[row, head] for name, t in segment.items()}
        alone = codec.encode(x[row, head], own)["codes"]
        assert torch.equal(alone, packed["codes"][row, head])
        assert torch.equal(codec.encode(x[row, head][:, 8:], own)["codes"], alone[..., 8:])
        torch.testing.assert_close(codec.decode({"codes": alone, **own}), codec.decode(packed)[row, head])
    error = (codec.decode(packed) - x).square().mean() / x.square().mean()
    assert error < 1.15 * 0.36 ** (nbits - 0.5 if nbits < 2 else nbits / 1.3)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "cohere2", "phi3", "gpt_oss", "gemma3"])
def test_scores_are_those_of_the_decoded_keys(name, half, monkeypatch):
    """Partners in halves and side by side, channels that do not turn, yarn's factor, positions far from 0."""
    model = BY_NAME[name].model
    cache = kvc.TransformCache(model.config, calibration=calibration_for(model.config), **SMALL)
    with kvc.enable(model), torch.no_grad():
        model(text_ids(1, 60), past_key_values=cache)
    turning = [x.storage.pages for x in cache.packed_layers() if x.storage.pages.codecs["key"].wants_positions]
    for pages in turning:
        codec, slab = pages.codecs["key"], pages.slabs[0]
        monkeypatch.setattr(codec, "compute_dtype", torch.bfloat16 if half else torch.float32)
        packed = pages.packed("key", slab)
        assert packed["at"][0] == pages.first + slab.start
        packed["at"] = packed["at"] + 1000
        q = torch.randn(1, 2 * pages.heads, 3, codec.dim)[:, : pages.heads]
        expected = q @ codec.decode(packed).flatten(2, 3).mT
        close = {"rtol": 0, "atol": 0.02 * float(expected.abs().max())} if half else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(codec.scores(q, packed), expected, **close)
        apart = {**packed, "at": packed["at"].expand(1, pages.heads, 1, -1)}  # as in a layer that evicts
        torch.testing.assert_close(codec.scores(q, apart), expected, rtol=1e-4, atol=1e-4)
    assert turning


@pytest.mark.parametrize("nbits", [4, 2.5, 1.125])
def test_the_library_reads_what_torch_reads(nbits):
    if native.library() is None:
        pytest.skip(native.why_not())
    codec = make_codec(f"pca{nbits:g}", "key", 24, page_size=8, context=context_for("pca2", "key", 24))
    x = torch.randn(1, 3, 1, 200, 24, generator=torch.Generator().manual_seed(1))
    segment = codec.begin_segment(x)
    packed = {**codec.encode(x, segment), **segment}
    frame = codec._frame(x.device)
    levels, parts = frame.levels.bfloat16(), part_table(frame.bits)
    for _, _, numbers, heads, _ in codec._numbers(packed):
        for head, expected in zip(heads.tolist(), numbers, strict=True):
            codes, out = packed["codes"][0, head, 0], torch.empty(130, len(expected), dtype=torch.bfloat16)
            native.channel_numbers(codes[:, 70:], parts, levels[head], out)
            assert torch.equal(out, expected.mT[70:].bfloat16())


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, {"policy": "h2o", "budget": TIGHT}, {"policy": "snapkv", "budget": TIGHT}])
def test_more_bits_come_closer(model, calibration, policy):
    ids = torch.randint(3, 90, (1, 90), generator=torch.Generator().manual_seed(7))
    errors = []
    with kvc.enable(model), torch.no_grad():
        exact = kvc.CompressedCache(model.config, codec="identity", **SMALL, **policy)
        model(ids[:, :70], past_key_values=exact)
        wanted = model(ids[:, 70:], past_key_values=exact).logits
        for keys in ("pca4", "pca2", "pca1"):
            own = {"keys": keys, "values": "identity", "calibration": calibration}
            cache = kvc.CompressedCache(model.config, **own, **SMALL, **policy)
            model(ids[:, :70], past_key_values=cache)
            errors.append(float((model(ids[:, 70:], past_key_values=cache).logits - wanted).square().mean()))
    assert errors[0] < errors[1] < errors[2]


def test_a_calibration_of_rotated_keys_serves_unknown_rotations():
    model = BY_NAME["qwen2_5_vl"].model
    with pytest.raises(ValueError, match="M-RoPE"):
        calibration_of(model)
    cache = kvc.TransformCache(model.config, calibration=calibration_of(model, rotated=True), **SMALL)
    with kvc.enable(model), torch.no_grad():
        model(text_ids(1, 60), past_key_values=cache)
    storage = cache.layers[0].storage
    codec, packed = storage.pages.codecs["key"], storage.pages.packed("key", storage.pages.slabs[0])
    assert not codec.wants_positions and "at" not in packed
    q = torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(codec.scores(q, packed), q @ codec.decode(packed).flatten(2, 3).mT)


def test_copies_and_pickles(model, calibration, file):
    entry = BY_NAME["llama"]
    with kvc.enable(model):
        whole = MODES["token_loop"](entry, model, lambda: kvc.TransformCache(model.config, calibration=file, **SMALL))
        assert whole.logits.isfinite().all()
        cache = kvc.TransformCache(model.config, calibration=file, **SMALL)
        ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            model(ids, past_key_values=cache)
            copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
            expected = model(ids[:, :9], past_key_values=cache).logits
            for other in copies:
                assert torch.equal(model(ids[:, :9], past_key_values=other).logits, expected)


def test_the_calibration_is_not_the_cache_s(model, calibration):
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(7))
    own = {"calibration": calibration, "values": "identity", **SMALL}
    cache, dense = kvc.TransformCache(model.config, **own), DynamicCache(config=model.config)
    with kvc.enable(model), torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=dense)
        before = cache.nbytes
        model(ids[:, :1], past_key_values=cache)
    assert cache.nbytes == before, "what reading prepares belongs to the calibration"
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.storage.tensors())
    assert cache.nbytes == held
