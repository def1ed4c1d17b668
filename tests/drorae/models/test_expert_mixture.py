"""The experts' hand-written backward pass, its blocks, its memory, and its training in bf16."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from drorae.models import expert_mixture
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.experts import Experts
from drorae.models.fusion import FusionConfig, build_fusion

EPS = 1e-6
BATCH, LAYERS, TOKENS, DIM, HIDDEN = 2, 3, 4, 6, 5


def make_experts(activation="gelu", recompute=False, dtype=torch.float64):
    torch.manual_seed(0)
    experts = Experts(LAYERS, DIM, HIDDEN, activation, eps=EPS, recompute=recompute)
    for parameter in experts.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return experts.to(dtype)


def make_inputs(rows=None, dtype=torch.float64):
    features = F.layer_norm(torch.randn(BATCH, LAYERS, TOKENS, DIM, dtype=dtype), (DIM,))
    shape = (BATCH, TOKENS, LAYERS) if rows is None else (BATCH, TOKENS, rows, LAYERS)
    return features.requires_grad_(), torch.randn(shape, dtype=dtype, requires_grad=True)


def loop(experts, features):
    """The same experts one after another, differentiated by autograd."""
    outputs = []
    for k in range(LAYERS):
        hidden = features[:, k] @ experts.up_weight[k] + experts.up_bias[k]
        hidden = F.layer_norm(
            hidden, (HIDDEN,), experts.norm_weight[k, 0], experts.norm_bias[k, 0], 1e-5
        )
        hidden = F.gelu(hidden) if experts.activation == "gelu" else hidden
        outputs.append(
            F.layer_norm(hidden @ experts.down_weight[k] + experts.down_bias[k], (DIM,), eps=EPS)
        )
    return torch.stack(outputs, dim=1)


@pytest.fixture(params=["one block", "two blocks", "a layer a block"])
def blocks(request, monkeypatch):
    layer_bytes = BATCH * TOKENS * DIM * 8
    layers = {"one block": 3, "two blocks": 2, "a layer a block": 1}[request.param]
    monkeypatch.setattr(expert_mixture, "CPU_BLOCK_BYTES", layers * layer_bytes)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_sums_and_all_gradients_equal_a_loop_over_layers(activation, recompute):
    experts = make_experts(activation, recompute)
    features, weights = make_inputs()
    wanted = [features, weights, *experts.parameters()]
    mixed = experts.mixed(features, weights)
    expected = torch.einsum("bnl,blnc->bnc", weights, loop(experts, features))
    torch.testing.assert_close(mixed, expected)
    arriving = torch.randn_like(mixed)
    ours = torch.autograd.grad(mixed, wanted, arriving)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, wanted, arriving))


@pytest.mark.usefixtures("blocks")
def test_outputs_without_sum_and_sums_by_group_equal_a_loop_over_layers():
    experts = make_experts()
    features, weights = make_inputs()
    wanted = [features, weights, *experts.parameters()]
    groups = [slice(0, 1), slice(1, 3)]
    expected = loop(experts, features)
    sums = [torch.einsum("bnl,blnc->bnc", weights[..., g], expected[:, g]) for g in groups]
    mixed = experts.mixed_in_groups(features, weights, groups)
    torch.testing.assert_close(list(mixed), sums)
    torch.testing.assert_close(experts(features), expected)
    arriving = torch.randn_like(expected)
    ours = torch.autograd.grad(experts(features), wanted[:1] + wanted[2:], arriving)
    theirs = torch.autograd.grad(expected, wanted[:1] + wanted[2:], arriving, retain_graph=True)
    torch.testing.assert_close(ours, theirs)
    ours = torch.autograd.grad(sum(s.pow(3).sum() for s in mixed), wanted)
    theirs = torch.autograd.grad(sum(s.pow(3).sum() for s in sums), wanted)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_finite_differences(recompute):
    experts = make_experts(recompute=recompute)
    features, weights = make_inputs()
    parameters = tuple(experts.parameters())
    # gradcheck hands the parameters back in place, so the module sees the perturbed values
    assert torch.autograd.gradcheck(
        lambda features, weights, *_: experts.mixed(features, weights),
        (features, weights, *parameters),
    )


def test_frozen_features_receive_no_gradient():
    experts = make_experts()
    features, weights = make_inputs()
    experts.mixed(features.detach(), weights).sum().backward()
    assert features.grad is None
    assert weights.grad is not None


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_the_fusion_is_one_graph_for_the_compiler():
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(expert_hidden=64), 6, 32)
    parameters = tuple(fusion.parameters())
    traced = torch.compile(fusion, fullgraph=True, backend="eager")  # a break is an error
    for shape in ((2, 6, 16, 32), (3, 6, 16, 32), (3, 6, 25, 32)):
        hidden = torch.randn(*shape)
        plain = torch.autograd.grad(fusion(hidden).latent.square().sum(), parameters)
        grads = torch.autograd.grad(traced(hidden).latent.square().sum(), parameters)
        torch.testing.assert_close(grads, plain)


class CountOps(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_one_block_takes_as_many_operations_for_24_layers_as_for_4(monkeypatch):
    monkeypatch.setattr(expert_mixture, "CPU_BLOCK_BYTES", 1 << 30)
    counts = []
    for layers in (4, 24):
        fusion = build_fusion(FusionConfig(expert_hidden=64), layers, 32)
        with CountOps() as mode:
            fusion(torch.randn(2, layers, 16, 32)).latent.sum().backward()
        counts.append(mode.count)
    assert counts[0] == counts[1]


def saved_bytes(recompute, batch):
    """Bytes that the forward pass keeps for the backward pass, parameters and inputs apart."""
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(expert_hidden=128), 6, 32, recompute=recompute)
    hidden = torch.randn(batch, 6, 16, 32)
    known = {p.data_ptr() for p in fusion.parameters()} | {hidden.data_ptr()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latent = fusion(hidden).latent  # alive while counted, so that no storage is reused
    del latent
    return sum(kept.values())


def test_recomputing_keeps_the_features_and_no_activation_of_an_expert():
    kept, again = saved_bytes(False, 8), saved_bytes(True, 8)
    tokens, features = 8 * 16, 8 * 6 * 16 * 32 * 4
    activations = 6 * tokens * (128 + 32 + 3) * 4  # u, h, mean of u, deviations of both
    assert kept - again == activations
    # features, three norms over one layer and the router's small tensors; nothing of width hidden
    assert again < 2 * features + 8 * tokens * 32 * 4


def test_keeping_costs_less_than_autograd_keeps():
    torch.manual_seed(0)
    experts = Experts(6, 32, 128, "gelu", eps=EPS)
    features = torch.randn(8, 6, 16, 32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = torch.einsum("blnc,lch->blnh", features, experts.up_weight) + experts.up_bias
        normed = F.layer_norm(hidden, (128,), eps=1e-5) * experts.norm_weight + experts.norm_bias
        raw = torch.einsum("blnh,lhc->blnc", F.gelu(normed), experts.down_weight)
        result = F.layer_norm(raw + experts.down_bias, (32,), eps=EPS)
    assert result.requires_grad
    assert saved_bytes(False, 8) < 0.75 * sum(kept.values())


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"aggregation": "energy"},
        {"aggregation": "softmax"},
        {"aggregation": "cross_attention"},
        {"aggregation": "energy", "activation": "none"},
        {"kind": "hirae", "router_scope": "deepest"},
        {"kind": "angle_budget"},
    ],
)
def test_at_the_start_the_reconstruction_error_is_within_5_percent_of_raes(fields, share):
    dim = 64
    hidden, images, decoder = reconstruction_problem(dim)
    config = FusionConfig(expert_hidden=int(share * dim), **fields)
    fusion = build_fusion(config, hidden.shape[1], dim).eval()
    with torch.no_grad():
        output = fusion(hidden)
        error, base_error = (
            (decoder(latent) - images).abs().mean().item()
            for latent in (output.latent, output.base)
        )
    assert abs(error / base_error - 1) < 0.05
    assert not torch.equal(output.latent, output.base)


def reconstruction_problem(dim, batch=8, layers=6, grid=4, patch=4):
    """Hidden states with the statistics of a ViT's, images, and a decoder fitted to the base.

    A residual stream: each layer adds to the one before, its scale grows with depth, a few channels
    are far larger than the rest. The decoder's last map is the least-squares fit of the images from
    the deepest layer under RAE's latent noise (tau 0.8, 16 draws), so that its error is below that
    of a constant image and reacts to the latent as a trained decoder's does.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, grid, grid, generator=generator)
    images = F.interpolate(images, size=grid * patch, mode="bilinear")
    config = DecoderConfig(
        latent_channels=dim, width=dim, layers=1, heads=4, mlp_hidden=dim, grid=grid, patch_px=patch
    )
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    patches = decoder.patchify(images).flatten(2)
    lift = torch.randn(patches.shape[-1], dim, generator=generator)
    stream = (patches - patches.mean((0, 1))) @ lift
    outliers = torch.ones(dim)
    outliers[:2] = 8.0
    states = []
    for _ in range(layers):
        stream = stream + 0.7 * stream.std() * torch.randn(stream.shape, generator=generator)
        states.append(stream * outliers)
    hidden = torch.stack(states, dim=1)
    with torch.no_grad():
        base = F.layer_norm(hidden[:, -1], (dim,), eps=EPS)
        draws = base.repeat(16, 1, 1)
        scale = 0.8 * torch.rand(len(draws), 1, 1, generator=generator)
        draws = draws + scale * torch.randn(draws.shape, generator=generator)
        features = decoder.features(draws).flatten(0, 1)
        target = decoder.patchify((images - decoder.image_mean) / decoder.image_std)
        target = target.repeat(16, 1, 1).flatten(0, 1)
        design = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        ridge = 1e-2 * len(design) * torch.eye(dim + 1)
        solution = torch.linalg.solve(design.T @ design + ridge, design.T @ target)
        decoder.decoder_pred.weight.copy_(solution[:-1].T)
        decoder.decoder_pred.bias.copy_(solution[-1])
        flat = (images - images.mean((0, 2, 3), keepdim=True)).abs().mean()
        assert (decoder(base) - images).abs().mean() < 0.9 * flat  # the problem has content
    return hidden, images, decoder


def train(precision, steps=120):
    hidden, images, decoder = reconstruction_problem(32)
    decoder.requires_grad_(False)
    torch.manual_seed(1)
    fusion = build_fusion(FusionConfig(expert_hidden=64), hidden.shape[1], 32)
    optimiser = torch.optim.AdamW(fusion.parameters(), lr=3e-3)
    losses, norms = [], []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = fusion(hidden)
            image = decoder(output.latent)
        loss = (image.float() - images).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        for name, parameter in fusion.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
        optimiser.step()
        losses.append(loss.item())
        norms.append(output.router_norm.item())
    return losses, norms


def test_training_in_bfloat16_is_stable_and_ends_where_float32_does():
    exact, _ = train("float32")
    rough, norms = train("bfloat16")
    assert all(math.isfinite(loss) for loss in rough)
    assert exact[-1] < 0.97 * exact[0]  # it learns
    assert sum(rough[-10:]) == pytest.approx(sum(exact[-10:]), rel=0.03)
    # Eq. 4 leaves the router's scale free; it starts at 1 and must stay of that order
    assert 0.3 < min(norms) <= max(norms) < 10
