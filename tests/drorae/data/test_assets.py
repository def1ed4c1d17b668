import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from drorae.data.assets import asset_path, assets_folder, convert, download, substitutes
from drorae.data.assets.catalog import ARCHIVES, Archive, asset_names, damage, read_index
from drorae.data.assets.fetch import CONVERTERS, fetch

SMALL = Archive(
    client="pip",
    package="tiny==1",
    file_name="tiny.whl",
    size_bytes=5,
    sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    licence="none",
)
"""Holds the text hello."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All assets come from SMALL and are copies of it; gives the log of downloads."""
    log: list[str] = []
    for name in ARCHIVES:
        monkeypatch.setitem(ARCHIVES, name, SMALL)
    for name in CONVERTERS:
        monkeypatch.setitem(CONVERTERS, name, shutil.copy)
    return log


def serve(log: list[str], data: bytes = b"hello"):
    def put(archive: Archive, folder: Path) -> None:
        log.append(archive.package)
        (folder / archive.file_name).write_bytes(data)

    return put


def refuse(*args: object) -> str:
    raise ConnectionError("no internet")


def test_fetch_converts_records_and_cleans_up(tiny: list[str]):
    lines: list[str] = []
    paths = fetch(["lpips-vgg", "lpips-alex"], lines.append, download=serve(tiny))
    assert tiny == ["tiny==1"]
    assert asset_path("lpips-vgg") == paths["lpips-vgg"]
    entry = read_index()["lpips-vgg"]
    assert entry["files"][0]["sha256"] == SMALL.sha256
    assert entry["origin"] == "tiny==1"
    assert lines[-1] == "lpips-alex: ready"
    assert not any(assets_folder().glob("partial*"))
    assert not list((assets_folder() / "downloads").iterdir())


def test_fetching_again_costs_nothing(tiny: list[str]):
    fetch(["smoke"], download=serve(tiny))
    fetch(["smoke"], download=serve(tiny))
    assert len(tiny) == 1


def test_archives_may_be_kept(tiny: list[str]):
    fetch(["lpips-vgg"], download=serve(tiny), keep_archives=True)
    fetch(["lpips-alex"], download=serve(tiny))
    assert len(tiny) == 1


def test_an_interrupted_conversion_never_counts(tiny: list[str], monkeypatch):
    def stop(archive: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(CONVERTERS, "lpips-vgg", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(["lpips-vgg"], download=serve(tiny))
    assert damage("lpips-vgg") == "not fetched yet"
    monkeypatch.setitem(CONVERTERS, "lpips-vgg", shutil.copy)
    fetch(["lpips-vgg"], download=serve(tiny))
    assert len(tiny) == 1  # the archive was still there


def test_damaged_assets_are_noticed_and_repaired(tiny: list[str]):
    path = fetch(["lpips-vgg"], download=serve(tiny))["lpips-vgg"]
    path.write_bytes(b"short?")
    with pytest.raises(FileNotFoundError, match="6 bytes instead of 5"):
        asset_path("lpips-vgg")
    fetch(["lpips-vgg"], download=serve(tiny))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing.*drorae assets fetch smoke"):
        asset_path("lpips-vgg")


def test_wrong_digest_is_refused_and_the_other_source_used(tiny: list[str]):
    def other(name: str, target: Path, notify) -> str:
        target.write_bytes(b"other")
        return "its home"

    lines: list[str] = []
    fetch(["lpips-vgg"], lines.append, download=serve(tiny, b"evil!"), substitute=other)
    assert "expected 2cf24dba" in lines[1]
    assert read_index()["lpips-vgg"]["origin"] == "its home"


def test_both_ways_failing_names_both_and_the_ways_out(tiny: list[str]):
    with pytest.raises(RuntimeError, match=r"tiny.whl has sha256.*no internet.*DRORAE_ASSETS"):
        fetch(["lpips-vgg"], download=serve(tiny, b"evil!"), substitute=refuse)
    assert damage("lpips-vgg")


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="expected one of"):
        asset_names(["lpips-vgg", "imagenet"])


def test_unexpected_file_names_are_told(tiny: list[str], tmp_path: Path):
    def put(archive: Archive, folder: Path) -> None:
        (folder / "other.whl").write_bytes(b"")

    with pytest.raises(RuntimeError, match=r"gave \['other.whl'\]"):
        download.obtain(SMALL, tmp_path, print, put)


@pytest.mark.parametrize("client", ["npm", "pip", "pip-source"])
def test_client_commands_name_the_exact_package(client, tmp_path: Path):
    archive = Archive(
        client=client, package="p==1", file_name="f", size_bytes=1, sha256="", licence=""
    )
    command = download.client_command(archive, tmp_path)
    assert "p==1" in command
    assert str(tmp_path) in command
    assert ("--no-binary" in command) == (client == "pip-source")


def test_client_failures_are_told(tmp_path: Path, monkeypatch):
    fail = [sys.executable, "-c", "import sys; sys.exit('404 not found')"]
    monkeypatch.setattr(download, "client_command", lambda *args: fail)
    with pytest.raises(RuntimeError, match="404 not found"):
        download.run_client(SMALL, tmp_path)
    monkeypatch.setattr(download, "client_command", lambda *args: ["no-such-client"])
    with pytest.raises(RuntimeError, match="no-such-client is not installed"):
        download.run_client(SMALL, tmp_path)
    endless = [sys.executable, "-c", "import time; time.sleep(9)"]
    monkeypatch.setattr(download, "client_command", lambda *args: endless)
    monkeypatch.setattr(download, "TIMEOUT_S", 0.05)
    with pytest.raises(RuntimeError, match="no end after"):
        download.run_client(SMALL, tmp_path)


def lpips_tree() -> dict:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "VGG16_0": {"Conv_0": {"kernel": array(3, 3, 3, 4), "bias": array(4)}},
        "NetLinLayer_0": {"Conv_0": {"kernel": array(1, 1, 4, 1)}},
    }


