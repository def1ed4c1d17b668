"""`drorae inspect` of sources on a real S3 server."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drorae.store import files
from pipelines import cli

pytestmark = pytest.mark.slow


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def inspect_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main(["inspect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_class_folders(
    s3_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    for number in range(8):
        name = f"{('cat', 'dog')[number % 2]}/{number}.jpg"
        files.write_bytes(f"{s3_uri}/photos/{name}", encoded(number))
    files.write_bytes(f"{s3_uri}/photos/cat/broken.jpg", b"no picture")
    sheet = tmp_path / "sheet.png"
    found = inspect_json(capsys, f"{s3_uri}/photos", "--sheet", str(sheet))
    assert found["class_names"] == ["cat", "dog"]
    assert found["images"] == 9
    assert found["sample"]["formats"] == {"JPEG": 8, "unknown": 1}
    ((key, _),) = found["sample"]["rejects"]
    assert key == "cat/broken.jpg"
    assert sheet.exists()


def test_archives(s3_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 6), ("val", 3)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for number in range(count):
                for name, data in ((f"{number}.jpg", encoded(number)), (f"{number}.cls", b"1")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        files.write_bytes(f"{s3_uri}/set/{split}-000000.tar", buffer.getvalue())
    found = inspect_json(capsys, f"{s3_uri}/set")
    assert found["class_names"] == ["1"]
    assert [split["images"] for split in found["splits"]] == [6, 3]
    assert found["sample"]["rejects"] == []


def test_a_missing_place_is_one_line(s3_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{s3_uri}/nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "does not exist or is empty" in captured.err
