"""Where stages wait for the host or the network, as a table, in words, and as JSON."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from drorae.config import to_json

if TYPE_CHECKING:
    from drorae.cost.budgets import Budget, Cluster

COLUMNS = (
    *("GPUs", "images", "GPU ms", "loop ms", "loader ms", "cores per GPU"),
    *("Gb/s per node", "reads ms", "reduce ms", "in bfloat16", "step ms", "hours", "bound by"),
)

LATENT_STAGES = ("diffusion", "guide")
"""Stages that read latents, of which a shard holds both views."""


def budgets_json(found: "Sequence[Budget]", cluster: "Cluster") -> dict[str, Any]:
    """Return the extrapolation and the machines that it is for."""
    rows = [to_json(budget) | {"step_s": budget.step_s} for budget in found]
    return {"cluster": to_json(cluster), "budgets": rows}


def print_budgets(
    found: "Sequence[Budget]", cluster: "Cluster", shard_cpu_s: float, console: Console
) -> None:
    """Print the extrapolation, its formula, and what to change where the GPU waits.

    Args:
        found: Stages by number of GPUs.
        cluster: The machines.
        shard_cpu_s: CPU seconds of stage `shard`; 0 if it does not run.
        console: Where to print.
    """
    if shard_cpu_s:
        _line(console, _shard(shard_cpu_s, cluster))
    if not found:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("step of")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for budget in found:
        table.add_row(*_cells(budget))
    console.print(table)
    for line in (_formula(cluster), *_advices(found, cluster)):
        _line(console, line)


def _cells(budget: "Budget") -> list[str]:
    times = (budget.gpu_s, budget.loop_s, budget.loader_s)
    network = (budget.reads_s, budget.reduce_s, budget.reduce_half_s, budget.step_s)
    return [
        budget.stage,
        str(budget.gpus),
        str(budget.images_per_gpu),
        *(_ms(seconds) for seconds in times),
        f"{budget.loader_cores:.2g}",
        f"{budget.read_gbps:.2g}",
        *(_ms(seconds) for seconds in network),
        f"{budget.hours:,.2f}",
        budget.bound,
    ]


def _formula(cluster: "Cluster") -> str:
    return (
        f"Nodes of {cluster.gpus_per_node} GPUs, {cluster.cores_per_gpu} cores a GPU, "
        f"{cluster.network_gbps:g} Gb/s a node. A step takes the longest of GPU, loop thread, "
        "loader and network (reads + reduction), at best. Reduction in a ring: 2 (n-1)/n x 4 bytes "
        "x trained values (3 with fsdp2), within a node over NVLink. Launches of kernels and the "
        "lower speed of small batches are left out, and counts that do not divide the batch."
    )


def _advices(found: "Sequence[Budget]", cluster: "Cluster") -> list[str]:
    """Say for each stage that waits from how many GPUs, for what, and what to change."""
    lines: dict[tuple[str, str], str] = {}
    for budget in found:
        if budget.bound != "gpu":
            lines.setdefault((budget.stage, budget.bound), _advice(budget, cluster))
    return list(lines.values()) or ["No stage waits for the host or the network."]


def _advice(budget: "Budget", cluster: "Cluster") -> str:
    start = f"{budget.stage} from {budget.gpus} GPUs on: "
    if budget.bound == "loop":
        return start + (
            f"host-bound, {_ms(budget.loop_s)} ms of the loop's thread for {_ms(budget.gpu_s)} ms "
            f"of GPU; lower compute.num_workers, or raise {budget.stage}'s batch_images."
        )
    if budget.bound == "loader":
        return start + (
            f"host-bound, {budget.loader_cores:.0f} cores a GPU would keep up, "
            f"{cluster.cores_per_gpu} are there; give every GPU more."
        )
    needed = cluster.network_gbps * budget.network_s / budget.gpu_s
    start += f"network-bound, {needed:.0f} Gb/s a node would keep up"
    if budget.reads_s > budget.network_s / 2:
        less = ": latents.flip=false halves them" if budget.stage in LATENT_STAGES else ""
        return f"{start}; mostly for its reads{less}."
    return (
        f"{start}; mostly the reduction, {_ms(budget.reduce_s)} ms in float32 and "
        f"{_ms(budget.reduce_half_s)} ms in bfloat16 (compute.reduce_dtype); lower "
        f"compute.num_workers, or raise {budget.stage}'s batch_images."
    )


def _shard(cpu_s: float, cluster: "Cluster") -> str:
    node_cores = cluster.gpus_per_node * cluster.cores_per_gpu
    hours = cpu_s / 3600
    return (
        f"shard: {hours:,.1f} core-hours, {hours / node_cores * 60:,.1f} minutes of a node's "
        f"{node_cores} cores, which compute.data_actors has to name."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
