import copy

import pytest
import torch
import torch.nn.functional as F

from drorae.models.discriminator import (
    DinoTrunk,
    Discriminator,
    DiscriminatorConfig,
    LocalNorm,
    SpectralConv1d,
    build_discriminator,
)

TINY = {
    "input_px": 32,
    "patch_px": 8,
    "width": 16,
    "depth": 3,
    "heads": 2,
    "taps": (3, 1, 2),
    "kernel": 3,
}


def make_discriminator(seed=0):
    torch.manual_seed(seed)
    return build_discriminator(DiscriminatorConfig(source="random", **TINY))


def test_full_size_is_that_of_the_reference():
    with torch.device("meta"):
        config = DiscriminatorConfig(source="random")
        trunk = DinoTrunk(config)
        frozen = sum(p.numel() for p in trunk.parameters())
        discriminator = Discriminator(config, trunk)
        logits = discriminator(torch.empty(2, 3, 256, 256))
    assert frozen == 21_670_272
    assert sum(p.numel() for p in discriminator.parameters()) == 7_386_245
    assert len(discriminator.state_dict()) == 80
    assert logits.shape == (2, 3920)


def test_keys_are_those_of_the_reference():
    keys = set(make_discriminator().state_dict())
    for key in (
        "heads.0.0.0.weight_orig",
        "heads.0.0.0.weight_u",
        "heads.1.0.0.weight_v",
        "heads.2.0.1.weight",
        "heads.0.1.fn.0.bias",
        "heads.0.1.fn.1.bias",
        "heads.0.2.weight_orig",
    ):
        assert key in keys
    assert not any(key.startswith("trunk") for key in keys)


def test_logits_cover_all_tokens_of_all_heads_at_any_image_size():
    discriminator = make_discriminator()
    for px in (32, 40):
        assert discriminator(torch.rand(2, 3, px, px) * 2 - 1).shape == (2, 3 * 16)


def test_the_trunk_is_never_trained_and_moves_with_the_module():
    discriminator = make_discriminator()
    names = [name for name, _ in discriminator.named_parameters()]
    assert all(name.startswith("heads.") for name in names)
    assert discriminator.double().trunk.blocks[0].norm1.weight.dtype == torch.float64
    images = torch.rand(1, 3, 32, 32).double().requires_grad_()
    discriminator(images).mean().backward()
    assert images.grad.abs().sum() > 0


def test_eval_mode_moves_no_power_iteration_and_train_mode_does():
    discriminator = make_discriminator().eval()
    before = copy.deepcopy(discriminator.state_dict())
    images = torch.rand(1, 3, 32, 32)
    discriminator(images)
    assert all(torch.equal(v, before[k]) for k, v in discriminator.state_dict().items())
    discriminator.train()(images)
    assert not torch.equal(
        discriminator.state_dict()["heads.0.0.0.weight_u"], before["heads.0.0.0.weight_u"]
    )


def test_two_forwards_before_one_backward_work_in_train_mode():
    discriminator = make_discriminator().train()
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    (discriminator(fake).mean() - discriminator(real).mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in discriminator.parameters())


