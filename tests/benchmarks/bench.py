"""Benchmarks of the models: one run, one Markdown and one JSON file. See README.md beside this.

PYTHONPATH=. python tests/benchmarks/bench.py --device cpu --sizes small --write
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bench_device
import bench_diffusion
import bench_fusion
import bench_loader
import bench_loop
import torch
from bench_timing import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
SECTIONS = {
    "fusion": "Fusion, forward and backward, against a loop over layers",
    "training": "DiT-DH, forward and backward, against the plain re-statement",
    "sampling": "DiT-DH, 50 Euler steps, against the plain re-statement",
    "mfu": "DiT-DH training step with AdamW, bfloat16",
    "compile": "torch.compile, forward and backward, bfloat16",
    "encoding": "Images to latents, bfloat16",
    "loops": "Training loops against bare ones, and the share of checkpoints",
    "loader": "Latents from a mapped array into batches, against plain copies",
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.without_onednn:
        torch.backends.mkldnn.set_flags(False)
    device = torch.device(options.device)
    report: dict[str, Any] = describe(device, options)
    for section in options.sections:
        say(f"\n## {SECTIONS[section]}\n")
        report["sections"][section] = [
            show(row, is_first=index == 0)
            for index, row in enumerate(rows(section, device, options))
        ]
    if options.write:
        write(report, options.date)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--sizes", choices=("tiny", "small", "full"), default=None)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=None)
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-onednn", action="store_true", help="MKL for every product")
    parser.add_argument("--write", action="store_true", help="write the results files")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    options.sizes = options.sizes or ("full" if on_gpu else "small")
    options.precision = options.precision or (["float32", "bfloat16"] if on_gpu else ["float32"])
    everything = on_gpu or options.sizes == "tiny"
    options.sections = options.sections or list(SECTIONS if everything else list(SECTIONS)[:3])
    return options


def rows(section: str, device: torch.device, options: argparse.Namespace) -> Iterable[dict]:
    sizes, repeats = options.sizes, options.repeats
    paired = {
        "fusion": bench_fusion.rows,
        "training": bench_diffusion.training_rows,
        "sampling": bench_diffusion.sampling_rows,
    }
    if section in paired:
        for precision in options.precision:
            yield from paired[section](device, sizes, precision, repeats)
        return
    alone = {
        "mfu": bench_device.mfu_rows,
        "compile": bench_device.compile_rows,
        "encoding": bench_device.encoding_rows,
        "loops": bench_loop.rows,
        "loader": bench_loader.rows,
    }
    yield from alone[section](device, sizes, repeats)


def describe(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    processor = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    wanted = ("Model name", "CPU(s)", "CPU family", "L2 cache", "L3 cache")
    lines = (line.partition(":") for line in processor.splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines if name.strip() in wanted}
    is_gpu = device.type == "cuda"
    return {
        "date": options.date,
        "command": "python tests/benchmarks/bench.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "processor": found or platform.processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "python": platform.python_version(),
        "sizes": options.sizes,
        "onednn": not options.without_onednn,
        "repeats": options.repeats,
        "sections": {},
    }


def show(row: dict, *, is_first: bool) -> dict:
    if is_first:
        say("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    say("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    return row


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write(report: dict[str, Any], date: str) -> None:
    """Markdown for people, JSON for programs, under one name."""
    name = f"{date}-models-{report['device'].replace(' ', '-').lower()}"
    name += f"-{report['threads']}-threads" if report["device"] == "cpu" else ""
    name += "" if report["onednn"] else "-without-onednn"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# Benchmark of the models, {date}", ""]
    lines += [f"- {key}: {value}" for key, value in report.items() if key != "sections"]
    for section, table in report["sections"].items():
        columns = list(dict.fromkeys(key for row in table for key in row))
        lines += ["", f"## {SECTIONS[section]}", "", f"| {' | '.join(columns)} |"]
        lines += ["|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in table]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    say(f"\nwrote {RESULTS / name}.md and .json")


if __name__ == "__main__":
    main()