def test_lpips_checkpoints_become_torch_layout(tmp_path: Path):
    data = pickle.dumps(lpips_tree())
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as package:
        for member in ("vgg16.ckpt", "alexnet.ckpt"):
            info = tarfile.TarInfo(f"{convert.LPIPS_FOLDER}/{member}")
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    for name in ("lpips-vgg", "lpips-alex"):
        CONVERTERS[name](tmp_path / "p.tar.gz", tmp_path / name)
        tensors = load_file(tmp_path / name)
        kernel = lpips_tree()["VGG16_0"]["Conv_0"]["kernel"]
        assert tensors["trunk.0.weight"].shape == (4, 3, 3, 3)
        assert tensors["trunk.0.weight"][1, 2, 0, 1] == kernel[0, 1, 2, 1]
        assert tensors["lin.0.weight"].shape == (1, 4, 1, 1)


def test_pickles_with_anything_but_arrays_are_refused():
    for value in (subprocess.run, Path("x"), np.random.default_rng()):
        with pytest.raises(ValueError, match="refused"):
            convert.load_arrays(pickle.dumps({"a": value}))


def test_two_trunks_are_refused():
    with pytest.raises(ValueError, match="one trunk"):
        convert.lpips_tensors({"A": {}, "B": {}})


def export(model: Dinov2Model) -> bytes:
    """An ONNX file with the initialisers and products that the real export has."""
    names = {new: old for old, new in convert.ATTENTION_NAMES.items()}
    initializers, nodes = [], []
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    state.pop("embeddings.mask_token")
    table = state.pop("embeddings.position_embeddings")
    initializers.append(numpy_helper.from_array(table[:, :1], "onnx::Concat_1"))
    initializers.append(numpy_helper.from_array(table[:, 1:], "onnx::Reshape_2"))
    for name, value in state.items():
        old = name
        for new, former in names.items():
            old = old.replace(new, former)
        linear = value.ndim == 2
        if linear:
            product, weight = f"{name}_product", f"onnx::MatMul_{name}"
            bias = f"backbone.{old.removesuffix('weight')}bias"
            initializers.append(numpy_helper.from_array(value.T.copy(), weight))
            nodes.append(helper.make_node("MatMul", ["x", weight], [product]))
            nodes.append(helper.make_node("Add", [bias, product], [f"{name}_sum"]))
        else:
            initializers.append(numpy_helper.from_array(value, f"backbone.{old}"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [x], [x], initializer=initializers)
    return helper.make_model(graph).SerializeToString()


@pytest.fixture
def dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        mlp_ratio=2,
    )
    return Dinov2Model(config).eval()


