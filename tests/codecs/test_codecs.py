"""What every codec promises, whatever its family: a new one is covered without touching this file."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcompress.codecs.registry import codec_names, make_codec, parse
from hf_kvcompress.ops.numeric import LIMIT

from ..calibrated import context_for

ROLES = ("key", "value")
DIMS = (8, 20, 64, 80, 96, 112, 128, 192, 256)
#: those that need a calibration have the values of another family, and three numbers of bits stand for all
NAMES = [n for n in codec_names() if parse(n)[0] != "pca" or n in ("pca4", "pca2", "pca1.125")]
PAIRS = [(n, r) for n in NAMES for r in ROLES if r == "key" or parse(n)[0] != "pca"]
EVERY = pytest.mark.parametrize(("name", "role"), PAIRS)
#: what they store depends on this text alone: their scale is the text's own
OWN_SCALE = [n for n in NAMES if parse(n)[0] != "pca"]
FEW = settings(max_examples=10)


def make(name, role, dim, dtype=torch.float32, **lengths):
    return make_codec(name, role, dim, dtype=dtype, context=context_for(name, role, dim), **lengths)


def draw(kind, shape, dtype, seed=0):
    """Keys or values of one kind, in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    channels = torch.rand(shape[-1], generator=g, dtype=torch.float64)
    if kind == "channels":
        x = x * (channels * 8 + 0.1) + torch.randn(shape[-1], generator=g, dtype=torch.float64) * 4
    if kind == "constant":
        x = torch.full(shape, 100.3, dtype=torch.float64)
    if kind == "near constant":
        x = x * 1e-3 + 50
    if kind == "zero":
        x = torch.zeros(shape, dtype=torch.float64)
    if kind == "outlier":
        x[..., shape[-2] // 2, 0] = 3e4
    if kind == "fp16 underflow":  # steps far below float16's smallest number, beside ordinary channels
        x = x * torch.where(channels < 0.5, 1e-9, 1.0)
    if kind == "mixed scales":
        x = x * 10 ** (channels * 40 - 20)
    x = x * {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-40}.get(kind, 1.0)
    limits = torch.finfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype)


KINDS = ("normal", "channels", "constant", "near constant", "zero", "outlier", "fp16 underflow", "mixed scales")
KINDS = (*KINDS, "huge", "tiny", "subnormal")


def packed_of(codec, x, query_ms=None):
    segment = codec.begin_segment(x, query_ms)
    return {**codec.encode(x, segment), **segment}


