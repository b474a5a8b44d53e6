"""Kernels that quantize, pack and read back, against the codecs' torch code: the same bytes and the same numbers."""

import math

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.codecs.registry import codec_names, make_codec, parse
from hf_kvcompress.ops import kernels, quantize

from ..codecs.test_codecs import KINDS, draw, same
from ..tiny_model import tiny_llama

NAMES = [name for name in codec_names() if parse(name)[0] in ("fp", "int", "channel", "turbo", "eqrot")]
ROLES = ("key", "value")
EVERY = pytest.mark.parametrize(("name", "role"), [(n, r) for n in NAMES for r in ROLES])
#: one codec for each kernel and each branch of one
SOME = [("fp8", "key"), ("int8", "value"), ("int3", "key"), ("channel3", "key"), ("channel4", "value")]
SOME += [("turbo3", "value"), ("eqrot4", "key"), ("eqrot3", "value"), ("eqrot2", "value")]
FEW = pytest.mark.parametrize(("name", "role"), SOME)
#: head size, page size, shape of what leads to the head size, dtype
SHAPES = [
    (64, 64, (2, 3, 1, 64), torch.float16),
    (80, 32, (2, 96), torch.bfloat16),  # the odd part of the head size is 5; groups of 40
    (128, 64, (1, 1, 1, 128), torch.bfloat16),
    (256, 32, (32,), torch.float32),
    (20, 24, (2, 1, 24), torch.float32),  # bytes of keys are padded, tiles of 24 tokens
]


def make(name, role, dim, page_size=64):
    return make_codec(name, role, dim, page_size=page_size, group_size=min(64, page_size))


def both(codec, x, segment, emulator):
    """What torch packs and reads back, and what the kernels do of the same."""
    with kernels.emulate(None):
        packed = codec.encode(x, segment)
        back = codec.decode({**packed, **segment})
    before = len(emulator.launches)
    got = codec.encode(x, segment)
    assert len(emulator.launches) == before + 1, "one launch"
    again = codec.decode({**packed, **segment})
    assert len(emulator.launches) == before + 2
    return (packed, back), (got, again)


def check(codec, x, segment, emulator):
    """Same bytes, same numbers; returns the packed form."""
    (packed, back), (got, again) = both(codec, x, segment, emulator)
    same(got, packed)
    assert torch.equal(again, back)
    return got


def statistics(codec, x):
    with kernels.emulate(None):
        return codec.begin_segment(
            x, torch.rand(*x.shape[:-2], x.shape[-1], generator=torch.Generator().manual_seed(1))
        )


@EVERY
@pytest.mark.parametrize(("dim", "page", "lead", "dtype"), SHAPES, ids=lambda x: str(x) if isinstance(x, int) else "")
def test_bytes_and_numbers_are_torchs(name, role, dim, page, lead, dtype, emulated):
    codec = make(name, role, dim, page)
    x = draw("channels", (*lead, dim), dtype)
    check(codec, x, statistics(codec, x), emulated)


@FEW
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("normal", "channels", "subnormal")])
def test_odd_numbers(name, role, kind, emulated):
    codec = make(name, role, 64, 8)
    x = draw(kind, (2, 8, 64), torch.float32)
    check(codec, x, statistics(codec, x), emulated)


@FEW
def test_subnormal_numbers_may_count_as_zero(name, role, emulated):
    """The GPU flushes them; the declared tolerance allows that."""
    codec = make(name, role, 64, 8)
    x = draw("subnormal", (2, 8, 64), torch.float32)
    segment = statistics(codec, x)
    back = codec.decode({**codec.encode(x, segment), **segment})
    error = torch.linalg.vector_norm(back.double() - x.double(), dim=-1)
    assert (error <= codec.tolerance(x, segment).double()).all()


