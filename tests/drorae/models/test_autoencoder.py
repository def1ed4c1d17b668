import pytest
import torch

from drorae.models.autoencoder import (
    Autoencoder,
    add_latent_noise,
    denormalise_latent,
    draw_noise_scale,
    map_to_tokens,
    normalise_latent,
    tokens_to_map,
)
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.random_encoder import build_random_encoder


def make_autoencoder(beta=0.2):
    torch.manual_seed(0)
    encoder = build_random_encoder()
    config = FusionConfig(expert_hidden=64, beta=beta)
    fusion = build_fusion(config, 4, 32, layer_norm_eps=encoder.layer_norm_eps)
    shape = DecoderConfig(
        latent_channels=32, width=16, layers=1, heads=2, mlp_hidden=16, grid=4, patch_px=4
    )
    return Autoencoder(encoder, fusion, Decoder(shape)).eval()


def test_images_are_reconstructed_at_the_decoder_s_size():
    model = make_autoencoder()
    images = torch.rand(2, 3, 20, 20)
    output = model.encode(images)
    assert output.latent.shape == (2, 16, 32)
    torch.testing.assert_close(model(images), model.decode(output.latent))
    assert model(images).shape == (2, 3, 16, 16)


def test_with_beta_zero_the_tokenizer_is_rae():
    images = torch.rand(2, 3, 16, 16)
    model = make_autoencoder(beta=0.0)
    rae = Autoencoder(model.encoder, build_fusion(FusionConfig(kind="rae"), 4, 32), model.decoder)
    torch.testing.assert_close(model(images), rae(images), rtol=1e-5, atol=1e-5)


def test_a_decoder_of_another_width_is_refused():
    model = make_autoencoder()
    other = Decoder(DecoderConfig(latent_channels=8, width=16, layers=1, heads=2, mlp_hidden=16))
    with pytest.raises(ValueError, match=r"decoder\.latent_channels=32"):
        Autoencoder(model.encoder, model.fusion, other)


def test_maps_and_tokens_are_inverse_and_row_major():
    tokens = torch.arange(2 * 9 * 5).float().view(2, 9, 5)
    latent = tokens_to_map(tokens)
    assert latent[0, 3, 1, 2] == tokens[0, 5, 3]
    torch.testing.assert_close(map_to_tokens(latent), tokens)
    with pytest.raises(ValueError, match="no square"):
        tokens_to_map(torch.zeros(1, 8, 2))


def test_normalising_and_back_is_exact():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    mean, var = latent.mean(0), latent.var(0, correction=0)
    normalised = normalise_latent(latent, mean, var)
    torch.testing.assert_close(denormalise_latent(normalised, mean, var), latent)
    torch.testing.assert_close(
        normalised[0, 0, 0, 0], (latent - mean)[0, 0, 0, 0] / (var[0, 0, 0] + 1e-5).sqrt()
    )


def test_noise_scales_follow_their_distributions():
    for distribution, mean in (("uniform", 0.4), ("half_normal", 0.638)):
        generator = torch.Generator().manual_seed(0)
        scale = draw_noise_scale(20000, 0.8, generator, distribution)
        assert scale.min() >= 0
        assert scale.mean().item() == pytest.approx(mean, abs=0.01)
    with pytest.raises(ValueError, match="tau=-1"):
        draw_noise_scale(1, -1.0, torch.Generator())


def test_each_sample_has_its_own_noise_scale():
    latent = torch.zeros(2, 3, 4)
    noisy = add_latent_noise(latent, torch.tensor([0.0, 2.0]), torch.ones(2, 3, 4))
    assert (noisy[0] == 0).all()
    assert (noisy[1] == 2).all()
