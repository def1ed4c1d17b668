"""Assets from their original homes, for machines that reach them but no package registry.

CIFAR-10 and the LPIPS trunks are the same data. The encoder is not: its home has the untouched
DINOv2-S, so numbers differ, and that is said.
"""

import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from drorae.data.assets.catalog import ARCHIVES
from drorae.data.assets.convert import save_tensors
from drorae.data.assets.download import Notify, obtain
from drorae.data.readers.cifar import SIDE_PX, SPLITS
from drorae.shapes import Tensor

Substitute = Callable[[str, Path, Notify], str]
"""Makes asset (name) at (path), telling (notify), and returns where it came from."""

ENCODER_HUB_ID = "facebook/dinov2-small"


def substitute(name: str, target: Path, notify: Notify) -> str:
    """Make one asset from its original home.

    Returns:
        Where it came from, for the index.

    Raises:
        Exception: Whatever the home's client raises without a network.
    """
    notify(f"{name}: try its original home instead")
    if name == "cifar10":
        return _cifar10(target)
    if name == "dinov2-s-saliency":
        return _encoder(target)
    if name == "efficientnet-lite0":
        return _efficientnet(target)
    return _lpips(name.removeprefix("lpips-"), target, notify)


def _cifar10(target: Path) -> str:
    from torchvision.datasets import CIFAR10

    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as root:
        for split, is_train in (("train", True), ("val", False)):
            data = CIFAR10(root, train=is_train, download=True)
            write_sheets(target, split, np.asarray(data.data), [int(x) for x in data.targets])
    return "torchvision.datasets.CIFAR10"


def write_sheets(folder: Path, split: str, images: np.ndarray, labels: list[int]) -> None:
    """Write CIFAR images [n, 32, 32, 3] as the sheets and label file that the reader expects."""
    label_file, sheets = SPLITS[split]
    for name, part in zip(sheets, np.split(images, len(sheets)), strict=True):
        Image.fromarray(part.reshape(len(part), SIDE_PX * SIDE_PX, 3)).save(folder / name)
    (folder / label_file).write_text(json.dumps(labels))


def _encoder(target: Path) -> str:
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(ENCODER_HUB_ID)
    warnings.warn(
        f"asset dinov2-s-saliency is replaced by the untouched {ENCODER_HUB_ID}: a better encoder, "
        "but numbers will differ from those of the documented smoke runs.",
        stacklevel=2,
    )
    model.save_pretrained(target)
    return f"hub {ENCODER_HUB_ID} (not fine-tuned for saliency)"


def _efficientnet(target: Path) -> str:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=True)
    save_tensors(model.state_dict(), target)
    return "timm tf_efficientnet_lite0"


def _lpips(net: str, target: Path, notify: Notify) -> str:
    import torchvision

    build = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[net]
    trunk = conv_tensors(build(weights="IMAGENET1K_V1").features)
    with tempfile.TemporaryDirectory() as folder:
        wheel = obtain(ARCHIVES["lpips-heads"], Path(folder), notify)
        heads = head_tensors(wheel, net)
    save_tensors({**trunk, **heads}, target)
    return f"torchvision {net} trunk, lpips 0.1.4 heads"


def conv_tensors(features: torch.nn.Module) -> dict[str, Tensor]:
    """Convolutions of a torchvision trunk as `trunk.{i}.weight|bias`."""
    convs = [m for m in features.modules() if isinstance(m, torch.nn.Conv2d)]
    tensors: dict[str, Tensor] = {}
    for index, conv in enumerate(convs):
        assert conv.bias is not None
        tensors |= {f"trunk.{index}.weight": conv.weight, f"trunk.{index}.bias": conv.bias}
    return tensors


def head_tensors(wheel: Path, net: str) -> dict[str, Tensor]:
    """LPIPS v0.1 heads of the lpips wheel as `lin.{k}.weight`."""
    with zipfile.ZipFile(wheel) as archive:
        data = io.BytesIO(archive.read(f"lpips/weights/v0.1/{net}.pth"))
    heads = torch.load(data, weights_only=True, map_location="cpu")
    return {f"lin.{k}.weight": heads[f"lin{k}.model.1.weight"] for k in range(len(heads))}