@FEW
def test_what_is_not_finite_counts_as_zero(name, role, emulated):
    codec = make(name, role, 64, 16)
    clean = draw("channels", (2, 32, 64), torch.float32)
    clean[0, 20, ::3] = 0
    x = clean.clone()
    x[0, 20, ::3] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[torch.arange(22) % 4]
    x[1, 3, 5] = clean[1, 3, 5] = -3e38  # beyond the limit
    segment = statistics(codec, clean)
    same(check(codec, x, segment, emulated), codec.encode(clean, segment))


@FEW
@pytest.mark.parametrize("pages", [1, 3])
def test_tokens_alone_have_the_same_bytes(name, role, pages, emulated):
    """Whatever rows and pages are packed beside, in one call or page by page."""
    codec = make(name, role, 96, 16)
    x = draw("channels", (3, 2, pages * 16, 96), torch.bfloat16)
    segment = statistics(codec, x)
    together = codec.encode(x, segment)
    alone_segment = {k: v[1, 1] for k, v in segment.items()}
    parts = [codec.encode(page, alone_segment) for page in x[1, 1].split(16, dim=-2)]
    for field, f in codec.fields.items():
        if f.tokens is not None:
            same({"": torch.cat([p[field] for p in parts], -1 if f.tokens_last else 0)}, {"": together[field][1, 1]})
    whole = codec.decode({**together, **segment})
    alone = codec.decode({**{k: v[1, 1] for k, v in together.items()}, **alone_segment})
    assert torch.equal(whole[1, 1], alone)


@FEW
def test_any_strides(name, role, emulated):
    codec = make(name, role, 64, 16)
    wide = draw("channels", (2, 80, 3, 128), torch.float16)
    layouts = {
        "heads after tokens, a part of the tokens": wide[:, 16:48, :, :64].transpose(1, 2),
        "a channel in two": wide[:, :32, :, ::2].transpose(1, 2),
        "axes that cannot be joined": wide[:, :32, None, :, :64].permute(2, 3, 0, 1, 4).expand(2, 3, 2, 32, 64),
        "no leading axis": wide[0, :32, 0, 64:],
        "the same row again and again": wide[:1, :32, :1, :64].transpose(1, 2).expand(2, 3, 32, 64),
    }
    for layout, x in layouts.items():
        before = x.clone()
        segment = statistics(codec, x)
        packed = check(codec, x, segment, emulated)
        with kernels.emulate(None):
            same(packed, codec.encode(x.contiguous(), segment))
        assert torch.equal(x, before), layout


