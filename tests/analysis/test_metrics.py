"""Metrics against scipy, scikit-learn and definitions written out, on random data."""

import numpy as np
import pytest
import torch

from hf_kvcompress.analysis.across_layers import linear_cka
from hf_kvcompress.analysis.channels import channel_statistics, entropy, ranks
from hf_kvcompress.analysis.distributions import EDGES, beyond, histogram, share_at_least, summary
from hf_kvcompress.analysis.heads import duplicates
from hf_kvcompress.analysis.metrics import METRICS, Pages, Scale, codes, compare, jaccard_tokens

T, D, P = 8, 16, 12
PAIRS = torch.tensor([(a, b) for a in range(P) for b in range(a)])


@pytest.fixture
def numbers():
    """Tokens with a mean and channels of unequal size."""
    return torch.randn(P * T, D) * torch.linspace(0.2, 3, D) + torch.linspace(-2, 2, D)


@pytest.fixture
def pages(numbers):
    return Pages.of(numbers.unflatten(0, (-1, T)), Scale.of(numbers))


def rows(pages, index):
    return pages[PAIRS[:, index]].flatten(1).double().numpy()


def test_distances_are_those_of_scipy(numbers, pages):
    distance = pytest.importorskip("scipy.spatial.distance", reason="scipy is not installed")
    found = compare(pages, PAIRS)
    assert tuple(found) == METRICS
    raw = numbers.unflatten(0, (-1, T))
    centred = raw - numbers.mean(0)
    for i in range(len(PAIRS)):
        x, y = rows(centred, 0)[i], rows(centred, 1)[i]
        assert found["cosine"][i] == pytest.approx(1 - distance.cosine(x, y), abs=1e-5)
        assert found["relative_l2"][i] == pytest.approx(distance.euclidean(x, y) / np.linalg.norm(x), rel=1e-5)
        assert found["raw_cosine"][i] == pytest.approx(1 - distance.cosine(rows(raw, 0)[i], rows(raw, 1)[i]), abs=1e-5)
        assert found["hamming_signs"][i] == pytest.approx(distance.hamming(x >= 0, y >= 0))
        a, b = (pages.codes[PAIRS[i, j]].numpy() for j in (0, 1))
        assert found["hamming_codes"][i] == pytest.approx(distance.hamming(a, b))
        a, b = (pages.channels[PAIRS[i, j]].numpy() for j in (0, 1))
        assert found["jaccard_channels"][i] == pytest.approx(1 - distance.jaccard(a, b))


def test_sets_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for _ in range(20):
        a, b = torch.randint(40, (2, 32)).tolist()
        flags = [[token in own for token in range(40)] for own in (set(a), set(b))]
        assert jaccard_tokens(a, b) == pytest.approx(metrics.jaccard_score(*flags))


