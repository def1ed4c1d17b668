"""Models and losses on CUDA against the CPU, in bfloat16, and compiled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drorae.losses.adversarial import (
    NUM_DRAWS,
    augment,
    generator_loss,
    hinge_loss,
    to_signed,
)
from drorae.losses.perceptual import TRUNKS, PerceptualLoss
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.discriminator import DiscriminatorConfig, build_discriminator
from drorae.models.dit import DiT, DiTConfig
from drorae.models.fusion import FusionConfig, build_fusion
from drorae.models.random_encoder import build_random_encoder

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
# Two libraries' order of summation in float32, with TF32 off, over a few layers.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
BF16_RELATIVE = 0.05  # 8 bits of mantissa through a few layers

DIT = DiTConfig(
    input_size=8,
    in_channels=16,
    hidden_size=(64, 96),
    depth=(2, 1),
    num_heads=(2, 2),
    num_classes=5,
)
DECODER = DecoderConfig(
    latent_channels=32, width=64, layers=2, heads=2, mlp_hidden=96, grid=8, patch_px=4
)
JUDGE = DiscriminatorConfig(
    source="random", input_px=32, patch_px=8, width=16, depth=3, heads=2, taps=(3, 1, 2), kernel=3
)
FUSIONS = {
    "energy": FusionConfig(expert_hidden=48),
    "wide": FusionConfig(expert_hidden=128),
    "softmax": FusionConfig(expert_hidden=48, aggregation="softmax"),
    "cross_attention": FusionConfig(expert_hidden=48, aggregation="cross_attention"),
    "hirae": FusionConfig(kind="hirae", expert_hidden=48, router_scope="deepest"),
    "angle_budget": FusionConfig(kind="angle_budget", expert_hidden=48),
    "mean_last_k": FusionConfig(kind="mean_last_k"),
}


def awake(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise.to(parameter))
    return module.eval()


def make_fusion(name, recompute=False):
    return awake(build_fusion(FUSIONS[name], 6, 32, recompute=recompute))


def make_case(name):
    """A module, its inputs and what to call on the result."""
    generator = torch.Generator().manual_seed(1)
    if name == "dit":
        noisy = torch.randn(4, 16, 8, 8, generator=generator)
        return awake(DiT(DIT)), (noisy, torch.linspace(0.1, 1, 4), torch.arange(4))
    if name == "decoder":
        return awake(Decoder(DECODER)), (torch.randn(2, 64, 32, generator=generator),)
    return make_fusion(name), (torch.randn(2, 6, 64, 32, generator=generator),)


def tensor_of(result):
    return result if isinstance(result, torch.Tensor) else result.latent


def result_and_gradients(module, inputs, precision=torch.float32):
    module.zero_grad(set_to_none=True)
    device = inputs[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
        out = tensor_of(module(*inputs))
    out.float().pow(3).mean().backward() if out.requires_grad else None
    grads = {n: p.grad.cpu() for n, p in module.named_parameters() if p.grad is not None}
    return out.detach().cpu(), grads


def on_device(module, inputs):
    return copy.deepcopy(module).to(DEVICE), tuple(x.to(DEVICE) for x in inputs)


def relative(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["dit", "decoder", *FUSIONS])
def test_float32_on_cuda_agrees_with_the_cpu(name):
    module, inputs = make_case(name)
    expected, grads = result_and_gradients(module, inputs)
    actual, others = result_and_gradients(*on_device(module, inputs))
    torch.testing.assert_close(actual, expected, **CLOSE)
    for key, grad in grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(others[key], grad, rtol=1e-3, atol=1e-3 * scale + 1e-8)


@pytest.mark.parametrize("name", ["dit", "decoder", *FUSIONS])
def test_bfloat16_on_cuda_stays_near_float32(name):
    module, inputs = make_case(name)
    expected, _ = result_and_gradients(module, inputs)
    actual, grads = result_and_gradients(*on_device(module, inputs), torch.bfloat16)
    assert relative(actual, expected) < BF16_RELATIVE
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_on_cuda_gives_the_same_gradients_from_less_memory(recompute):
    fusion = make_fusion("wide", recompute).to(DEVICE)
    plain = make_fusion("wide").to(DEVICE)
    hidden = torch.randn(16, 6, 64, 32, device=DEVICE)
    before = torch.cuda.memory_allocated()
    latent = fusion(hidden).latent
    held = torch.cuda.memory_allocated() - before
    activations = 6 * 16 * 64 * (128 + 32) * 4
    assert (held < activations) == recompute
    latent.pow(3).mean().backward()
    plain(hidden).latent.pow(3).mean().backward()
    for ours, other in zip(fusion.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.filterwarnings("default")  # the compiler warns in its own code
@pytest.mark.parametrize(
    "name", ["block", "head block", "decoder", "energy", "hirae", "angle_budget"]
)
def test_a_compiled_module_equals_the_eager_one_without_a_graph_break(name):
    if "block" in name:
        model, _ = make_case("dit")
        part = int(name == "head block")
        rotary = model.dec_feat_rope if part else model.enc_feat_rope
        width, block = DIT.widths[part], model.blocks[-part]
        tokens, condition = torch.randn(2, 64, width), torch.randn(2, 64 if part else 1, width)
        module, inputs = on_device(block, (tokens, condition))
        inputs = (*inputs, copy.deepcopy(rotary).to(DEVICE))
    else:
        module, inputs = on_device(*make_case(name))
    torch._dynamo.reset()
    expected, grads = result_and_gradients(module, inputs)
    actual, others = result_and_gradients(torch.compile(module, fullgraph=True), inputs)
    torch.testing.assert_close(actual, expected, **CLOSE)
    for key, grad in grads.items():
        other = others[f"_orig_mod.{key}"]
        torch.testing.assert_close(
            other, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-8
        )


def test_the_encoder_on_cuda_agrees_with_the_cpu():
    encoder = build_random_encoder()
    images = torch.rand(2, 3, 16, 16)
    expected = encoder(images)
    actual = copy.deepcopy(encoder).to(DEVICE)(images.to(DEVICE)).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_the_discriminator_and_its_losses_on_cuda_agree_with_the_cpu():
    torch.manual_seed(0)
    judge = build_discriminator(JUDGE).eval()
    real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    found = []
    # drawn on the CPU, so that both devices augment alike
    draws = torch.rand(2, len(real), NUM_DRAWS, generator=torch.Generator().manual_seed(2))
    for device in (torch.device("cpu"), DEVICE):
        own = copy.deepcopy(judge).to(device)
        real_logits = own(augment(to_signed(real.to(device)), draws[0]))
        fake_logits = own(augment(to_signed(fake.to(device)), draws[1]))
        loss = 0.5 * (hinge_loss(real_logits, real=True) + hinge_loss(fake_logits, real=False))
        loss.backward()
        grads = [p.grad.cpu() for p in own.parameters() if p.grad is not None]
        found.append((loss.detach().cpu(), generator_loss(fake_logits).detach().cpu(), grads))
    (loss, gan, grads), (other_loss, other_gan, other_grads) = found
    torch.testing.assert_close(other_loss, loss, **CLOSE)
    torch.testing.assert_close(other_gan, gan, **CLOSE)
    assert grads
    for ours, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(other, ours, rtol=1e-2, atol=1e-4)


def alex_weights():
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    assert len(sizes) == len(TRUNKS["alex"])
    weights = {}
    for index, (channels, out, kernel) in enumerate(sizes):
        shape = (out, channels, kernel, kernel)
        scale = (2 / (channels * kernel**2)) ** 0.5
        weights[f"trunk.{index}.weight"] = scale * torch.randn(shape, generator=generator)
        weights[f"trunk.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
        weights[f"lin.{index}.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return weights


def test_lpips_and_its_gradient_on_cuda_agree_with_the_cpu():
    loss = PerceptualLoss(alex_weights())
    images, targets = torch.rand(2, 2, 3, 64, 64)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        own = images.to(device).requires_grad_()
        distance = copy.deepcopy(loss).to(device)(own, targets.to(device))
        distance.sum().backward()
        found.append((distance.detach().cpu(), own.grad.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], **CLOSE)
    assert relative(found[1][1], found[0][1]) < 1e-2  # a ReLU's gradient jumps at 0


def test_attention_on_cuda_takes_bfloat16_whatever_the_rotation_widened():
    model, inputs = on_device(*make_case("dit"))
    with torch.no_grad():
        whole = model.bfloat16()(inputs[0].bfloat16(), inputs[1], inputs[2])
    assert whole.dtype == torch.bfloat16
    assert torch.isfinite(whole).all()
    assert isinstance(model.blocks, nn.ModuleList)
    assert F.mse_loss(whole.float(), torch.zeros_like(whole).float()) > 0