@FEW
def test_reads_and_writes_parts_of_a_storage(name, role, emulated):
    """Pages in the middle of a slab: rows keep their distance, nothing beside is touched."""
    codec = make(name, role, 64, 16)
    x = draw("channels", (2, 3, 1, 32, 64), torch.bfloat16)
    segment = statistics(codec, x)
    with kernels.emulate(None):
        packed = codec.encode(x, segment)
        back = codec.decode({**packed, **segment})
    storage, parts = {}, {}
    for field, f in codec.fields.items():
        if f.tokens is None:
            continue
        shape = f.stored_shape((6,), 80)
        storage[field] = torch.full(shape, 77).to(f.dtype)
        units = slice(32 // f.tokens, 64 // f.tokens)
        parts[field] = storage[field][..., units] if f.tokens_last else storage[field][:, units]
    codec.encode_into(x, segment, parts)
    for field, part in parts.items():
        same({"": part.reshape(packed[field].shape)}, {"": packed[field]})
        part.fill_(77)
        assert (storage[field] == torch.tensor(77).to(part.dtype)).all(), "only the part was written"
    codec.encode_into(x, segment, parts)
    shaped = {k: v.unflatten(0, (2, 3, 1)) for k, v in parts.items()}
    assert torch.equal(codec.decode({**shaped, **segment}), back)


@pytest.mark.parametrize(("name", "role"), SOME)
def test_every_schedule(name, role, scheduled):
    dim = 80 if name[:5] in ("turbo", "eqrot") else 64
    codec = make(name, role, dim, 16)
    x = draw("channels", (2, 32, dim), torch.bfloat16)
    check(codec, x, statistics(codec, x), scheduled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_back_in_half_precision(dtype, emulated):
    for name in ("eqrot4", "int4", "fp8"):
        codec = make(name, "key", 64)
        x = draw("channels", (1, 2, 64, 64), dtype)
        segment = statistics(codec, x)
        packed = codec.encode(x, segment)
        assert torch.equal(codec.decode({**packed, **segment}, dtype), codec.decode({**packed, **segment}).to(dtype))


def test_shapes_beyond_shared_memory_stay_torchs(emulated):
    for name, dim, page in (("turbo4", 1024, 8), ("channel4", 512, 128), ("int4", 8192, 8)):
        codec = make(name, "key", dim, page)
        x = draw("normal", (page, dim), torch.float32)
        packed = codec.encode(x, {})
        with kernels.emulate(None):
            same(packed, codec.encode(x, {}))
    assert "encode_rotated" not in emulated.launches and "encode_channel_int" not in emulated.launches
    assert "encode_token_int" not in emulated.launches


def test_tiles_fit():
    """Every tile divides its page and takes no more shared memory than a block has."""
    for page in (8, 16, 24, 40, 64, 72, 128, 256):
        for dim in (8, 20, 64, 80, 96, 112, 128, 192, 256, 320, 512):
            for rotated, whole in ((False, False), (True, False), (False, True)):
                width = quantize.tile_width(page, dim, rotated, whole)
                assert (whole or width) and (width == 0 or page // 8 % width == 0)
                used = quantize.rotated_shared(dim, width) if rotated else quantize.codes_shared(dim, width)
                assert used <= quantize.SHARED
                assert width == 0 or whole or 8 * width <= quantize.TILE


# -- a cache, and torch.library --------------------------------------------------------------------------------------


def sealed_bytes(codec):
    """What a cache over a tiny model holds after a prompt and a few steps, and the kernels that ran."""
    model = tiny_llama()
    ids = torch.randint(0, 257, (2, 150), generator=torch.Generator().manual_seed(0))
    cache = kvc.CompressedCache(model.config, codec=codec, page_size=16, group_size=16, residual_length=16)
    model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache, pad_token_id=0)
    return {
        f"{index} {role} {name}": tensor
        for index, layer in enumerate(cache.layers)
        for number, slab in enumerate(layer.storage.pages.slabs)
        for role in ROLES
        for name, tensor in slab.packed(role).items()
    }


@pytest.mark.parametrize("codec", ["eqrot4", "kivi3"])
def test_a_cache_stores_the_same_bytes(codec, emulated):
    got = sealed_bytes(codec)
    ran = set(emulated.launches)
    assert ran >= ({"encode_rotated"} if codec == "eqrot4" else {"encode_channel_int", "encode_token_int"})
    with kernels.emulate(None):
        same(got, sealed_bytes(codec))


def test_ops_are_registered(emulated):
    """Schemas tell what is written, and fake tensors pass through."""
    x = draw("channels", (1, 2, 16, 64), torch.bfloat16)
    codes, scale, out = torch.zeros(2, 16, 64, dtype=torch.uint8), torch.zeros(2, 16).bfloat16(), torch.zeros(2, 16, 64)
    half, meta, table = codes[..., :32].clone(), scale.view(2, 1, 16), torch.arange(16.0)
    calls = [
        (quantize.encode_fp8, (x, codes, scale)),
        (quantize.decode_fp8, (codes, scale, out)),
        (quantize.encode_int, (x, half, None, meta, meta.clone(), 4, False, 16, 64, False)),
        (quantize.decode_int, (half, None, meta, meta.clone(), out, 4, False, 16, 64, False)),
        (quantize.encode_rotated, (x, *[None] * 4, half, None, scale, 4, False, 16, 0.335, 0.0)),
        (quantize.decode_rotated, (half, None, scale, None, None, table, out, 4, False, 16)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