def test_spectral_norm_equals_torch_s():
    torch.manual_seed(0)
    ours = SpectralConv1d(6, 4, 3).train()
    plain = torch.nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular")
    theirs = torch.nn.utils.spectral_norm(plain, eps=1e-12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 10)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_head_equals_one_made_of_torch_s_spectral_norm():
    torch.manual_seed(0)
    head = make_discriminator().heads[0].train()

    def spectral(channels, out, kernel):
        conv = torch.nn.Conv1d(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
        return torch.nn.utils.spectral_norm(conv, eps=1e-12)

    first, inner, last = spectral(16, 16, 1), spectral(16, 16, 3), spectral(16, 1, 1)
    for theirs, ours in ((first, head[0][0]), (inner, head[1].fn[0]), (last, head[2])):
        theirs.load_state_dict(ours.state_dict())

    def plain(x):
        x = F.leaky_relu(F.instance_norm(first(x), eps=1e-6), 0.2)
        x = (F.leaky_relu(F.instance_norm(inner(x), eps=1e-6), 0.2) + x) / 2**0.5
        return last(x)

    x = torch.randn(2, 16, 16)
    for _ in range(3):  # each forward moves the power iteration
        found, expected = head(x), plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().mean().backward()
    expected.square().mean().backward()
    for theirs, ours in ((first, head[0][0]), (inner, head[1].fn[0]), (last, head[2])):
        torch.testing.assert_close(
            ours.weight_orig.grad, theirs.weight_orig.grad, rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(head.eval()(x), plain_in_eval(plain, first, inner, last, x))


def plain_in_eval(plain, *parts_and_input):
    *parts, x = parts_and_input
    for part in parts:
        part.eval()
    return plain(x)


def test_power_iterations_bring_the_largest_singular_value_to_one():
    torch.manual_seed(0)
    conv = SpectralConv1d(6, 4, 3).train()
    for _ in range(200):
        conv(torch.randn(1, 6, 10))
    largest = torch.linalg.svdvals(conv._normalised_weight().flatten(1))[0]
    assert largest.item() == pytest.approx(1.0, abs=1e-4)


def test_local_norm_is_batch_norm_with_a_virtual_batch_of_one():
    torch.manual_seed(0)
    norm = LocalNorm(5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 7)
    rows = [
        F.batch_norm(x[i : i + 1], None, None, norm.weight, norm.bias, training=True, eps=1e-6)
        for i in range(3)
    ]
    torch.testing.assert_close(norm(x), torch.cat(rows), rtol=1e-5, atol=1e-6)


def test_a_dino_file_is_loaded_and_its_key_biases_are_zeroed(tmp_path):
    torch.manual_seed(0)
    config = DiscriminatorConfig(source=str(tmp_path / "dino.pth"), **TINY)
    state = DinoTrunk(config).state_dict()
    torch.save(state, tmp_path / "dino.pth")
    loaded = build_discriminator(config).trunk
    bias = loaded.blocks[0].attn["qkv"].bias
    assert (bias[16:32] == 0).all()
    assert torch.equal(bias[:16], state["blocks.0.attn.qkv.bias"][:16])
    assert torch.equal(loaded.patch_embed["proj"].weight, state["patch_embed.proj.weight"])
    asset = DiscriminatorConfig(source="asset:dino.pth", **TINY)
    again = build_discriminator(asset, lambda name: tmp_path / name).trunk
    assert torch.equal(again.blocks[0].attn["qkv"].bias, bias)
    with pytest.raises(ValueError, match="resolve"):
        build_discriminator(asset)


def test_trunk_taps_are_block_outputs_without_class_token():
    config = DiscriminatorConfig(source="random", **TINY)
    trunk = build_discriminator(config).trunk
    taps = trunk(torch.rand(2, 3, 32, 32))
    assert [t.shape for t in taps] == [(2, 16, 16)] * 3
    assert not torch.equal(taps[0], taps[1])


def test_incomplete_or_missing_trunk_files_are_named(tmp_path):
    config = DiscriminatorConfig(source=str(tmp_path / "dino.pth"), **TINY)
    with pytest.raises(FileNotFoundError, match="DINO"):
        build_discriminator(config)
    state = DinoTrunk(config).state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=r"norm\.bias"):
        build_discriminator(config)


def test_a_random_trunk_is_a_function_of_its_seed():
    config = DiscriminatorConfig(source="random", **TINY)
    one, two = (build_discriminator(config, seed=s).trunk.cls_token for s in (0, 0))
    assert torch.equal(one, two)
    weights = [build_discriminator(config, seed=s).trunk.pos_embed for s in (0, 1)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_px": 30}, "multiple"),
        ({"taps": (4,)}, "from 1 to 3"),
        ({"kernel": 4}, "odd window"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(source="random", **{**TINY, **fields})