def test_exported_encoder_computes_what_the_original_does(dinov2, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr(convert.ENCODER_MEMBER, export(dinov2))
    convert.convert_encoder(tmp_path / "p.whl", tmp_path / "model")
    again = Dinov2Model.from_pretrained(tmp_path / "model")
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        expected = dinov2(images).last_hidden_state
        torch.testing.assert_close(again(images).last_hidden_state, expected)


def test_graphs_that_do_not_fit_are_refused(dinov2):
    tensors = convert.encoder_tensors(export(dinov2))
    del tensors["layernorm.bias"]
    with pytest.raises(ValueError, match=r"layernorm.bias"):
        convert.build_dinov2(tensors)
    model = onnx.load_model_from_string(export(dinov2))
    del model.graph.initializer[0]
    with pytest.raises(ValueError, match="position tables"):
        convert.encoder_tensors(model.SerializeToString())


def test_efficientnet_tensors_are_matched_in_order(tmp_path: Path):
    import timm

    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    renamed = {f"old{i}": value for i, value in enumerate(expected.values())}
    for name, tensors in (("good", renamed), ("bad", {"old0": torch.zeros(1)})):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(convert.LITE0_MEMBER, buffer.getvalue())
    convert.convert_efficientnet(tmp_path / "good.whl", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    with pytest.raises(ValueError, match="do not fit"):
        convert.convert_efficientnet(tmp_path / "bad.whl", tmp_path / "out2")


def test_cifar_sheets_are_taken_unchanged(tmp_path: Path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as package:
        for labels, sheets in convert.SPLITS.values():
            for name in (labels, *sheets):
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(name)
                package.addfile(info, io.BytesIO(name.encode()))
    convert.convert_cifar10(tmp_path / "p.tgz", tmp_path / "cifar10")
    assert len(list((tmp_path / "cifar10").iterdir())) == 8
    assert (tmp_path / "cifar10" / "test_batch.png").read_text() == "test_batch.png"


def test_substitute_cifar_has_the_layout_of_the_package(tmp_path: Path, monkeypatch):
    class FakeCifar:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.zeros((10 if train else 2, 32, 32, 3), dtype=np.uint8)
            self.targets = [1] * len(self.data)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    assert "torchvision" in substitutes.substitute("cifar10", tmp_path / "c", print)
    assert json.loads((tmp_path / "c" / "test_lables.json").read_text()) == [1, 1]
    assert len(list((tmp_path / "c").glob("*.png"))) == 6


def test_substitute_encoder_is_announced_as_another_one(tmp_path: Path, monkeypatch, dinov2):
    monkeypatch.setattr(Dinov2Model, "from_pretrained", lambda name: dinov2)
    with pytest.warns(UserWarning, match="numbers will differ"):
        origin = substitutes.substitute("dinov2-s-saliency", tmp_path / "m", print)
    assert "not fine-tuned" in origin
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_substitute_efficientnet_is_timms(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: torch.nn.Linear(2, 2))
    substitutes.substitute("efficientnet-lite0", tmp_path / "e", print)
    assert set(load_file(tmp_path / "e")) == {"weight", "bias"}


def test_substitute_lpips_joins_trunk_and_heads(tmp_path: Path, monkeypatch):
    class FakeAlex:
        features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())

    heads = io.BytesIO()
    torch.save({"lin0.model.1.weight": torch.ones(1, 4, 1, 1)}, heads)
    wheel = tmp_path / "lpips.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lpips/weights/v0.1/alex.pth", heads.getvalue())
    monkeypatch.setattr("torchvision.models.alexnet", lambda weights: FakeAlex())
    monkeypatch.setattr(substitutes, "obtain", lambda *args: wheel)
    substitutes.substitute("lpips-alex", tmp_path / "l", print)
    assert set(load_file(tmp_path / "l")) == {"trunk.0.weight", "trunk.0.bias", "lin.0.weight"}


def test_saving_shared_tensors_makes_copies(tmp_path: Path):
    shared = torch.ones(3)
    convert.save_tensors({"a": shared, "b": shared}, tmp_path / "t")
    assert set(load_file(tmp_path / "t")) == {"a", "b"}
    with pytest.raises(RuntimeError):
        save_file({"a": shared, "b": shared}, tmp_path / "u")
