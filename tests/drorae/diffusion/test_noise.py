import hashlib

import numpy as np
import pytest
import torch

from drorae.diffusion.noise import noise, uniform

SHAPE = (3, 4, 4)
LARGEST_ID = 2**63 - 1
PINNED_NOISE = {
    0: [0.327174, -1.535294, 0.274401],
    5: [-1.716626, -0.301504, 0.782757],
    LARGEST_ID: [-1.280140, -0.716971, -0.334571],
}


def philox_words(key: int, count: int) -> np.ndarray:
    """The first 32-bit words of Philox 4x32-10, written out from its paper."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    zeros = np.zeros(count, np.uint64)
    a, b, c, d = np.arange(count, dtype=np.uint64), zeros, zeros, zeros
    for step in range(10):
        low = np.uint64((key + step * 0x9E3779B9) & 0xFFFFFFFF)
        high = np.uint64(((key >> 32) + step * 0xBB67AE85) & 0xFFFFFFFF)
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> shift) ^ b ^ low, second & mask, (first >> shift) ^ d ^ high, first
        d &= mask
    return np.stack([a, b, c, d], axis=1).reshape(-1)


@pytest.mark.parametrize(("seed", "stream", "index"), [(0, "a", 0), (7, "b", 12345), (-1, "", 9)])
def test_uniform_numbers_are_the_low_bits_of_philox(seed, stream, index):
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    key = (int.from_bytes(digest[:8], "little") + index) % 2**64
    expected = (philox_words(key, 5) & np.uint64(0xFFFFFF)).astype(np.float64) / 2**24
    drawn = uniform(seed, stream, [index], (20,))[0]
    assert drawn.double().tolist() == expected.tolist()


def test_normal_numbers_are_box_muller_of_the_uniform_ones():
    radius, angle = uniform(3, "x", [8, 9], (2, 10)).double().unbind(1)
    radius, angle = (-2 * (1 - radius).log()).sqrt(), 2 * torch.pi * angle
    expected = torch.cat([radius * angle.sin(), radius * angle.cos()], 1)
    torch.testing.assert_close(
        noise(3, "x", [8, 9], (4, 5)).double().flatten(1), expected, rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("draw", [noise, uniform])
@pytest.mark.parametrize("trial", range(20))
def test_a_sample_keeps_its_numbers_in_any_batch(draw, trial):
    generator = np.random.default_rng(trial)
    ids = generator.integers(0, LARGEST_ID, size=generator.integers(1, 13), endpoint=True)
    for cut in {0, 1, len(ids) // 2, len(ids)}:
        whole = draw(7, "s", ids, SHAPE)
        parts = [draw(7, "s", part, SHAPE) for part in (ids[:cut], ids[cut:])]
        assert torch.equal(whole, torch.cat(parts))
        alone = draw(7, "s", torch.tensor([ids[-1]]), SHAPE)[0]
        assert torch.equal(alone, whole[-1])


def test_draws_are_pinned():
    # Any change here changes every published sample.
    for index, expected in PINNED_NOISE.items():
        assert noise(0, "noise", [index], (16,))[0, [0, 1, 8]].tolist() == pytest.approx(
            expected, abs=1e-6
        )


@pytest.mark.parametrize(
    "ids", [range(0, 64), range(10**12, 10**12 + 64), range(0, 64 << 32, 1 << 32)]
)
def test_noise_is_standard_normal(ids):
    drawn = noise(0, "moments", ids, (20_000,)).double().flatten()
    count = len(drawn)
    # Five standard errors of each moment of a standard normal.
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(drawn.pow(power).mean() - expected) < 5 * (variance / count) ** 0.5
    assert drawn.abs().max() > 4.5


def test_uniform_numbers_fill_their_range_evenly():
    drawn = uniform(0, "even", range(100), (10_000,)).double().flatten()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, bins=1000, min=0, max=1)
    expected = len(drawn) / 1000
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 999) < 5 * (2 * 999) ** 0.5
    distance = (
        (drawn.sort().values - torch.linspace(0, 1, len(drawn), dtype=torch.float64)).abs().max()
    )
    assert distance * len(drawn) ** 0.5 < 2.0  # Kolmogorov: exceeded once in 1,500


def test_the_lowest_bits_are_fair():
    low = (uniform(0, "bits", range(64), (4096,)).flatten() * 2**24).to(torch.int64)
    for bit in range(24):
        ones = (low >> bit & 1).double().mean()
        assert abs(ones - 0.5) < 5 * 0.5 / len(low) ** 0.5


def rows(by: str) -> torch.Tensor:
    """Rows of draws that differ in one argument only."""
    size = (2048,)
    if by == "id":
        return noise(0, "a", range(96), size)
    if by == "seed":
        return torch.cat([noise(seed, "a", [0], size) for seed in range(96)])
    if by == "stream":
        return torch.cat([noise(0, f"a/{n}", [0], size) for n in range(96)])
    return torch.cat([noise(0, "a", [1 << bit], size) for bit in range(63)])


@pytest.mark.parametrize("by", ["id", "seed", "stream", "bit of the id"])
def test_neighbouring_draws_are_uncorrelated(by):
    drawn = rows(by).double()
    count = drawn.shape[1]
    for values in (drawn, drawn.square() - 1):
        normal = values / values.std()
        products = normal @ normal.T / count
        products -= torch.diag(products.diag())
        # Five standard errors: among 4,560 pairs one is larger in 400 runs.
        assert products.abs().max() < 5 / count**0.5


def test_places_within_a_sample_are_uncorrelated():
    drawn = noise(0, "places", range(8), (4096,)).double()
    for lag in (1, 2, 3, 4, 8, 64, 2048):
        product = (drawn[:, lag:] * drawn[:, :-lag]).mean()
        assert abs(product) < 5 / drawn[:, lag:].numel() ** 0.5


def test_no_two_of_many_ids_share_their_numbers():
    ids = torch.cat([torch.arange(100_000), torch.arange(100_000) << 40])
    drawn = torch.unique(uniform(1, "many", ids, (4,)), dim=0)
    assert len(drawn) == 200_000 - 1  # id 0 stands in both halves


def test_an_odd_number_of_values_is_drawn():
    assert torch.equal(noise(0, "a", [4], (5,))[0, :3], noise(0, "a", [4], (6,))[0, :3])
    assert noise(0, "a", [4], ()).shape == (1,)


def test_no_samples_give_an_empty_batch():
    assert noise(0, "a", [], SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    "ids",
    [[-1], torch.tensor([3, -5]), [0.5], torch.tensor([1], dtype=torch.int32), np.array([[1]])],
)
def test_wrong_ids_are_refused(ids):
    with pytest.raises(ValueError, match="expected"):
        noise(0, "a", ids, SHAPE)


def test_nothing_is_read_back_from_the_device():
    # Reading a value of the meta device is an error.
    drawn = noise(0, "a", torch.arange(4), SHAPE, torch.device("meta"))
    assert drawn.shape == (4, *SHAPE)
    assert drawn.device.type == "meta"


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_numbers():
    ids, cuda = torch.arange(1000, 1064), torch.device("cuda")
    assert torch.equal(uniform(0, "a", ids, (999,), cuda).cpu(), uniform(0, "a", ids, (999,)))
    here, there = noise(0, "a", ids, (768, 8, 8)), noise(0, "a", ids.cuda(), (768, 8, 8), cuda)
    # Angles up to 2 pi are rounded by up to 2.4e-7, times a radius of up to 5.8.
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=3e-6)
