import torch

from drorae.losses.reconstruction import l1_per_image


def test_every_image_has_its_own_mean_absolute_difference():
    targets = torch.zeros(2, 3, 4, 4)
    images = targets.clone()
    images[1] -= 2.0
    assert l1_per_image(images, targets).tolist() == [0.0, 2.0]
