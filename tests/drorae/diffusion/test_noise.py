import pytest
import torch

from drorae.diffusion.noise import _scramble, sample_generator, sample_noise

SHAPE = (3, 4, 4)
PINNED = [-0.120497, -0.947278, -2.515957]


def test_a_sample_keeps_its_noise_in_any_batch():
    whole = sample_noise(7, range(10), SHAPE)
    assert torch.equal(sample_noise(7, [3], SHAPE)[0], whole[3])
    shuffled = torch.tensor([9, 0, 5])
    assert torch.equal(sample_noise(7, shuffled, SHAPE), whole[shuffled])


def test_index_seed_and_stream_each_change_the_noise():
    draws = [
        sample_noise(seed, [index], SHAPE, stream)
        for seed, index, stream in [(0, 0, "noise"), (0, 1, "noise"), (1, 0, "noise"), (0, 0, "x")]
    ]
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[:i])


def test_noise_is_standard_normal_and_uncorrelated_between_neighbours():
    noise = sample_noise(0, range(64), (1024,))
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    products = (noise[1:] * noise[:-1]).mean(dim=1)
    assert products.abs().max() < 5 / 1024**0.5


def test_draws_are_pinned():
    # Any change here changes every published sample.
    drawn = sample_noise(0, [0], (16,))[0, :3].tolist()
    assert drawn == pytest.approx(PINNED, abs=1e-6)


def test_no_two_indices_share_a_generator():
    seeds = {sample_generator(3, index).initial_seed() for index in range(20_000)}
    assert len(seeds) == 20_000


def test_scramble_is_a_bijection_on_a_sample():
    values = [*range(5000), *range(2**32 - 5000, 2**32)]
    assert len({_scramble(value) for value in values}) == len(values)


def test_no_samples_give_an_empty_batch():
    assert sample_noise(0, [], SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize("index", [-1, 2**32])
def test_index_out_of_range_is_refused(index):
    with pytest.raises(ValueError, match="out of range"):
        sample_noise(0, [index], SHAPE)
