"""Where a stage waits for the host or the network instead of the GPU, by the number of GPUs.

One formula for any number n of GPUs, on nodes of `Cluster.gpus_per_node`. With b images a GPU and
step, all times in seconds:

    gpu     = b x FLOPs of an image / (peak x MFU)
    loop    = a constant: what the loop's thread does in a step beside launching kernels
    loader  = b x CPU seconds of an image / cores of a GPU
    reads   = images of a node and step x bytes of an image / network
    reduce  = k (n - 1) / n x bytes of the gradients / bandwidth

with k = 2 for an all-reduce (a ring sends everything twice), half of it in bfloat16, and 3 for
FSDP2 (two gathers of weights, always in float32, and a scatter of gradients), at the bandwidth of
NVLink within one node and of a node's network between nodes. All of it runs side by side, reads and
reduction share the network, so

    step    = max(gpu, loop, loader, reads + reduce)

which is the least that it can be: nothing is counted for the start and end of overlaps, for smaller
matrices at fewer images a GPU, or for launching kernels. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "COPIES_SENT",
    "GPU_COUNTS",
    "NVLINK_GB_S",
    "Budget",
    "Cluster",
    "Load",
    "budget",
    "budgets",
]

GPU_COUNTS = (8, 64, 128)
"""Numbers of GPUs that `drorae plan --cost` extrapolates to."""
NVLINK_GB_S = 450.0
"""One direction, one GPU. NVIDIA H100 SXM data sheet: 900 GB/s both ways."""
COPIES_SENT = {"none": (0, 2), "ddp": (0, 2), "fsdp2": (2, 1)}
"""Times that a step sends the weights, and the gradients, by `compute.sharding`."""

Bound = Literal["gpu", "loop", "loader", "network"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The machines of an extrapolation."""

    gpus_per_node: int = 8
    """GPUs that share a network connection and NVLink."""
    cores_per_gpu: int = 12
    """CPU cores for each GPU, as in infra/kubernetes."""
    network_gbps: float = 100.0
    """10^9 bits a second that a node receives, and sends, all its connections together."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("gpus_per_node", "cores_per_gpu", "network_gbps"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0.")

    @property
    def network_bytes_s(self) -> float:
        """Bytes a second of a node's network."""
        return self.network_gbps * 1e9 / 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one image of a stage asks of every part of a machine."""

    stage: str
    """Its name."""
    images: int
    """Images of the whole stage, repeats counted."""
    step_images: int
    """Images of a step: of the global batch, or of one GPU if `grows`."""
    grows: bool = False
    """Whether every GPU works on batches of its own, so that more GPUs mean more images a step."""
    gpu_s: float
    """GPU seconds of an image."""
    loop_s: float = 0.0
    """Seconds of the loop's thread in a step."""
    cpu_s: float
    """CPU seconds to read, decode and collate an image."""
    read_bytes: float
    """Bytes read from the store."""
    gradient_bytes: float = 0.0
    """Bytes of all gradients in float32; 0: nothing is reduced."""
    copies: tuple[int, int] = (0, 2)
    """Times that as many bytes of weights, and they, are sent (`COPIES_SENT`)."""
    halved: bool = False
    """Whether gradients are sent in bfloat16 (`compute.reduce_dtype`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """One stage on one number of GPUs; seconds of a step, without overlaps."""

    stage: str
    """Its name."""
    gpus: int
    """Number of GPUs."""
    images_per_gpu: int
    """Images of a step on one GPU."""
    gpu_s: float
    """GPU time."""
    loop_s: float
    """Time of the loop's thread."""
    loader_s: float
    """Time of the loader on all cores of a GPU."""
    loader_cores: float
    """Cores a GPU that keep up with it."""
    read_gbps: float
    """10^9 bits a second that a node reads while the GPUs never wait."""
    reads_s: float
    """Time of a node's reads."""
    reduce_s: float
    """Time of the reduction in float32."""
    reduce_half_s: float
    """The same in bfloat16."""
    halved: bool
    """Which of the two it is."""
    hours: float
    """Wall-clock hours of the stage."""
    bound: Bound
    """What takes longest."""

    @property
    def step_s(self) -> float:
        """Seconds of a step: the longest of the four."""
        return max(self.gpu_s, self.loop_s, self.loader_s, self.network_s)

    @property
    def network_s(self) -> float:
        """Seconds of a step in which the network is busy."""
        return self.reads_s + (self.reduce_half_s if self.halved else self.reduce_s)


def budget(load: Load, gpus: int, cluster: Cluster) -> Budget | None:
    """Extrapolate a stage to a number of GPUs; None where the batch cannot be divided by it."""
    if not load.grows and load.step_images % gpus:
        return None
    mine = load.step_images if load.grows else load.step_images // gpus
    node_images = mine * min(gpus, cluster.gpus_per_node)
    reads_s = node_images * load.read_bytes / cluster.network_bytes_s
    reduce_s, reduce_half_s = (_reduce_s(load, gpus, cluster, factor) for factor in (1.0, 0.5))
    times: dict[Bound, float] = {
        "gpu": mine * load.gpu_s,
        "loop": load.loop_s,
        "loader": mine * load.cpu_s / cluster.cores_per_gpu,
        "network": reads_s + (reduce_half_s if load.halved else reduce_s),
    }
    bound = max(times, key=lambda kind: times[kind])  # the first of equal ones
    steps = load.images / (mine * gpus)
    return Budget(
        stage=load.stage,
        gpus=gpus,
        images_per_gpu=mine,
        gpu_s=times["gpu"],
        loop_s=times["loop"],
        loader_s=times["loader"],
        loader_cores=load.cpu_s / load.gpu_s,
        read_gbps=8e-9 * node_images * load.read_bytes / times["gpu"],
        reads_s=reads_s,
        reduce_s=reduce_s,
        reduce_half_s=reduce_half_s,
        halved=load.halved,
        hours=steps * times[bound] / 3600,
        bound=bound,
    )


def budgets(loads: Sequence[Load], gpu_counts: Sequence[int], cluster: Cluster) -> list[Budget]:
    """Every stage on every number of GPUs that its batch can be divided by."""
    found = (budget(load, gpus, cluster) for load in loads for gpus in gpu_counts)
    return [one for one in found if one is not None]


def _reduce_s(load: Load, gpus: int, cluster: Cluster, factor: float) -> float:
    """Seconds of the reduction, with gradients of `factor` times the bytes of float32."""
    weights, gradients = load.copies
    sent_bytes = (weights + factor * gradients) * load.gradient_bytes
    on_one_node = gpus <= cluster.gpus_per_node
    bytes_s = NVLINK_GB_S * 1e9 if on_one_node else cluster.network_bytes_s
    return (gpus - 1) / gpus * sent_bytes / bytes_s
