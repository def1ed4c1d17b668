"""Connect to Ray: the cluster that RAY_ADDRESS names, else a small local one."""

import os

import ray

from drorae.config import Compute

OBJECT_STORE_BYTES = 300 << 20
"""Local object store; tasks and results are small, images and latents travel by files."""

MIN_LOGICAL_CPUS = 4
"""Ray Data hangs when actors hold every CPU and a read task needs one; logical CPUs may exceed real
ones."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment set before start-up unless the user set it: no usage report, no change warning of Ray
2.60."""


def connect_ray(compute: Compute, *, log_to_driver: bool = False) -> bool:
    """Connect this process to Ray; nothing happens when it is connected already.

    Args:
        compute: Number of workers and actors that must fit beside each other.
        log_to_driver: Show the output of workers here.

    Returns:
        Whether a local Ray was started (so that the caller may stop it).

    Raises:
        RuntimeError: RAY_ADDRESS is set but nothing answers there.
    """
    if ray.is_initialized():
        return False
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address, log_to_driver)
        return False
    ray.init(
        address="local",
        num_cpus=logical_cpus(compute),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=log_to_driver,
    )
    return True


def logical_cpus(compute: Compute) -> int:
    """CPUs to announce to a local Ray: room for all workers, all actors and two more tasks."""
    wanted = compute.num_workers + compute.data_actors * compute.parallel_stages + 2
    return max(MIN_LOGICAL_CPUS, os.cpu_count() or 1, wanted)


def _connect(address: str, log_to_driver: bool) -> None:
    try:
        ray.init(address=address, log_to_driver=log_to_driver)
    except ConnectionError as error:
        raise RuntimeError(
            f"RAY_ADDRESS={address!r} does not answer ({error}): expected a running Ray head. "
            "Start it, correct the address, or unset RAY_ADDRESS to run on this machine."
        ) from error