def test_the_largest_channels_are_those_with_the_largest_mean_magnitude(numbers, pages):
    centred = (numbers - numbers.mean(0)).unflatten(0, (-1, T))
    expected = torch.zeros(P, D, dtype=torch.bool)
    for page in range(P):
        for channel in np.argsort(-centred[page].abs().mean(0).numpy())[: D // 8]:
            expected[page, channel] = True
    assert torch.equal(pages.channels, expected)


def test_other_pages_may_be_compared_with(numbers):
    scale = Scale.of(numbers)
    cut = numbers.unflatten(0, (-1, T))
    both = torch.cat([cut, cut.roll(1, 0)])
    found = compare(Pages.of(cut, scale), torch.tensor([[0, 1], [3, 5]]), Pages.of(cut.roll(1, 0), scale))
    expected = compare(Pages.of(both, scale), torch.tensor([[0, P + 1], [3, P + 5]]))
    for name in METRICS:
        torch.testing.assert_close(found[name], expected[name])
    assert found["cosine"][0] == pytest.approx(1.0)


def test_codes_are_uniform_and_keep_the_shape_of_a_normal():
    x = torch.randn(4096, 64) * torch.linspace(0.01, 30, 64) + 5
    own = codes(x, Scale.of(x))
    assert own.dtype == torch.uint8 and int(own.max()) == 15 and int(own.min()) == 0
    # a unit normal in steps of 0.335
    edges = torch.tensor([-torch.inf, *(0.335 * torch.arange(-7, 8)).tolist(), torch.inf])
    expected = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff()
    shares = torch.bincount(own.flatten().int(), minlength=16) / own.numel()
    torch.testing.assert_close(shares, expected, atol=0.004, rtol=0)


def test_entropy_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    own = torch.randint(11, (5000,)).square().clamp(max=15).to(torch.uint8)
    counts = np.bincount(own.numpy(), minlength=16)
    assert entropy(own) == pytest.approx(stats.entropy(counts, base=2))
    assert entropy(torch.zeros(10, dtype=torch.uint8)) == 0


def test_effective_rank_follows_from_the_eigenvalues():
    x = torch.randn(500, 12) @ torch.randn(12, 12)
    p = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    p = p / p.sum()
    found = ranks(x)
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["rank_90"] == int(np.argmax(np.cumsum(p) >= 0.9)) + 1
    flat = ranks(torch.randn(400, 3) @ torch.eye(3, 12))
    assert 2.5 < flat["effective_rank"] <= 3.001 and flat["rank_90"] <= 3
    assert ranks(torch.ones(5, 4)) == {"effective_rank": 0.0, "rank_90": 0}


def test_outlier_channels_are_named():
    x = torch.randn(600, 32)
    x[:, 7] *= 20
    x[:, 3] += 9
    found = channel_statistics(x, Scale.of(x))
    assert found["largest"][:2] == [7, 3] and found["outlier_channels"] == 2
    assert found["outlier_ratio"] == pytest.approx(20, rel=0.1)
    energy = x.square().mean(0).sum()
    assert found["mean_energy"] == pytest.approx(float(x.mean(0).square().sum() / energy), rel=1e-4)


def test_cka_is_one_for_rotated_spaces_and_small_for_unrelated_ones():
    x = torch.randn(400, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, torch.randn(400, 8)) < 0.1
    y = torch.randn(400, 5)
    a, b = (t.double().numpy() - t.double().numpy().mean(0) for t in (x, y))
    kernels = a @ a.T, b @ b.T
    expected = (kernels[0] * kernels[1]).sum() / (np.linalg.norm(kernels[0]) * np.linalg.norm(kernels[1]))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_summaries_are_those_of_numpy():
    values = torch.randn(1000)
    found = summary(torch.cat([values, torch.tensor([torch.inf, torch.nan])]))
    own = values.double().numpy()
    assert found["n"] == 1000 and found["mean"] == pytest.approx(own.mean(), rel=1e-4)
    assert found["std"] == pytest.approx(own.std(), rel=1e-4)
    for name, at in (("p05", 5), ("p50", 50), ("p99", 99)):
        assert found[name] == pytest.approx(np.percentile(own, at), rel=1e-4)
    assert summary(torch.empty(0)) == {"n": 0}
    counts = histogram(values.clamp(-1, 1))
    assert counts.tolist() == np.histogram(np.clip(own, -1, 1), EDGES)[0].tolist()


def test_beyond_the_baseline_is_one_percent_of_the_baseline_itself():
    baseline = torch.randn(10_000)
    assert beyond(baseline, baseline) == pytest.approx(0.01, abs=0.001)
    assert beyond(baseline + 10, baseline) == 1
    assert beyond(torch.empty(0), baseline) is None
    assert share_at_least(torch.tensor([0.5, 0.9, 0.95]), (0.9,), of=4) == {"0.9": 0.5}


def test_duplicates_are_exact_and_not_merely_similar():
    pages = torch.randn(5, 4, 8)
    pages[2] = pages[0]
    pages[4] = pages[0] + 1e-6
    assert duplicates(pages).tolist() == [False, False, True, False, False]
