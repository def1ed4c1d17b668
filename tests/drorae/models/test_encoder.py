import pytest
import torch
import torch.nn.functional as F
import transformers

from drorae.config import from_json, to_json
from drorae.models.encoder import Encoder, build_encoder
from drorae.models.encoder_config import FAMILIES, HALF, EncoderConfig
from drorae.models.random_encoder import build_random_encoder

GENERATOR_SEED = 3


def make_images(batch=2, px=16):
    return torch.rand(batch, 3, px, px, generator=torch.Generator().manual_seed(GENERATOR_SEED))


def fail(*_args, **_kwargs):
    raise RuntimeError("third block")


def final_norm(backbone):
    names = {"layernorm", "norm", "post_layernorm"}
    return next(m for n, m in backbone.named_children() if n in names)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_all_blocks_of_patch_tokens(family):
    encoder = build_random_encoder(family)
    hidden = encoder(make_images())
    assert hidden.shape == (2, 4, 16, 32)
    assert torch.isfinite(hidden).all()
    assert not hidden.requires_grad


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"clip_vision_model"}))
def test_last_layer_is_the_block_output_before_the_final_norm(family):
    encoder = build_random_encoder(family)
    images = make_images()
    extra = {"noise": torch.arange(16).expand(2, -1)} if family == "vit_mae" else {}
    with torch.no_grad():
        output = encoder.backbone(pixel_values=encoder.prepare(images), **extra).last_hidden_state
        expected = final_norm(encoder.backbone)(encoder(images)[:, -1])
    torch.testing.assert_close(output[:, encoder.num_prefix_tokens :], expected)


def test_clip_output_has_no_final_norm_and_equals_the_last_layer():
    encoder = build_random_encoder("clip_vision_model")
    images = make_images()
    with torch.no_grad():
        output = encoder.backbone(pixel_values=encoder.prepare(images)).last_hidden_state
    torch.testing.assert_close(output[:, 1:], encoder(images)[:, -1])


def test_intermediate_layers_equal_blocks_applied_by_hand():
    encoder = build_random_encoder("dinov2_with_registers")
    images = make_images()
    backbone = encoder.backbone
    hidden = encoder(images)
    with torch.no_grad():
        tokens = backbone.embeddings(encoder.prepare(images))
        assert tokens.shape[1] == 1 + 4 + 16
        for index, block in enumerate(backbone.encoder.layer):
            tokens = block(tokens)
            torch.testing.assert_close(hidden[:, index], tokens[:, 5:])


def test_a_subset_of_layers_equals_those_layers_of_the_whole():
    full = build_random_encoder(depth=4)
    some = build_random_encoder(depth=4, layers=(2, 4))
    images = make_images()
    assert some.num_layers == 2
    torch.testing.assert_close(some(images), full(images)[:, [1, 3]])
    torch.testing.assert_close(full(images, layers=(4,)), full(images)[:, 3:])


def test_no_hook_is_left_even_after_an_error():
    encoder = build_random_encoder()
    encoder(make_images())
    encoder.backbone.encoder.layer[2].forward = fail
    with pytest.raises(RuntimeError, match="third block"):
        encoder(make_images())
    assert not any(m._forward_hooks for m in encoder.backbone.encoder.layer)


def test_encoder_stays_frozen_and_in_eval_mode():
    encoder = build_random_encoder().train()
    assert not encoder.training
    assert not encoder.backbone.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_larger_images_are_resized_bicubically_without_antialias():
    encoder = build_random_encoder()
    images = make_images(px=24)
    resized = F.interpolate(images, (16, 16), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(encoder(images), encoder(resized))
    assert encoder(torch.rand(1, 3, 20, 31)).shape == (1, 4, 16, 32)


def test_other_input_sizes_change_the_grid():
    small = build_random_encoder("siglip_vision_model", input_px=16)
    config = EncoderConfig(
        source="x", input_px=32, patch_px=4, width=32, depth=4, image_mean=HALF, image_std=HALF
    )
    large = Encoder(config, small.backbone)
    assert large.grid == 8
    assert large(make_images(px=32)).shape == (2, 4, 64, 32)


def test_mae_keeps_the_order_of_tokens():
    encoder = build_random_encoder("vit_mae")
    images = make_images(1)
    changed = images.clone()
    changed[:, :, 12:, 12:] += 0.3
    with torch.no_grad():
        moved = [
            encoder.backbone.embeddings(encoder.prepare(x), noise=torch.arange(16).expand(1, -1))[0]
            for x in (images, changed)
        ]
    difference = (moved[0] - moved[1]).abs().amax(-1)[0, 1:]
    assert difference.argmax() == 15
    assert (difference[:15] == 0).all()


def test_base_is_zero_mean_and_unit_variance():
    encoder = build_random_encoder()
    base = encoder.base(encoder(make_images())[:, -1]).double()
    torch.testing.assert_close(base.mean(-1), torch.zeros(2, 16).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        base.var(-1, correction=0), torch.ones(2, 16).double(), atol=1e-4, rtol=0
    )


def test_random_encoder_is_a_function_of_its_seed_and_keeps_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = build_random_encoder(seed=1)
    assert torch.rand(1) == expected
    assert one.weights_digest() == build_random_encoder(seed=1).weights_digest()
    assert one.weights_digest() != build_random_encoder(seed=2).weights_digest()


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "vit_mae"])
def test_a_saved_folder_loads_offline_with_equal_features(family, tmp_path):
    encoder = build_random_encoder(family)
    encoder.backbone.save_pretrained(tmp_path / "model")
    config = from_json(
        EncoderConfig, {**to_json(encoder.config), "source": str(tmp_path / "model")}
    )
    loaded = build_encoder(config)
    torch.testing.assert_close(loaded(make_images()), encoder(make_images()), rtol=0, atol=0)
    asset = from_json(EncoderConfig, {**to_json(encoder.config), "source": "asset:tiny"})
    assert build_encoder(asset, lambda _: tmp_path / "model").weights_digest() == (
        encoder.weights_digest()
    )


