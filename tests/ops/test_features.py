"""What pages are like, and which are alike."""

import pytest
import torch

from hf_kvcompress.ops.features import nearest, nearest_signs, page_features, pair_sums, sign_bits


def pages_of(count, tokens=16, dim=32, seed=0):
    return torch.randn(count, tokens, dim, generator=torch.Generator().manual_seed(seed))


def test_features_are_what_they_are_called():
    pages = pages_of(5) + torch.arange(32)
    features = page_features(pages, sketch=48)
    torch.testing.assert_close(features.mean, pages.mean(1))
    torch.testing.assert_close(features.std, pages.std(1, unbiased=False))
    torch.testing.assert_close(features.norm, pages.flatten(1).norm(dim=1))
    assert features.sketch.shape == (5, 48) and features.all.shape == (5, 2 * 32 + 1 + 48)


def test_sketches_estimate_inner_products():
    """Without bias over seeds, and with the spread that S sums leave: about |x| |y| / sqrt(S)."""
    pages = pages_of(2)
    pages[1] = 0.6 * pages[0] + 0.8 * pages[1]
    pages[:, :, 3] *= 8  # a channel that outweighs the rest
    exact = (pages[0] * pages[1]).sum()
    sketches = [page_features(pages, 64, seed).sketch for seed in range(200)]
    found = torch.stack([(sketch[0] * sketch[1]).sum() for sketch in sketches])
    size = pages[0].norm() * pages[1].norm()
    assert (found.mean() - exact).abs() < 0.03 * size
    assert found.std() < 2 * size / 64**0.5


def test_seeds_and_places_matter():
    pages = pages_of(2)
    pages[1] = pages[0].flip(0)  # the same tokens in another order
    first, other = (page_features(pages, 64, seed).sketch for seed in (0, 1))
    assert not torch.equal(first, other)
    assert torch.cosine_similarity(first[0], first[1], dim=0).abs() < 0.6


def test_nearest_rows_by_cosine():
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    rows[7] = 0
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).mT
    for earlier in (False, True):
        values, found = nearest(rows, 4, earlier=earlier)
        for i in range(50):
            able = [j for j in range(50) if (j < i if earlier else j != i)]
            best = sorted(able, key=lambda j: (-float(cosines[i, j]), j))[:4]
            assert found[i].tolist() == best + [-1] * (4 - len(best))
            assert (values[i, len(best) :] == -torch.inf).all()
    values, found = nearest(rows[:3], 2, pool=rows)
    assert found[:, 0].tolist() == [0, 1, 2] and torch.allclose(values[:, 0], torch.ones(3))


def test_the_reference_goes_block_by_block(monkeypatch):
    monkeypatch.setattr("hf_kvcompress.ops.features._NUMBERS", 1 << 10)
    pages, pairs = pages_of(9), torch.tensor([[0, 1], [3, 8], [2, 2]])
    whole = page_features(pages), nearest(pages[:, 0], 3), pair_sums(pages, pairs)
    monkeypatch.setattr("hf_kvcompress.ops.features._NUMBERS", 1 << 24)
    again = page_features(pages), nearest(pages[:, 0], 3), pair_sums(pages, pairs)
    torch.testing.assert_close(whole[0].all, again[0].all)
    assert torch.equal(whole[1][1], again[1][1]) and torch.equal(whole[2].distance, again[2].distance)


@pytest.mark.parametrize("bits", [1, 32, 70])
def test_nearest_signs_by_the_bits_that_differ(bits):
    numbers = torch.randn(30, bits, generator=torch.Generator().manual_seed(0))
    signs = sign_bits(numbers)
    assert signs.shape == (30, 4 * -(-bits // 32))
    apart = ((numbers >= 0)[:, None] != (numbers >= 0)).sum(-1)
    distances, found = nearest_signs(signs, 3)
    for i in range(30):
        best = sorted((j for j in range(30) if j != i), key=lambda j: (int(apart[i, j]), j))[:3]
        assert found[i].tolist() == best and distances[i].tolist() == apart[i, best].tolist()
    assert nearest_signs(signs, 2, earlier=True)[0][0].tolist() == [-1, -1]


def test_pairs_are_compared_exactly():
    pages = pages_of(4)
    pages[1], pages[3] = pages[0], 0
    found = pair_sums(pages, torch.tensor([[0, 1], [0, 2], [3, 3], [3, 0], [0, 3]]))
    x, y = pages[0].flatten(), pages[2].flatten()
    cosine = float(torch.cosine_similarity(x, y, dim=0))
    torch.testing.assert_close(found.cosine, torch.tensor([1.0, cosine, 0, 0, 0]))
    assert found.relative_l2.tolist()[:1] == [0] and found.relative_l2[2] == 0
    torch.testing.assert_close(found.relative_l2[1], (x - y).norm() / x.norm())
    assert found.relative_l2[3] == torch.inf and found.relative_l2[4] == 1


def test_what_is_not_finite_counts_as_zero():
    pages = pages_of(2)
    pages[0, 0, 0] = 0
    odd = pages.clone()
    odd[0, 0, 0] = torch.nan
    assert torch.equal(page_features(odd).all, page_features(pages).all)
    pairs = torch.tensor([[0, 1]])
    assert torch.equal(pair_sums(odd, pairs).product, pair_sums(pages, pairs).product)


def test_errors_name_the_argument():
    rows = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="k: expected 1 to 16, got 17"):
        nearest(rows, 17)
    with pytest.raises(ValueError, match="pool: expected 4 columns, got 3"):
        nearest(rows, 1, pool=rows[:, :3])
    with pytest.raises(ValueError, match="earlier: expected False with a pool"):
        nearest(rows, 1, pool=rows, earlier=True)
    with pytest.raises(ValueError, match=r"signs: expected \[Q, 4 \* n\] uint8, got \[3, 4\] torch.float32"):
        nearest_signs(rows, 1)
    with pytest.raises(ValueError, match=r"pages: expected \[P, T, D\] float32, float16 or bfloat16, got \[3, 4\]"):
        page_features(rows)
    with pytest.raises(ValueError, match=r"pairs: expected \[M, 2\] int64, got \[2\]"):
        pair_sums(rows[None], torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"others: expected pages like \[1, 3, 4\], got \[1, 4, 3\]"):
        pair_sums(rows[None], torch.zeros(1, 2, dtype=torch.long), rows.t()[None])
