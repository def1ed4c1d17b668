import pytest
import torch

from drorae.models.decoder import Decoder, DecoderConfig, decoder_preset

TINY = DecoderConfig(
    latent_channels=12, width=16, layers=2, heads=2, mlp_hidden=24, grid=3, patch_px=2
)


@pytest.mark.parametrize(
    ("size", "trainable", "total", "keys"),
    [
        ("ViT-B", 86_237_952, 86_435_328, 200),
        ("ViT-L", 303_887_104, 304_150_272, 392),
        ("ViT-XL", 415_056_640, 415_352_704, 456),
    ],
)
def test_sizes_and_keys_are_those_of_the_released_decoders(size, trainable, total, keys):
    with torch.device("meta"):
        decoder = Decoder(decoder_preset(size))
    assert sum(p.numel() for p in decoder.parameters()) == trainable
    assert sum(t.numel() for t in decoder.state_dict().values()) == total
    assert len(decoder.state_dict()) == keys


def test_a_larger_grid_only_adds_positions():
    with torch.device("meta"):
        decoder = Decoder(decoder_preset("ViT-XL", grid=32))
    assert sum(t.numel() for t in decoder.state_dict().values()) == 416_237_440
    assert decoder.config.image_px == 512


def test_tokens_of_another_grid_are_resampled_behind_the_embedding():
    torch.manual_seed(0)
    decoder = Decoder(TINY).eval()
    tokens = torch.randn(2, 25, 12)
    assert decoder(tokens).shape == (2, 3, 6, 6)
    embedded = decoder.decoder_embed(tokens).transpose(1, 2).reshape(2, 16, 5, 5)
    resized = torch.nn.functional.interpolate(embedded, (3, 3), mode="bilinear")
    features = features_of_embedded(decoder, resized.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoder(tokens), decoder.pixels(features))


def features_of_embedded(decoder, x):
    x = torch.cat([decoder.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + decoder.decoder_pos_embed
    for block in decoder.decoder_layers:
        x = block(x)
    return decoder.decoder_norm(x)[:, 1:]


def test_patches_are_laid_out_row_major_with_the_channel_fastest():
    decoder = Decoder(TINY)
    patches = torch.arange(9 * 12).float().view(1, 9, 12)
    image = decoder.unpatchify(patches)
    # token (r=1, c=2) is number 5; its pixel (y=1, x=0), channel 2 is value 1*2*3 + 0*3 + 2 = 8
    assert image[0, 2, 1 * 2 + 1, 2 * 2 + 0] == 5 * 12 + 8
    torch.testing.assert_close(decoder.patchify(image), patches)


def test_the_last_layer_gradient_equals_autograd():
    torch.manual_seed(0)
    decoder = Decoder(TINY).double()
    features = decoder.features(torch.randn(2, 9, 12).double())
    image = decoder.pixels(features)
    weighting = torch.randn_like(image)
    (at_image,) = torch.autograd.grad((image.sin() * weighting).sum(), image, retain_graph=True)
    (expected,) = torch.autograd.grad((image.sin() * weighting).sum(), decoder.decoder_pred.weight)
    found = decoder.last_layer_gradient(features, at_image)
    torch.testing.assert_close(found, expected)


def test_recomputing_changes_no_gradient():
    torch.manual_seed(0)
    kept = Decoder(TINY)
    again = Decoder(TINY, recompute=True)
    again.load_state_dict(kept.state_dict())
    tokens = torch.randn(2, 9, 12)
    for decoder in (kept, again):
        decoder(tokens).square().sum().backward()
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_wrong_channels_and_shapes_are_named():
    decoder = Decoder(TINY)
    with pytest.raises(ValueError, match="7 channels"):
        decoder(torch.zeros(1, 9, 7))
    with pytest.raises(ValueError, match="no square"):
        decoder(torch.zeros(1, 8, 12))
    with pytest.raises(ValueError, match="multiple of the heads"):
        DecoderConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="at least 1"):
        DecoderConfig(grid=0)
    with pytest.raises(ValueError, match="no decoder"):
        decoder_preset("ViT-G")


def test_a_fresh_decoder_starts_as_plain_pytorch_modules_do():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(latent_channels=64, width=96, layers=2, heads=4, mlp_hidden=80))
    linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 2 + 2 * 6
    for linear in linears:
        # kaiming_uniform(a=sqrt 5): uniform within 1 / sqrt(fan in), for weight and bias
        bound = linear.in_features**-0.5
        assert linear.weight.abs().max() <= bound
        # thousands of uniform draws: their deviation is known to a few percent
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert 0 < linear.bias.abs().max() <= bound
    for norm in (m for m in decoder.modules() if isinstance(m, torch.nn.LayerNorm)):
        assert norm.eps == 1e-12
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    assert (decoder.trainable_cls_token == 0).all()
    assert "decoder_pos_embed" not in dict(decoder.named_parameters())
