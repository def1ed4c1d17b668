import pytest
import torch

from drorae.losses.adversarial import (
    NUM_DRAWS,
    adaptive_weight,
    augment,
    generator_loss,
    hinge_loss,
    image_gradients,
    quantise,
    to_signed,
)
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import DiscriminatorConfig, build_discriminator

SHAPE = DecoderConfig(
    latent_channels=12, width=16, layers=2, heads=2, mlp_hidden=24, grid=4, patch_px=4
)


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws_for(images, seed=0):
    return torch.rand(len(images), NUM_DRAWS, generator=make_generator(seed))


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert hinge_loss(real, real=True).item() == pytest.approx(0.5)
    assert hinge_loss(fake, real=False).item() == pytest.approx(1.0)
    assert generator_loss(fake).item() == pytest.approx(1.0)


def test_the_adaptive_weight_is_clamped():
    one = torch.ones(2, 2)
    assert adaptive_weight(one, torch.zeros(2, 2)).item() == pytest.approx(1e4)
    assert adaptive_weight(one, 4 * one).item() == pytest.approx(0.25, rel=1e-5)
    assert adaptive_weight(torch.zeros(2, 2), one).item() == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_the_cheap_form_equals_the_definition(frozen):
    torch.manual_seed(0)
    decoder = Decoder(SHAPE).double()
    discriminator = build_discriminator(
        DiscriminatorConfig(
            source="random",
            input_px=16,
            patch_px=8,
            width=16,
            depth=2,
            heads=2,
            taps=(2, 1),
            kernel=3,
        )
    ).eval()
    tokens = torch.randn(3, 16, 12).double().requires_grad_()
    target = torch.rand(3, 3, 16, 16).double()

    def losses():
        features = decoder.features(tokens)
        images = decoder.pixels(features)
        reconstruction = (images - target).abs().mean() + (images - target).square().mean()
        adversarial = generator_loss(discriminator(to_signed(images).float())).double()
        return features, images, reconstruction, adversarial

    last = decoder.decoder_pred.weight
    _, _, reconstruction, adversarial = losses()
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    ]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)
    (reconstruction + 0.75 * weight.detach() * adversarial).backward()
    expected = [tokens.grad.clone(), last.grad.clone()]

    tokens.grad, last.grad = None, None
    decoder.requires_grad_(not frozen)
    features, images, reconstruction, adversarial = losses()
    pulls = image_gradients(images, reconstruction, adversarial)
    found = adaptive_weight(*(decoder.last_layer_gradient(features, pull) for pull in pulls))
    images.backward(pulls[0] + 0.75 * found * pulls[1])
    assert found.item() == pytest.approx(weight.item(), rel=1e-5)
    torch.testing.assert_close(tokens.grad, expected[0], rtol=1e-5, atol=1e-8)
    if frozen:
        assert last.grad is None
    else:
        torch.testing.assert_close(last.grad, expected[1], rtol=1e-5, atol=1e-8)


def test_fakes_are_rounded_to_the_values_of_8_bit_images():
    images = torch.linspace(-1.2, 1.2, 300).view(1, 3, 10, 10)
    found = quantise(images)
    codes = (found + 1) * 127.5
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert found.min() == -1
    assert found.max() == 1
    assert (found - images.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


def test_a_samples_augmentation_depends_on_its_own_draws():
    images = torch.rand(4, 3, 16, 16, generator=make_generator())
    draws = draws_for(images, 1)
    first = augment(images, draws)
    assert torch.equal(first[2:], augment(images[2:], draws[2:]))
    assert not torch.equal(first, augment(images, draws_for(images, 2)))
    for number in range(NUM_DRAWS):
        changed = draws.clone()
        changed[0, number] = 1 - changed[0, number]
        again = augment(images, changed)
        assert not torch.allclose(again[0], first[0])
        assert torch.equal(again[1:], first[1:])


def test_translation_is_at_most_an_eighth_and_brings_in_zeros():
    from drorae.losses.adversarial import _translate

    images = torch.zeros(200, 3, 16, 16)
    images[:, :, 8, 8] = 1.0
    moved = _translate(images, draws_for(images)[:, :2])
    rows, columns = (
        moved[:, 0].flatten(1).argmax(1) // 16 - 8,
        moved[:, 0].flatten(1).argmax(1) % 16 - 8,
    )
    for shifts in (rows, columns):
        assert set(shifts.tolist()) == {-2, -1, 0, 1, 2}
    border = _translate(torch.ones(50, 3, 16, 16), draws_for(range(50))[:, :2])
    assert (border == 0).any()


def test_colour_changes_stay_in_their_ranges():
    images = torch.full((500, 3, 8, 8), 0.25)
    images[:, 0] += 0.3
    images[:, 1] -= 0.3
    found = augment(images, draws_for(images))[:, :, 4, 4]
    means = found.mean(1)
    assert found.shape == (500, 3)
    spread = (found[:, 0] - found[:, 1]) / 0.6  # saturation 0..2 times contrast 0.5..1.5
    assert spread.min() >= -1e-6
    assert 1.5 < spread.max() <= 3.0
    assert means.std() > 0.1


def test_gradients_pass_through_the_augmentation():
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    augment(images, draws_for(images)).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().sum() > 0
