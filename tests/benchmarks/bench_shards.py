"""The shard stage against the writers of webdataset and mosaicml-streaming, in CPU seconds.

PYTHONPATH=. python tests/benchmarks/bench_shards.py [--images 200] [--packages FOLDER]

The same JPEGs of 500 x 375 in the same process: each is read, decoded, checked by its digest, and
written as the exact square (PNG, one encoder for all) or as its own bytes. A package that is not
there is left out with a message; `--packages` is a folder of `pip install --target`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from drorae.data.decoding import ImageLimits, decode_image, encode_png, to_square
from drorae.data.jobs import ShardJob
from drorae.data.shard_files import content_digest
from drorae.data.shard_map import run_in_process
from drorae.data.sharding import run_shard
from drorae.store.context import StageContext

SIZE_PX = (500, 375)
SIDE_PX = 256
LIMITS = ImageLimits(min_side_px=1, max_aspect_ratio=1000.0, max_pixels=100_000_000)

Write = Callable[[Path, str, str], None]
"""Called with the folder of sources, the kind of pictures and the folder to write to."""


def make_photos(root: Path, count: int) -> None:
    """Smooth noise of four scales, 60 to 110 kB as JPEG."""
    for number in range(count):
        rng = np.random.default_rng(number)
        total = np.zeros((SIZE_PX[1], SIZE_PX[0], 3), np.float32)
        for width, weight in ((4, 90), (16, 60), (64, 30), (250, 30)):
            small = rng.integers(0, 256, (width, width, 3), dtype=np.uint8)
            large = Image.fromarray(small).resize(SIZE_PX, Image.Resampling.BICUBIC)
            total += weight * (np.asarray(large, np.float32) / 255 - 0.5)
        image = Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8))
        path = root / f"{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=94)


def samples(photos: Path, pictures: str) -> Iterator[tuple[str, bytes, int]]:
    """Key, picture and label, made as the stage makes them."""
    for path in sorted(photos.rglob("*.jpg")):
        data = path.read_bytes()
        image = decode_image(data, LIMITS)
        content_digest(data)
        if pictures == "square":
            data = encode_png(to_square(image, SIDE_PX, "center"))
        yield path.stem, data, int(path.parent.name)


def write_ours(photos: Path, pictures: str, target: str) -> None:
    job = ShardJob(source=str(photos), pictures=pictures, val_fraction=0.0, rows_per_shard=1024)  # pyright: ignore[reportArgumentType]
    ctx = StageContext(stage="shard", key="k", output_uri=target)
    run_shard(ctx, shard=job, executor=run_in_process)


def write_webdataset(photos: Path, pictures: str, target: str) -> None:
    from webdataset import ShardWriter  # pyright: ignore[reportMissingImports] - comparison only

    Path(target).mkdir()
    with ShardWriter(f"{target}/%05d.tar", maxcount=1024, verbose=0) as writer:
        for key, data, label in samples(photos, pictures):
            writer.write({"__key__": key, "img": data, "cls": str(label).encode()})


def write_streaming(photos: Path, pictures: str, target: str) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports] - comparison only

    columns = {"key": "str", "image": "bytes", "label": "int"}
    with MDSWriter(out=target, columns=columns, hashes=["sha256"]) as writer:
        for key, data, label in samples(photos, pictures):
            writer.write({"key": key, "image": data, "label": label})


WRITERS: dict[str, Write] = {
    "ours": write_ours,
    "webdataset": write_webdataset,
    "streaming": write_streaming,
}


def cpu_ms(write: Write, photos: Path, pictures: str, count: int) -> float:
    """CPU milliseconds an image, of all threads."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        write(photos, pictures, f"{folder}/out")
        return 1000 * (time.process_time() - start) / count


def present() -> dict[str, Write]:
    found = {}
    for name, write in WRITERS.items():
        try:
            if name != "ours":
                __import__(name)
            found[name] = write
        except ImportError as error:
            sys.stdout.write(f"{name} is left out: {error}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--packages", help="folder with webdataset and streaming")
    options = parser.parse_args()
    if options.packages:
        sys.path.append(options.packages)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder)
        make_photos(photos, options.images)
        size = sum(path.stat().st_size for path in photos.rglob("*.jpg")) / options.images
        sys.stdout.write(f"{options.images} JPEGs of {size / 1000:.0f} kB\n")
        for pictures in ("square", "source"):
            times = {name: float("inf") for name in present()}
            for _ in range(options.repeats):
                for name in times:
                    spent = cpu_ms(WRITERS[name], photos, pictures, options.images)
                    times[name] = min(times[name], spent)
            for name, spent in times.items():
                ratio = spent / times["ours"]
                line = f"{pictures:7} {name:11} {spent:6.2f} CPU-ms an image, {ratio:.2f} of ours"
                sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
