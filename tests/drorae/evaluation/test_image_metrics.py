import pytest
import torch

from drorae.evaluation.image_metrics import (
    lpips_per_image,
    psnr_per_image,
    ssim_per_image,
    to_uint8,
)


def random_pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 256, (3, 3, 32, 24), generator=generator)
    second = first + torch.randint(-40, 40, first.shape, generator=generator)
    return first.to(torch.uint8), second.clamp(0, 255).to(torch.uint8)


def test_bytes_are_truncated_and_clamped() -> None:
    values = torch.tensor([-0.5, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, 0].tolist() == [0, 0, 254, 255, 255]


def test_psnr_of_a_known_error() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    gray = torch.full_like(black, 51)  # an error of .2 everywhere: 10 log10(1 / .04)
    torch.testing.assert_close(
        psnr_per_image(black, gray), torch.full((2,), 13.9794), atol=1e-3, rtol=0
    )


def test_psnr_of_identical_images_is_100_db() -> None:
    first, _ = random_pair()
    torch.testing.assert_close(psnr_per_image(first, first), torch.full((3,), 100.0))


def test_ssim_equals_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    first, second = random_pair()
    expected = functional.structural_similarity_index_measure(
        first.float() / 255, second.float() / 255, data_range=1.0, reduction="none"
    )
    # Both sum 121 float32 products in another order.
    torch.testing.assert_close(ssim_per_image(first, second), expected, atol=2e-5, rtol=0)


def test_ssim_of_identical_images_is_one() -> None:
    first, _ = random_pair()
    torch.testing.assert_close(ssim_per_image(first, first), torch.ones(3))


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    small = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim_per_image(small, small)


def test_images_of_different_shape_are_refused() -> None:
    first, second = random_pair()
    with pytest.raises((ValueError, TypeError), match=r"equal shapes|batch=3"):
        psnr_per_image(first, second[:2])


def test_lpips_gets_images_in_unit_range_and_gives_one_value_each() -> None:
    first, second = random_pair()

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.max() <= 1.0
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    values = lpips_per_image(first, second, distance)
    assert values.shape == (3,)
    assert (values > 0).all()
