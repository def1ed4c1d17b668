import pytest
import torch
from torch import nn

from drorae.models import matmul
from drorae.models.matmul import Linear, batched_product, use_faster_products

HAS_ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    monkeypatch.setattr(matmul, "MIN_MULTIPLICATIONS", 0)


def results(layer, x, arriving):
    own = x.clone().requires_grad_()
    out = layer(own)
    out.backward(arriving)
    grads = [p.grad for p in layer.parameters()]
    return [out.detach(), own.grad, *grads]


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_and_its_gradients_equal_those_of_torch(shape, bias):
    layer, plain = Linear(24, 16, bias=bias), nn.Linear(24, 16, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x, arriving = torch.randn(shape), torch.randn(*shape[:-1], 16)
    # two orders of summation in float32
    for ours, theirs in zip(results(layer, x, arriving), results(plain, x, arriving), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")
def test_the_faster_product_is_taken_in_float32_only():
    layer, x = Linear(24, 16), torch.randn(3, 24)
    assert "OneDnn" in type(layer(x).grad_fn).__name__
    assert "OneDnn" not in type(layer.double()(x.double()).grad_fn).__name__
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.backends.mkldnn.set_flags(False)  # its context manager warns about Intel's GPUs
    try:
        assert "OneDnn" not in type(layer(x).grad_fn).__name__
    finally:
        torch.backends.mkldnn.set_flags(True)


def test_no_gradient_is_computed_where_none_is_asked():
    layer = Linear(24, 16).requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 24), rtol=1e-5, atol=1e-6)
    assert layer.weight.grad is None
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_batched_products_equal_those_of_torch(batch, transposed):
    left, right, bias = torch.randn(batch, 5, 8), torch.randn(batch, 8, 6), torch.randn(batch, 1, 6)
    if transposed:
        left = left.transpose(1, 2).contiguous().transpose(1, 2)
        right = right.transpose(1, 2).contiguous().transpose(1, 2)
    expected = left.double() @ right.double()
    torch.testing.assert_close(batched_product(left, right).double(), expected, rtol=0, atol=1e-5)
    with_bias = batched_product(left, right, bias).double()
    torch.testing.assert_close(with_bias, expected + bias, rtol=0, atol=1e-5)
    out = torch.empty(batch, 5, 6)
    batched_product(left, right, out=out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result():
    assert Linear(24, 16)(torch.empty(0, 24)).shape == (0, 16)


def test_networks_of_others_keep_parameters_names_and_results():
    network = nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.GELU(), nn.Linear(64, 8)))
    names, x = list(network.state_dict()), torch.randn(1024, 32)
    expected, first = network(x), network[0].weight
    use_faster_products(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert list(network.state_dict()) == names
    assert network[0].weight is first
    torch.testing.assert_close(network(x), expected)
