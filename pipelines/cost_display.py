"""The cost of a run as tables for a terminal, and as JSON."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from drorae.config import to_json

if TYPE_CHECKING:
    from drorae.cost.run import RunCost
    from drorae.cost.stages import Memory, StageCost

GIGA = 1e9
MEMORY_PARTS = ("weights", "gradients", "optimizer", "average", "buckets", "activations")


def cost_json(cost: "RunCost", peak_tflops: float, mfu: float) -> dict[str, Any]:
    """Return the counts, with the hours that follow from a rate."""
    hours = {stage.stage: stage.gpu_hours(peak_tflops, mfu) for stage in cost.stages}
    return to_json(cost) | {"peak_tflops": peak_tflops, "mfu": mfu, "gpu_hours": hours}


def print_cost(cost: "RunCost", peak_tflops: float, mfu: float, console: Console) -> None:
    """Print networks, stages, memory and storage, each with its assumptions."""
    _print_networks(cost, console)
    _print_stages(cost, peak_tflops, mfu, console)
    _print_memory(cost, console)
    _print_storage(cost, console)


def check_rate(peak_tflops: float, mfu: float) -> None:
    """Refuse a rate that no GPU has.

    Raises:
        ValueError: A peak of 0 or less, or a share that is none.
    """
    if not peak_tflops > 0 or not 0 < mfu <= 1:
        raise ValueError(
            f"--peak-tflops {peak_tflops} --mfu {mfu} make no rate: expected a positive peak and a "
            "share of it above 0 and at most 1."
        )


def _print_networks(cost: "RunCost", console: Console) -> None:
    table = _table("network", "parameters", "trainable", "GFLOPs per image, forward")
    for network in cost.networks:
        gigaflops = f"{network.forward_flops / GIGA:,.2f}"
        table.add_row(network.name, f"{network.parameters:,}", f"{network.trainable:,}", gigaflops)
    console.print(table)
    split = ", ".join(f"{part} {count:,}" for part, count in cost.fusion_split.items())
    _line(console, f"fusion: {split}")


def _print_stages(cost: "RunCost", peak_tflops: float, mfu: float, console: Console) -> None:
    table = _table("stage", "million images", "GFLOPs per image and step", "EFLOPs", "GPU-hours")
    for stage in cost.stages:
        table.add_row(
            stage.stage,
            f"{stage.images / 1e6:,.2f}",
            _formats(stage.step_flops, GIGA, ",.1f"),
            _formats(stage.flops, 1e18, ",.2f"),
            f"{stage.gpu_hours(peak_tflops, mfu):,.1f}",
        )
    console.print(table)
    total = sum(stage.gpu_hours(peak_tflops, mfu) for stage in cost.stages)
    _line(
        console,
        f"{total:,.0f} GPU-hours at {mfu:g} of the peak: {peak_tflops:g} TFLOP/s in bfloat16, in "
        "tf32 half of it, in float32 0.068 of it (as an H100). Counted on the meta device: matrix "
        "products, convolutions and attention, forward and backward. "
        f"{cost.num_train_images:,} training images.",
    )


def _print_memory(cost: "RunCost", console: Console) -> None:
    rows = [(stage, kind, one) for stage in cost.stages for kind, one in stage.memory.items()]
    if not rows:
        return
    table = _table("GB per GPU", "parallel", "images", *MEMORY_PARTS, "total")
    for stage, kind, memory in rows:
        table.add_row(*_memory_cells(stage, kind, memory))
    console.print(table)
    _line(
        console,
        "4 bytes a value of weights, gradients, EMA and DDP's buckets, 8 of AdamW's moments; "
        "activations = images x what autograd keeps for one image in float32, with fused attention "
        "(half of it under bfloat16). An estimate: compilation keeps less, the allocator more.",
    )


def _memory_cells(stage: "StageCost", kind: str, memory: "Memory") -> list[str]:
    parts = [f"{getattr(memory, part) / GIGA:,.1f}" for part in MEMORY_PARTS]
    return [stage.stage, kind, str(memory.images), *parts, f"{memory.total / GIGA:,.1f}"]


def _print_storage(cost: "RunCost", console: Console) -> None:
    table = Table("storage", "GB", "how", box=None, pad_edge=False)
    for storage in cost.storage:
        table.add_row(storage.what, f"{storage.size_bytes / GIGA:,.1f}", storage.formula)
    console.print(table)


def _formats(flops: Mapping[str, float], unit: float, form: str) -> str:
    return ", ".join(f"{kind} {value / unit:{form}}" for kind, value in flops.items()) or "-"


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
