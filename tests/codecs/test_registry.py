"""Codecs by name, and the errors for names and arguments that are wrong."""

import pytest
import torch

from hf_kvcompress.codecs.registry import codec_names, make_codec, parse

from .test_codecs import ROLES, make


def test_names():
    expected = "identity fp8 int8 int4 int3 int2 channel8 channel4 channel3 channel2 kivi8 kivi4 kivi3 kivi2"
    expected += " turbo4 turbo3 turbo2 eqrot4 eqrot3 eqrot2 haar4 haar3 haar2"
    expected += " pca4 pca3 pca2.5 pca2 pca1.5 pca1.125 pca1"
    assert codec_names() == expected.split()
    assert parse("eqrot4") == ("eqrot", 4)
    assert parse("identity") == ("identity", 0)
    assert [make("kivi4", role, 64).name for role in ROLES] == ["channel4", "int4"]
    assert [make("eqrot4", role, 64).wants_queries for role in ROLES] == [True, False]
    for name in codec_names():
        if not name.startswith("kivi"):
            assert make(name, "key", 64).name == name
    assert [make(name, "value", 64).name for name in ("pca4", "pca1.5")] == ["eqrot4", "eqrot2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eqrott4", r"codec: expected one of identity, fp8, .*; got 'eqrott4'; nearest: 'eqrot4'"),
        ("Int4", r"codec: expected one of .*; got 'Int4'; nearest: 'int4'"),
        ("eqrot8", r"codec: expected 4 or 3 or 2 bits for family 'eqrot', got 8 bits in 'eqrot8'; nearest: 'eqrot\d'"),
        ("int5", r"codec: expected 8 or 4 or 3 or 2 bits for family 'int', got 5 bits in 'int5'; nearest: 'int\d'"),
        ("turbo", r"codec: expected 4 or 3 or 2 bits for family 'turbo', got no bits in 'turbo'; nearest: 'turbo\d'"),
        ("identity4", r"codec: expected no bits for family 'identity', got 4 bits in 'identity4'; nearest: 'identity'"),
        ("", r"codec: expected one of .*; got ''"),
        (4, r"codec: expected a name such as 'eqrot4', got 4"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        make_codec(name, "key", 64)
    with pytest.raises(ValueError, match=message.replace("codec:", "keys:")):
        parse(name, argument="keys")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("int4", {"role": "keys"}, "role: expected 'key' or 'value', got 'keys'"),
        ("int4", {"dim": 0}, "dim: expected a positive whole number, got 0"),
        ("int4", {"group_size": 0}, "group_size: expected a positive whole number, got 0"),
        ("eqrot4", {"group_size": -64}, "group_size: expected a positive whole number, got -64"),
        ("int4", {"group_size": 1.5}, "group_size: expected a positive whole number, got 1.5"),
        ("channel4", {"group_size": 48}, "group_size: expected a divisor of page_size=64 for channel4, got 48"),
        ("kivi4", {"group_size": 128}, "group_size: expected a divisor of page_size=64 for channel4, got 128"),
        ("int4", {"page_size": 12}, "page_size: expected a multiple of 8, got 12"),
        ("int4", {"page_size": True}, "page_size: expected a positive whole number, got True"),
        ("identity", {"dtype": torch.int8}, "dtype: expected a floating point torch.dtype, got torch.int8"),
    ],
)
def test_bad_arguments(name, change, message):
    arguments = {"role": "key", "dim": 64, **change}
    with pytest.raises(ValueError, match=message):
        make_codec(name, **arguments)


@pytest.mark.parametrize("shape", [(63, 64), (0, 64), (64, 32)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \[..., T, 64\] with T a multiple of page_size=64, got"):
        make("int4", "key", 64).encode(torch.zeros(shape), {})


@pytest.mark.parametrize(
    ("dim", "group_size", "expected"),
    [(128, 64, 64), (80, 64, 40), (20, 64, 20), (112, 64, 56), (67, 64, 67), (96, 32, 32), (64, 8, 8), (256, 300, 256)],
)
def test_groups_along_the_head(dim, group_size, expected):
    codec = make("int4", "value", dim, group_size=group_size)
    assert codec.group_size == expected
    assert make("int8", "value", dim, group_size=group_size).group_size == dim
