"""The compiled products give what decoding and multiplying gives, and what the torch code gives without them."""

import pytest
import torch

from hf_kvcompress.codecs.registry import codec_class, codec_names, make_codec
from hf_kvcompress.ops import native

# products of codecs that need a calibration are no business of this library
NAMES = [n for n in codec_names() if n != "identity" and not codec_class(n, "key").wants_context]
needs_compiler = pytest.mark.skipif(native.library() is None, reason=f"no compiled library: {native.why_not()}")


def packed(codec, tokens):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 1, tokens, codec.dim, generator=generator) * 2 + 0.5
    segment = codec.begin_segment(x)
    return {**segment, **codec.encode(x, segment)}


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("dim, page", [(64, 32), (128, 64), (80, 8), (256, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_the_torch_code(name, dim, page, rows, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    for role in ("key", "value"):
        codec = make_codec(name, role, dim, page_size=page, group_size=page)
        codec.compute_dtype = torch.float32
        stored = packed(codec, 5 * page)
        inner = dim if role == "key" else 5 * page
        x = torch.randn(2, 3, rows, inner, generator=generator)
        product = codec.scores if role == "key" else codec.mix
        monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "auto")
        compiled = product(x, stored)
        monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "torch")
        reference = product(x, stored)
        torch.testing.assert_close(compiled, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@needs_compiler
def test_a_row_does_not_depend_on_the_rows_beside_it():
    codec = make_codec("eqrot4", "key", 64)
    stored = packed(codec, 256)
    x = torch.randn(2, 3, 4, 64)
    alone = codec.scores(x[1:], {name: t[1:] for name, t in stored.items()})
    assert torch.equal(codec.scores(x, stored)[1:], alone)


def test_without_a_compiler_the_reason_is_told_and_torch_is_used(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library.cache_clear()
    native._build.cache_clear()
    try:
        assert native.library() is None
        assert "no-such-compiler" in native.why_not()
        codec = make_codec("eqrot4", "key", 64)
        codec.compute_dtype = torch.float32
        stored = packed(codec, 64)
        x = torch.randn(2, 3, 4, 64)
        torch.testing.assert_close(
            codec.scores(x, stored), x @ codec.decode(stored).flatten(2, 3).mT, rtol=1e-4, atol=1e-3
        )
    finally:
        native.library.cache_clear()
        native._build.cache_clear()


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("HF_KVCOMPRESS_BACKEND", "metal")
    with pytest.raises(ValueError, match="HF_KVCOMPRESS_BACKEND: expected one of auto, torch, cuda, got 'metal'"):
        native.backend()


def test_loading_it_leaves_subnormal_numbers_alone():
    native.library()
    assert float(torch.tensor(1e-40) * 1.0) > 0 and 1e-310 * 1.0 > 0
