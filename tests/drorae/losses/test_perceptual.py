import contextlib
import io
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from drorae.losses.perceptual import PerceptualLoss, load_perceptual

lpips = pytest.importorskip("lpips")  # a GPU host may lack it


def make_reference(net):
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # lpips uses names that torchvision deprecates
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    for conv in convolutions(reference):
        # The default start shrinks the signal layer by layer; keep its scale for the deep taps.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.normal_(conv.bias, std=0.1)
    return reference


def convolutions(reference):
    return [m for m in reference.net.modules() if isinstance(m, nn.Conv2d)]


def export(reference):
    weights = {}
    for i, conv in enumerate(convolutions(reference)):
        weights[f"trunk.{i}.weight"] = conv.weight.detach().clone()
        weights[f"trunk.{i}.bias"] = conv.bias.detach().clone()
    for k, lin in enumerate(reference.lins):
        weights[f"lin.{k}.weight"] = lin.model[1].weight.detach().clone()
    return weights


def make_pair(px=64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 3, px, px, generator=generator).unbind(0)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_equal_the_lpips_package(net, tmp_path):
    reference = make_reference(net)
    save_file(export(reference), tmp_path / "lpips.safetensors")
    ours = load_perceptual(tmp_path / "lpips.safetensors")
    images, targets = make_pair()
    with torch.no_grad():
        expected = reference(2 * images - 1, 2 * targets - 1).flatten()
        found = ours(images, targets)
    assert ours.net == net
    assert expected.min() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_of_the_fetched_weights_equal_the_lpips_package(net):
    from drorae.data.assets import asset_path  # reads more packages than a GPU host has

    try:
        weights = load_file(asset_path(f"lpips-{net}"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    reference = make_reference(net)
    for k, lin in enumerate(reference.lins):  # the package's own heads
        assert torch.equal(lin.model[1].weight, weights[f"lin.{k}.weight"])
    with torch.no_grad():
        for i, conv in enumerate(convolutions(reference)):
            conv.weight.copy_(weights[f"trunk.{i}.weight"])
            conv.bias.copy_(weights[f"trunk.{i}.bias"])
        images, targets = make_pair()
        expected = reference(2 * images - 1, 2 * targets - 1).flatten()
        found = PerceptualLoss(weights)(images, targets)
    assert expected.min() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_gradients_equal_the_lpips_package(net):
    reference = make_reference(net)
    ours = PerceptualLoss(export(reference))
    images, targets = make_pair()
    gradients = []
    for distance in (lambda x: reference(2 * x - 1, 2 * targets - 1), lambda x: ours(x, targets)):
        x = images.clone().requires_grad_()
        distance(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_gradients_are_finite_where_all_channels_are_zero():
    weights = export(make_reference("alex"))
    weights = {k: torch.zeros_like(v) if k.startswith("trunk") else v for k, v in weights.items()}
    images, targets = make_pair()
    images.requires_grad_()
    PerceptualLoss(weights)(images, targets).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_equal_images_have_no_distance_and_the_state_dict_is_empty():
    ours = PerceptualLoss(export(make_reference("alex")))
    images, _ = make_pair()
    assert ours(images, images).abs().max() == 0
    assert not ours.state_dict()
    assert not list(ours.parameters())


def test_a_smaller_evaluation_size_resizes_both_images():
    weights = export(make_reference("alex"))
    images, targets = make_pair()
    small = PerceptualLoss(weights, evaluate_px=45)
    resized = [
        nn.functional.interpolate(x, (45, 45), mode="bilinear", antialias=True)
        for x in (images, targets)
    ]
    torch.testing.assert_close(small(images, targets), PerceptualLoss(weights)(*resized))


def test_wrong_weight_files_are_named(tmp_path):
    weights = export(make_reference("alex"))
    with pytest.raises(ValueError, match="4 convolutions"):
        PerceptualLoss({k: v for k, v in weights.items() if not k.startswith("trunk.4")})
    with pytest.raises(ValueError, match=r"lin\.2\.weight"):
        PerceptualLoss({k: v for k, v in weights.items() if k != "lin.2.weight"})
    with pytest.raises(FileNotFoundError, match="fetch the assets"):
        load_perceptual(tmp_path / "absent.safetensors")
