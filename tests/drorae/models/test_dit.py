import dataclasses

import pytest
import torch
from torch import nn

from drorae.models.dit import DiT, DiTConfig, DiTOutput, dit_preset, drop_labels

TINY = DiTConfig(
    input_size=4,
    in_channels=6,
    hidden_size=(16, 24),
    depth=(2, 1),
    num_heads=(2, 2),
    num_classes=5,
)
TINY_PLAIN = dataclasses.replace(TINY, hidden_size=16, depth=2, num_heads=2)


def wake(model, seed=0):
    """Give every trained weight a random value: a fresh model is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * noise)
    return model.eval()


def inputs(config=TINY, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    size = config.input_size
    noisy = torch.randn(batch, config.in_channels, size, size, generator=generator, dtype=dtype)
    return noisy, torch.linspace(0.1, 1, batch, dtype=dtype), torch.arange(batch)


def count(model, predicate=lambda p: True):
    return sum(p.numel() for p in model.parameters() if predicate(p))


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [
        ("DiT-DH-S", 196_455_764, 196_357_204),
        ("DiT-DH-B", 294_295_892, 294_099_028),
        ("DiT-DH-L", 621_744_436, 621_482_036),
        ("DiT-DH-XL", 838_675_796, 838_380_628),
    ],
)
def test_head_presets_have_the_parameters_of_the_reference(name, total, trainable):
    with torch.device("meta"):
        model = DiT(dit_preset(name, 768, 16, 1000))
    assert count(model) == total
    assert count(model, lambda p: p.requires_grad) == trainable


@pytest.mark.parametrize(
    ("name", "millions", "total", "trainable"),
    [
        ("DiT-S", 33.6, 33_649_792, 33_551_232),
        ("DiT-B", 131.7, 131_884_288, 131_687_424),
        ("DiT-L", 459.7, 459_923_424, 459_661_024),
        ("DiT-XL", 677.0, 677_248_384, 676_953_216),
    ],
)
def test_plain_presets_have_the_parameters_of_the_reference(name, millions, total, trainable):
    with torch.device("meta"):
        model = DiT(dit_preset(name))
    assert count(model) == total
    assert count(model, lambda p: p.requires_grad) == trainable
    assert round(trainable / 1e6, 1) == millions  # as the reference lists them
    width, depth = model.config.widths[0], model.config.depths[0]
    hidden = int(2 / 3 * 4 * width)
    block = 10 * width**2 + 13 * width + 3 * width * hidden + 2 * hidden
    outside = 1001 * width + (768 * width + width) + (512 * width + width + width**2 + width)
    final = width + 2 * (width**2 + width) + width * 768 + 768
    assert trainable == depth * block + outside + final


def linear_keys(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def reference_keys(num_blocks, has_head):
    """The list of rae's state keys, section by section."""
    prefixes = ("s_", "x_") if has_head else ("x_",)
    keys = ["pos_embed", "t_embedder.W", "y_embedder.embedding_table.weight"]
    keys += linear_keys("t_embedder.mlp.0", "t_embedder.mlp.2")
    keys += linear_keys(*(f"{prefix}embedder.proj" for prefix in prefixes))
    keys += linear_keys("s_projector") if has_head else []
    for rope in ("enc_feat_rope", "dec_feat_rope") if has_head else ("feat_rope",):
        keys += [f"{rope}.freqs_cos", f"{rope}.freqs_sin"]
    keys += ["final_layer.norm_final.weight"]
    keys += linear_keys("final_layer.linear", "final_layer.adaLN_modulation.1")
    for i in range(num_blocks):
        keys += [f"blocks.{i}.norm1.weight", f"blocks.{i}.norm2.weight"]
        parts = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
        keys += linear_keys(*(f"blocks.{i}.{part}" for part in parts))
    return keys


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *(("DiT-DH-S", 190), ("DiT-DH-B", 190), ("DiT-DH-L", 334), ("DiT-DH-XL", 382)),
        *(("DiT-S", 160), ("DiT-B", 160), ("DiT-L", 304), ("DiT-XL", 352)),
    ],
)
def test_state_keys_are_those_of_the_reference(name, keys):
    with torch.device("meta"):
        model = DiT(dit_preset(name))
    expected = reference_keys(sum(model.config.depths), model.config.has_head)
    assert set(model.state_dict()) == set(expected)
    assert len(model.state_dict()) == len(expected) == keys


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"DiT-DH-M.*DiT-DH-XL"):
        dit_preset("DiT-DH-M")


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_fresh_model_predicts_zero(config):
    assert not DiT(config)(*inputs(config)).any()


def test_fresh_blocks_leave_tokens_unchanged():
    block = DiT(TINY).blocks[0]
    tokens = torch.randn(2, 16, 16)
    torch.testing.assert_close(block(tokens, torch.randn(2, 1, 16), None), tokens, rtol=0, atol=0)