def test_the_vision_tower_of_an_image_text_checkpoint_is_found(tmp_path):
    vision = build_random_encoder("siglip_vision_model")
    settings = transformers.SiglipConfig(
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 8,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        vision_config=vision.backbone.config.to_dict(),
    )
    whole = transformers.SiglipModel(settings)
    whole.vision_model.load_state_dict(vision.backbone.state_dict())
    whole.save_pretrained(tmp_path / "model")
    config = from_json(EncoderConfig, {**to_json(vision.config), "source": str(tmp_path / "model")})
    torch.testing.assert_close(build_encoder(config)(make_images()), vision(make_images()))


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    encoder = build_random_encoder("dinov2")
    state = encoder.backbone.state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith("encoder.layer.1.")}
    encoder.backbone.save_pretrained(tmp_path / "model", state_dict=kept)
    config = from_json(
        EncoderConfig, {**to_json(encoder.config), "source": str(tmp_path / "model")}
    )
    with pytest.raises(ValueError, match=r"lacks .* weights"):
        build_encoder(config)


def test_a_checkpoint_without_mask_token_is_complete(tmp_path):
    encoder = build_random_encoder("dinov2")
    state = encoder.backbone.state_dict()
    del state["embeddings.mask_token"]
    encoder.backbone.save_pretrained(tmp_path / "model", state_dict=state)
    config = from_json(
        EncoderConfig, {**to_json(encoder.config), "source": str(tmp_path / "model")}
    )
    torch.testing.assert_close(build_encoder(config)(make_images()), encoder(make_images()))


def test_an_unknown_family_is_refused(tmp_path):
    transformers.BertConfig(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert model"):
        build_encoder(EncoderConfig(source=str(tmp_path)))
    with pytest.raises(ValueError, match="unknown"):
        build_random_encoder("resnet")


def test_an_asset_needs_a_resolver_and_a_folder(tmp_path):
    config = EncoderConfig(source="asset:tiny")
    with pytest.raises(ValueError, match="resolve"):
        build_encoder(config)
    with pytest.raises(FileNotFoundError, match="tiny"):
        build_encoder(config, lambda name: tmp_path / name)


def test_a_backbone_of_another_shape_is_refused():
    backbone = build_random_encoder().backbone
    with pytest.raises(ValueError, match=r"encoder\.width=64.*encoder\.width=32"):
        Encoder(EncoderConfig(source="x", input_px=16, patch_px=4, width=64, depth=4), backbone)


def test_unusual_input_statistics_warn_and_name_the_usual_ones():
    backbone = build_random_encoder().backbone
    config = EncoderConfig(
        source="x", input_px=16, patch_px=4, width=32, depth=4, image_mean=HALF, image_std=HALF
    )
    with pytest.warns(UserWarning, match=r"0\.485"):
        Encoder(config, backbone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_px": 225}, "use 224"),
        ({"depth": 0}, "at least 1"),
        ({"layers": (1, 2)}, "end with 12"),
        ({"layers": (3, 2, 12)}, "ascending"),
        ({"layers": ()}, "ascending"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**fields)


def test_the_default_configuration_is_the_paper_s_encoder():
    config = EncoderConfig()
    assert (config.grid, config.num_layers, config.width) == (16, 12, 768)
    assert from_json(EncoderConfig, to_json(config)) == config


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"dinov3_vit"}))
def test_every_learned_position_table_is_resampled_to_another_grid(family):
    small = build_random_encoder(family, input_px=28)  # 7 x 7 positions, as MAE's 14 x 14 at 256 px
    fields = {**to_json(small.config), "input_px": 32}
    large = Encoder(from_json(EncoderConfig, fields), small.backbone)
    hidden = large(make_images(px=32))
    assert hidden.shape == (2, 4, 64, 32)
    assert torch.isfinite(hidden).all()


def test_dinov2_positions_are_resampled_as_rae_states():
    small = build_random_encoder("dinov2_with_registers", input_px=28)
    large = Encoder(
        from_json(EncoderConfig, {**to_json(small.config), "input_px": 32}), small.backbone
    )
    images = make_images(px=32)
    embeddings = small.backbone.embeddings
    table = embeddings.position_embeddings
    with torch.no_grad():
        patches = table[:, 1:].reshape(1, 7, 7, 32).permute(0, 3, 1, 2)
        # bicubic, align_corners False, antialias True (RAE reference, section 1.2)
        patches = F.interpolate(patches, (8, 8), mode="bicubic", antialias=True)
        tokens = embeddings.patch_embeddings(large.prepare(images))
        found = embeddings(large.prepare(images))
        expected = tokens + patches.flatten(2).transpose(1, 2)
        torch.testing.assert_close(found[:, 5:], expected)
        torch.testing.assert_close(
            found[:, 0], (embeddings.cls_token + table[:, :1])[0].expand(2, -1)
        )
        # registers get no position
        torch.testing.assert_close(found[:, 1:5], embeddings.register_tokens.expand(2, -1, -1))


def test_only_the_blocks_asked_for_are_kept():
    encoder = build_random_encoder(depth=4)
    with encoder._capture((4,)) as found:
        encoder.backbone(pixel_values=encoder.prepare(make_images()))
    assert found["hidden"].shape == (2, 1, 16, 32)
    assert found["hidden"].untyped_storage().nbytes() == 2 * 16 * 32 * 4
