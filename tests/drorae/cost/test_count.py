import torch
from torch import nn

from drorae.cost.count import count_activations, count_flops, measure
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.dit import DiT
from drorae.models.dit_config import DiTConfig

TOKENS, WIDTH, HIDDEN, HEADS, BLOCKS, PATCH = 16, 24, 96, 3, 4, 4
CONFIG = DecoderConfig(
    latent_channels=12, width=WIDTH, layers=BLOCKS, heads=HEADS, mlp_hidden=HIDDEN, grid=4,
    patch_px=PATCH,
)  # fmt: skip


def on_meta(module_class: type[nn.Module], *arguments: object) -> nn.Module:
    with torch.device("meta"):
        return module_class(*arguments).eval()


def latent() -> torch.Tensor:
    return torch.empty(1, TOKENS, 12, device="meta")


def test_a_linear_layer_is_two_flops_a_weight_and_token() -> None:
    layer = on_meta(nn.Linear, 12, 20)
    found = measure("layer", layer, (torch.empty(1, 7, 12, device="meta"),))
    assert found.forward_flops == 2 * 7 * 12 * 20
    assert (found.parameters, found.trainable) == (260, 260)
    assert found.activation_bytes == {"frozen": 0, "trained": 4 * 7 * 12, "passed": 0}


def test_a_decoder_is_what_its_layers_are_by_hand() -> None:
    tokens = TOKENS + 1  # its class token
    projections = 4 * 2 * tokens * WIDTH * WIDTH
    attention = 2 * 2 * tokens * tokens * WIDTH
    mlp = 2 * 2 * tokens * WIDTH * HIDDEN
    ends = 2 * TOKENS * WIDTH * (12 + 3 * PATCH * PATCH)
    expected = BLOCKS * (projections + attention + mlp) + ends
    assert count_flops(on_meta(Decoder, CONFIG), (latent(),)) == expected


def test_gradients_cost_one_more_pass_for_the_input_and_one_for_the_weights() -> None:
    layer = on_meta(nn.Linear, 12, 20)
    found = measure("layer", layer, (torch.empty(1, 7, 12, device="meta"),))
    once = found.forward_flops
    assert found.step_flops == {"frozen": once, "passed": 2 * once, "trained": 3 * once}
    decoder = measure("decoder", on_meta(Decoder, CONFIG), (latent(),))
    attention = BLOCKS * 2 * 2 * (TOKENS + 1) ** 2 * WIDTH  # two gradients a product, always
    assert decoder.step_flops["trained"] == 3 * decoder.forward_flops
    assert decoder.step_flops["passed"] == 2 * decoder.forward_flops + attention
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_activations_leave_out_weights_and_scores_and_count_storages_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.flatten(1).view_as(x)  # one storage, kept twice

    x = torch.empty(1, 5, 8, device="meta")
    assert count_activations(Twice(), (x,)) == 4 * 40

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = x.unflatten(-1, (3, 4)).permute(2, 0, 1, 3).unbind(0)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    qkv = torch.empty(1, 1000, 12, device="meta")
    # q, k and v share the storage of the input; the output is the fourth.
    assert count_activations(Attention(), (qkv,)) == 4 * 1000 * (12 + 4)


def test_activations_on_meta_are_those_of_real_tensors() -> None:
    config = DiTConfig(
        input_size=4, in_channels=8, hidden_size=(16, 32), depth=(2, 1), num_heads=(2, 2),
        num_classes=3,
    )  # fmt: skip
    shape = (1, 8, 4, 4)
    meta = (torch.empty(shape, device="meta"), torch.empty(1, device="meta"),
            torch.zeros(1, dtype=torch.int64, device="meta"))  # fmt: skip
    real = (torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    on_cpu = count_activations(DiT(config).eval(), real)
    assert count_activations(on_meta(DiT, config), meta) == on_cpu
