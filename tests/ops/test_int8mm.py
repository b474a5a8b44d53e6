"""Readers and products with packed codes."""

import pytest
import torch

from hf_kvcompress.ops.int8mm import Scratch, TableReader, key_product, uniform_readers, value_product
from hf_kvcompress.ops.packing import pack

CPU = torch.device("cpu")


def stored(nbits, rows, pages, page):
    """Signed codes `[rows, pages * page]` and their planes `[rows, bytes]`, each page packed by itself."""
    codes = torch.randint(0, 2**nbits, (rows, pages, page), dtype=torch.uint8)
    planes = [plane.flatten(1) for plane in pack(codes ^ 2 ** (nbits - 1), nbits)]
    return codes.flatten(1).float() - 2 ** (nbits - 1), planes


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize(("pages", "page"), [(1, 24), (1, 128), (3, 8), (2, 64)])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_uniform_readers_give_code_plus_offset(nbits, pages, page, offset):
    codes, planes = stored(nbits, 6, pages, page)
    x = torch.randint(-8, 9, (5, pages * page)).float()
    total = torch.zeros(5, 6)
    for reader in uniform_readers(nbits, offset, page):
        operand = reader.arrange(x)
        total += operand @ reader.read(planes, Scratch(CPU)).float().T
        correction = reader.correct(operand)
        total += 0 if correction is None else correction[:, None]
    assert torch.equal(total, x @ (codes + offset).T), "small whole numbers: exact"


@pytest.mark.parametrize(("pages", "page"), [(1, 24), (1, 128), (3, 8), (2, 64)])
@pytest.mark.parametrize("nbits", [4, 3, 2])
def test_table_reader_looks_codes_up(nbits, pages, page):
    codes, planes = stored(nbits, 6, pages, page)
    table = torch.randint(-127, 128, (2**nbits,))
    reader = TableReader(nbits, tuple(table.tolist()), 0.5, page)
    x = torch.randint(-8, 9, (5, pages * page)).float()
    numbers = table[codes.long() % 2**nbits].float()
    assert torch.equal(reader.arrange(x) @ reader.read(planes, Scratch(CPU)).float().T, x @ (numbers * 0.5).T)
    assert reader.correct(x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 24, 128])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 512), (4, 513), (4, 40), (33, 600)])
def test_products(dtype, width, rows, tokens):
    """Widths that are no multiple of 16 must not reach torch's int8 kernel, which reads past the rows' ends."""
    codes = torch.randint(-128, 128, (2, 3, tokens, width), dtype=torch.int8)
    x = torch.randn(2, 3, rows, width).to(dtype)
    exact = (x.double() @ codes.double().mT).transpose(1, 2).flatten(2)
    got = key_product(x, codes, Scratch(CPU))
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= limit * exact.abs().max()
    values = codes.mT.contiguous()
    p = torch.rand(2, 3, rows, tokens).to(dtype)
    exact = (p.double() @ codes.double()).transpose(1, 2).flatten(2)
    got = value_product(p, values, Scratch(CPU))
    assert (got - exact).abs().max() <= limit * exact.abs().max()


def test_scratch_is_used_again():
    scratch = Scratch(CPU)
    first = scratch.take("a", (3, 5), torch.int8)
    assert scratch.take("a", (2, 2), torch.float32).data_ptr() == first.data_ptr()
    assert scratch.take("b", (3, 5), torch.int8).data_ptr() != first.data_ptr()