def same(a, b):
    """Equal bytes, field by field."""
    assert a.keys() == b.keys()
    for name in a:
        left, right = (t.contiguous().view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(left, right), name


# -- what is stored ----------------------------------------------------------------------------------------------------


@EVERY
@FEW
@given(
    dim=st.sampled_from(DIMS),
    pages=st.integers(1, 5),
    page_size=st.sampled_from((8, 16, 32, 64)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_round_trip_is_within_the_declared_tolerance(name, role, dim, pages, page_size, kind, dtype, seed):
    codec = make(name, role, dim, dtype, page_size=page_size, group_size=min(64, page_size))
    x = draw(kind, (2, 1, pages * page_size, dim), dtype, seed)
    segment = codec.begin_segment(x)
    packed = {**codec.encode(x, segment), **segment}
    back = codec.decode(packed)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    assert back.isfinite().all()
    error = torch.linalg.vector_norm(back.double() - x.double(), dim=-1)
    bound = codec.tolerance(x, segment)
    assert bound.shape == error.shape
    assert (error <= bound.double()).all(), f"{(error / bound).max().item():.3f} of the tolerance"
    size = torch.linalg.vector_norm(x.double(), dim=-1).clamp(min=1e-36 * dim)
    known = ("normal",) if codec.wants_context else ("normal", "huge", "tiny")  # a calibration has levels of one size
    if kind in known and codec.nbits >= 4:
        assert (bound <= size).all(), "a bound worth declaring"


@EVERY
def test_later_tokens_keep_the_tolerance(name, role):
    """Statistics come from a segment's first pages; what follows may look unlike them."""
    codec = make(name, role, 64)
    first = draw("zero", (1, 1, 64, 64), torch.float32)
    for kind in KINDS:
        for start in (first, draw("channels", first.shape, torch.float32)):
            x, segment = draw(kind, first.shape, torch.float32, 1), codec.begin_segment(start)
            back = codec.decode({**codec.encode(x, segment), **segment})
            error = torch.linalg.vector_norm(back.double() - x.double(), dim=-1)
            assert (error <= codec.tolerance(x, segment).double()).all(), kind


@EVERY
@pytest.mark.parametrize("dim", [20, 128])
def test_bits_are_those_of_the_tensors(name, role, dim):
    codec = make(name, role, dim, torch.bfloat16)
    x = draw("normal", (2, 3, 2, 128, dim), torch.bfloat16)
    packed = packed_of(codec, x)
    assert packed.keys() == codec.fields.keys()
    for field_name, field in codec.fields.items():
        assert packed[field_name].dtype == field.dtype
        assert packed[field_name].shape == field.stored_shape((2, 3, 2), 128)
        assert packed[field_name].is_contiguous()
    stored = sum(t.numel() * t.dtype.itemsize for t in packed.values())
    assert stored * 8 == pytest.approx(codec.bits(128) * x.numel())


@pytest.mark.parametrize("role", ROLES)
def test_three_bits_take_three_bits(role):
    for family in ("int", "channel", "turbo", "eqrot"):
        codec = make(f"{family}3", role, 128)
        planes = [codec.fields[name].bits_per_token(512) for name in ("codes", "codes_low")]
        assert sum(planes) == 3 * 128
    assert make("eqrot3", role, 128).bits(512) < 3.2
    assert make("int8", role, 256).bits(512) == 8.0625


@pytest.mark.parametrize(("name", "role"), [(n, r) for n in OWN_SCALE for r in ROLES])
@FEW
@given(
    dim=st.sampled_from(DIMS[:-2]),
    rows=st.integers(1, 3),
    heads=st.integers(1, 4),
    segments=st.integers(1, 3),
    pages=st.integers(1, 5),
    data=st.data(),
)
def test_same_bytes_whatever_is_packed_beside(name, role, dim, rows, heads, segments, pages, data):
    codec = make(name, role, dim, page_size=16, group_size=16)
    x = draw("channels", (rows, heads, segments, pages * 16, dim), torch.float32, pages)
    query_ms = torch.rand(rows, heads, segments, dim, generator=torch.Generator().manual_seed(1))
    together = packed_of(codec, x, query_ms)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in (rows, heads, segments))
    alone = packed_of(codec, x[at], query_ms[at])
    same({k: v[at] for k, v in together.items()}, alone)
    assert torch.equal(codec.decode(together)[at], codec.decode(alone))
    # appended page by page: nothing that is there changes
    segment = codec.begin_segment(x[at], query_ms[at])
    parts = [codec.encode(page, segment) for page in x[at].split(16, dim=-2)]
    for field_name, field in codec.fields.items():
        if field.tokens is not None:
            axis = -1 if field.tokens_last else 0
            same({"": torch.cat([part[field_name] for part in parts], axis)}, {"": alone[field_name]})


@EVERY
def test_same_bytes_with_more_threads(name, role):
    codec = make(name, role, 80)
    x = draw("channels", (3, 2, 2, 512, 80), torch.bfloat16)
    alone, threads = packed_of(codec, x), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        same(packed_of(codec, x), alone)
    finally:
        torch.set_num_threads(threads)


@EVERY
def test_any_layout_and_no_input_is_changed(name, role):
    codec = make(name, role, 64)
    wide = draw("channels", (64, 3, 2, 128), torch.float32)
    x = wide[..., ::2].permute(1, 2, 0, 3)[:, :, :64]  # [3, 2, 64, 64], no axis in order
    before = wide.clone()
    packed = packed_of(codec, x)
    same(packed, packed_of(codec, x.contiguous()))
    kept = {k: v.clone() for k, v in packed.items()}
    strided = {k: torch.stack([v, v], 1)[:, 1] for k, v in packed.items()}
    assert torch.equal(codec.decode(strided), codec.decode(packed))
    codec.tolerance(x, {k: packed[k] for k in codec.statistics})
    same(packed, kept)
    assert torch.equal(wide, before)


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_spoils_no_other(name, role, bad):
    codec = make(name, role, 64, page_size=16, group_size=16)
    clean = draw("channels", (2, 48, 64), torch.float32)
    clean[0, 20] = 0
    x = clean.clone()
    x[0, 20, ::3] = bad
    same(codec.begin_segment(x), codec.begin_segment(clean))
    segment = codec.begin_segment(clean)
    good, spoilt = (codec.decode({**codec.encode(t, segment), **segment}) for t in (clean, x))
    keep = torch.ones(2, 48, dtype=torch.bool)
    keep[0, 20 if codec.token_wise else slice(16, 32)] = False
    assert torch.equal(good[keep], spoilt[keep])
    if codec.family != "identity":
        assert torch.equal(good, spoilt), "packed as 0"


@pytest.mark.parametrize("name", [n for n in OWN_SCALE if n != "identity"])
def test_numbers_beyond_the_limit_are_clamped(name):
    codec = make(name, "key", 64)
    x = torch.full((64, 64), 3e38)
    back = codec.decode(packed_of(codec, x))
    assert (back.double() - LIMIT).norm() <= 0.5 * torch.full_like(x, LIMIT).double().norm()


# -- use without reading back ------------------------------------------------------------------------------------------


def check_products(codec, x, rows, limit):
    """scores and mix against decode and matmul; errors relative to the vectors' lengths."""
    packed = packed_of(codec, x)
    dense = codec.decode(packed).flatten(2, 3).double()
    g = torch.Generator().manual_seed(1)
    q = torch.randn(*x.shape[:2], rows, x.shape[-1], generator=g)
    got = codec.scores(q, packed)
    assert got.dtype == torch.float32
    error = (got - q.double() @ dense.mT).abs()
    assert (error <= limit * q.norm(dim=-1).double()[..., None] * dense.norm(dim=-1).unsqueeze(-2)).all()
    p = torch.randn(*x.shape[:2], rows, dense.shape[2], generator=g).mul_(2).softmax(-1)
    summed = codec.mix(p, packed)
    got = codec.finish(summed)
    assert got.dtype == torch.float32
    error = (got - p.double() @ dense).norm(dim=-1)
    assert (error <= limit * (p.double() @ dense.norm(dim=-1).unsqueeze(-1)).squeeze(-1)).all()
    half = p.shape[-1] // 2
    cut = p.clone()
    cut[..., :half] = 0
    rest = codec.mix(p - cut, packed) + codec.mix(cut, packed)
    assert torch.allclose(codec.finish(rest).double(), p.double() @ dense, atol=2 * limit * dense.norm(dim=-1).max())


@EVERY
@settings(max_examples=6)
@given(
    dim=st.sampled_from(DIMS),
    rows=st.sampled_from((1, 4, 20)),
    segments=st.integers(1, 3),
    pages=st.integers(1, 4),
    page_size=st.sampled_from((8, 64)),
    kind=st.sampled_from(("normal", "channels", "huge", "tiny")),
)
def test_products_are_exact_in_float32(name, role, dim, rows, segments, pages, page_size, kind):
    codec = make(name, role, dim, page_size=page_size, group_size=page_size)
    x = draw(kind, (2, 2, segments, pages * page_size, dim), torch.float32)
    x = x.clamp(-1e18, 1e18)  # a product of two huge numbers overflows in any case
    check_products(codec, x, rows, 1e-5)


@EVERY
@pytest.mark.parametrize("dim", [20, 128])
@pytest.mark.parametrize(("segments", "tokens", "rows"), [(1, 512, 4), (2, 1024, 1), (3, 64, 4), (2, 64, 33)])
def test_products_in_bfloat16(name, role, dim, segments, tokens, rows):
    codec = make(name, role, dim, torch.bfloat16)
    codec.compute_dtype = torch.bfloat16
    x = draw("channels", (1, 2, segments, tokens, dim), torch.bfloat16)
    check_products(codec, x, rows, 0.01)


@EVERY
def test_products_of_slices_of_the_storage(name, role):
    """A layer keeps more room than it uses."""
    codec = make(name, role, 64)
    x = draw("channels", (2, 2, 3, 128, 64), torch.float32)
    packed = packed_of(codec, x)
    part = {k: v[:, :, :2] for k, v in packed.items()}
    own = {k: v.clone() for k, v in part.items()}
    q, p = torch.randn(2, 2, 4, 64), torch.rand(2, 2, 4, 256)
    assert torch.allclose(codec.scores(q, part), codec.scores(q, own), atol=1e-4, rtol=1e-5)
    assert torch.allclose(codec.mix(p, part), codec.mix(p, own), atol=1e-4, rtol=1e-5)


# -- quality -----------------------------------------------------------------------------------------------------------


def score_error(name, x, q, query_ms=None):
    """Error of the scores over their spread around the mean key's."""
    codec = make(name, "key", x.shape[-1])
    error = q @ (codec.decode(packed_of(codec, x, query_ms)) - x).mT
    return (error.std() / (q @ (x - x.mean(-2, keepdim=True)).mT).std()).item()


def test_equalising_pays_on_keys_with_structure():
    g = torch.Generator().manual_seed(0)
    spread, queries = torch.rand(128, generator=g) * 8 + 0.1, torch.rand(128, generator=g) * 2 + 0.1
    x = torch.randn(512, 128, generator=g) * spread + torch.randn(128, generator=g) * 8
    q = torch.randn(64, 128, generator=g) * queries
    for nbits in (4, 3, 2):
        plain = score_error(f"turbo{nbits}", x, q)
        equalised = score_error(f"eqrot{nbits}", x, q)
        informed = score_error(f"eqrot{nbits}", x, q, queries**2)
        assert informed < equalised < plain / 1.3
    assert score_error("eqrot4", x, q) < score_error("int4", x, q)


@pytest.mark.parametrize(("name", "best"), [("turbo4", 0.0095), ("turbo3", 0.0345), ("turbo2", 0.1175)])
def test_turbo_has_the_error_of_lloyd_max(name, best):
    x = draw("normal", (4096, 128), torch.float32)
    codec = make(name, "value", 128)
    error = (codec.decode(packed_of(codec, x)) - x).square().mean()
    assert error == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize(("name", "best"), [("eqrot4", 0.0115), ("eqrot3", 0.0374), ("eqrot2", 0.1188)])
def test_eqrot_has_the_error_of_uniform_codes(name, best):
    x = draw("normal", (4096, 128), torch.float32)
    codec = make(name, "key", 128)
    back = codec.decode(packed_of(codec, x))
    assert (back - x).square().mean() == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("name", ["eqrot3", "eqrot2"])
def test_values_at_few_bits_are_less_biased_than_with_their_norm_kept(name):
    """Attention averages many values: what it sees is the part of the error along the value itself."""
    x = draw("normal", (4096, 128), torch.float32)
    codec = make(name, "value", 128)
    back = codec.decode(packed_of(codec, x))
    cosine = torch.nn.functional.cosine_similarity(back, x, dim=-1)
    along = (back * x).sum(-1) / x.square().sum(-1)
    assert (along - 1).abs().mean() < 0.6 * (cosine - 1).abs().mean()


def test_more_bits_are_better():
    x = draw("channels", (256, 64), torch.float32)
    for family in ("int", "channel", "turbo", "eqrot"):
        for role in ROLES:
            codecs = [make(n, role, 64) for n in codec_names() if parse(n)[0] == family]
            errors = [(codec.decode(packed_of(codec, x)) - x).norm().item() for codec in codecs]
            assert errors == sorted(errors)


def test_identity_is_exact():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = draw("mixed scales", (2, 3, 64, 20), dtype)
        for role in ROLES:
            codec = make("identity", role, 20, dtype)
            assert torch.equal(codec.decode(packed_of(codec, x)), x.float())
            assert codec.bits(512) == dtype.itemsize * 8