def test_initialisation_follows_the_reference():
    torch.manual_seed(0)
    head = DiT(dataclasses.replace(TINY, hidden_size=(64, 96), num_heads=4))
    plain = DiT(dataclasses.replace(TINY_PLAIN, hidden_size=64, num_heads=4))
    for model in (head, plain):
        assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not model.x_embedder.proj.bias.any()
        assert not model.t_embedder.W.requires_grad
    bound = (6 / (64 + 192)) ** 0.5  # Xavier; PyTorch's default bound is 1 / 8
    assert plain.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not plain.blocks[0].attn.qkv.bias.any()
    assert head.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert head.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qknorm": True},
        {"use_qknorm": True, "use_rmsnorm": False},
        {"use_swiglu": False},
        {"use_rope": False},
        {"use_rmsnorm": False},
        {"use_pos_embed": False},
        {"patch_size": 2},
        {"patch_size": (2, 1)},
        {"hidden_size": (16, 16)},
        {"class_dropout_prob": 0.0},
    ],
)
def test_every_option_gives_a_finite_velocity_and_gradients(changes):
    model = wake(DiT(dataclasses.replace(TINY, **changes))).train()
    noisy, t, labels = inputs()
    velocity = model(noisy, t, labels)
    assert velocity.shape == noisy.shape
    velocity.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_float64_agrees_with_float32(config):
    model = wake(DiT(config))
    narrow = model(*inputs(config))
    wide = model.double()(*inputs(config, dtype=torch.float64))
    assert wide.dtype == torch.float64
    noisy, t, labels = inputs(config)
    exact = model(noisy.double(), t.double(), labels)
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_bfloat16_autocast_keeps_the_residual_stream_and_output_in_float32(config):
    model = wake(DiT(config))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    exact = model(*inputs(config))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs(config))
    assert rough.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_whole_model_in_bfloat16_runs():
    model = wake(DiT(TINY)).bfloat16()
    noisy, t, labels = inputs()
    assert model(noisy.bfloat16(), t, labels).dtype == torch.bfloat16


def test_a_sample_does_not_depend_on_its_batch():
    model = wake(DiT(TINY)).double()
    noisy, t, labels = inputs(dtype=torch.float64)
    torch.testing.assert_close(model(noisy, t, labels)[1:2], model(noisy[1:2], t[1:2], labels[1:2]))


def test_the_class_reaches_the_head_only_through_the_trunk():
    model = wake(DiT(TINY))
    noisy, t, _ = inputs()
    for block in model.blocks[: TINY.depths[0]]:
        nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(block.adaLN_modulation[-1].bias)
    one, other = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    torch.testing.assert_close(model(noisy, t, one), model(noisy, t, other), rtol=0, atol=0)


def test_coarse_trunk_tokens_repeat_along_the_sequence_of_the_head():
    model = DiT(dataclasses.replace(TINY, patch_size=(2, 1)))
    condition = torch.arange(4.0).view(1, 4, 1)
    fine = model._spread_over_head_tokens(condition).view(4, 4)
    torch.testing.assert_close(fine, torch.arange(4.0)[:, None].expand(4, 4))


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_activation_checkpointing_changes_no_gradient(config):
    model = wake(DiT(config)).train()
    drop = torch.tensor([True, False, False])
    grads = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        model.zero_grad()
        model(*inputs(config), drop=drop).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_labels_are_dropped_in_training_only():
    model = wake(DiT(dataclasses.replace(TINY, class_dropout_prob=0.5)))
    noisy, t, labels = inputs()
    null = torch.full_like(labels, model.null_label)
    torch.testing.assert_close(model(noisy, t, labels), model(noisy, t, labels), rtol=0, atol=0)
    model.train()
    seeds = range(8)
    runs = [model(noisy, t, labels, generator=torch.Generator().manual_seed(s)) for s in seeds]
    again = model(noisy, t, labels, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runs[0], again, rtol=0, atol=0)
    assert len({run.sum().item() for run in runs}) > 1
    everything = model(noisy, t, labels, drop=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(everything, model.eval()(noisy, t, null), rtol=0, atol=0)


def test_drop_rate_is_the_probability():
    labels = torch.zeros(20_000, dtype=torch.long)
    dropped = drop_labels(labels, 0.1, 7, torch.Generator().manual_seed(0))
    assert (dropped == 7).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert drop_labels(labels, 1.0, 7).eq(7).all()


def test_model_without_label_dropout_has_no_null_class():
    model = DiT(dataclasses.replace(TINY, class_dropout_prob=0.0))
    assert model.y_embedder.embedding_table.num_embeddings == 5
    with pytest.raises(ValueError, match="no null class"):
        _ = model.null_label


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN])
def test_base_head_leaves_the_velocity_alone_and_reads_the_chosen_block(config):
    plain = wake(DiT(config))
    model = DiT(dataclasses.replace(config, base_head_after=1))
    model.load_state_dict(plain.state_dict(), strict=False)
    noisy, t, labels = inputs(config)
    fresh = model.eval()(noisy, t, labels, with_base=True)
    assert isinstance(fresh, DiTOutput)
    assert not fresh.base.any()
    nn.init.normal_(model.base_final_layer.linear.weight)
    full, base = model(noisy, t, labels, with_base=True)
    torch.testing.assert_close(full, plain(noisy, t, labels), rtol=0, atol=0)
    nn.init.zeros_(model.blocks[1].attn.proj.weight)
    changed, same = model(noisy, t, labels, with_base=True)
    torch.testing.assert_close(same, base, rtol=0, atol=0)
    assert not torch.equal(changed, full)


def test_base_prediction_needs_a_base_head():
    with pytest.raises(ValueError, match="base_head_after"):
        DiT(TINY)(*inputs(), with_base=True)


def test_runs_on_the_meta_device_for_shape_and_cost_planning():
    with torch.device("meta"):
        model = DiT(TINY)
        noisy, t = torch.empty(3, 6, 4, 4), torch.empty(3)
        labels = torch.empty(3, dtype=torch.long)
    assert model(noisy, t, labels).shape == noisy.shape


def test_wrong_latent_shape_is_refused():
    noisy, t, labels = inputs()
    with pytest.raises(ValueError, match=r"expected \[batch, 6, 4, 4\]"):
        DiT(TINY)(noisy[:, :5], t, labels)
