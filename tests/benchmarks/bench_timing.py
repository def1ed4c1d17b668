"""Interleaved timing, agreement of two implementations, FLOPs and peak memory."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 TFLOP/s from the makers' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, as it does once a process has freed a few large tensors.

    By default a young process gives a tensor of a few MB back at once, and the next one costs a
    page fault for every 4 KiB: on 2026-11-24, 8 images of 16 tokens, that was a quarter to a third
    of our fusion's time and none of the plain one's, whose tensors are smaller. In the stages'
    loops (section `loops`) it made no measurable difference. Elsewhere than on glibc nothing
    happens.

    Returns:
        Whether it is so.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 1 << 30}
    return all(libc.mallopt(name, value) for name, value in settings.items())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each function; each round runs all of them, in turn first."""
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronise(device)
            start = time.perf_counter()
            runs[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    wide, reference = actual.detach().double(), expected.detach().double()
    return float((wide - reference).norm() / reference.norm().clamp_min(1e-30))


def require_agreement(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> float:
    """Largest relative error over tensors of the same names.

    Raises:
        RuntimeError: An error above the tolerance: a ratio of times would compare different work.
    """
    if actual.keys() != expected.keys():
        raise RuntimeError(f"Different tensors: {sorted(actual.keys() ^ expected.keys())}.")
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        raise RuntimeError(
            f"{worst} differs by {errors[worst]:.2e} relative: expected at most {tolerance:.0e}; "
            "the two implementations do not compute the same."
        )
    return errors[worst]


def count_flops(module: nn.Module, arguments: Callable[[], tuple[Tensor, ...]]) -> int:
    """FLOPs of one forward and backward pass, counted on the meta device."""
    module = module.to("meta")
    with torch.device("meta"):
        inputs = arguments()
    counter = FlopCounterMode(display=False)
    with counter:
        module(*inputs).sum().backward()
    return counter.get_total_flops()


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Most memory that the run holds at once, with what was there before; none on a CPU."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 2**20
