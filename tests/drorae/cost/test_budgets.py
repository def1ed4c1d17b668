from dataclasses import replace

import pytest

from drorae import recipes
from drorae.config import override
from drorae.cost.budgets import Budget, Cluster, Load, budget, budgets
from drorae.cost.loads import SHARD_CPU_S, count_loads, shard_cpu_s
from drorae.cost.run import count_run

CLUSTER = Cluster(gpus_per_node=8, cores_per_gpu=10, network_gbps=80)  # 10 GB/s a node
LOAD = Load(
    stage="diffusion",
    images=256_000,
    step_images=256,
    gpu_s=1e-3,
    cpu_s=1e-4,
    read_bytes=1e6,
    gradient_bytes=4e9,
)


def at(gpus: int, load: Load = LOAD) -> Budget:
    found = budget(load, gpus, CLUSTER)
    assert found is not None
    return found


def test_a_node_reads_the_images_of_its_gpus_and_reduces_over_nvlink() -> None:
    one = at(8)
    assert (one.images_per_gpu, one.gpu_s) == (32, pytest.approx(32e-3))
    assert one.reads_s == pytest.approx(256 * 1e6 / 10e9)
    assert one.read_gbps == pytest.approx(8e-9 * 256e6 / 32e-3)
    assert one.reduce_s == pytest.approx(2 * 7 / 8 * 4e9 / 450e9)


def test_between_nodes_the_reduction_takes_the_network() -> None:
    many = at(64)
    assert many.reduce_s == pytest.approx(2 * 63 / 64 * 4e9 / 10e9)
    assert many.reduce_half_s == many.reduce_s / 2
    assert many.bound == "network"
    assert many.step_s == pytest.approx(many.reduce_s + 32 * 1e6 / 10e9)
    assert many.hours == pytest.approx(1000 * many.step_s / 3600)


def test_bfloat16_halves_gradients_but_not_the_weights_of_sharded_training() -> None:
    plain = at(64)
    halved = at(64, replace(LOAD, halved=True))
    assert halved.network_s == pytest.approx(halved.reads_s + plain.reduce_s / 2)
    sharded = at(64, replace(LOAD, copies=(2, 1)))
    assert sharded.reduce_s == pytest.approx(1.5 * plain.reduce_s)
    assert sharded.reduce_half_s == pytest.approx(1.25 * plain.reduce_s)


def test_the_longest_part_is_the_bound() -> None:
    quiet = replace(LOAD, gradient_bytes=0, read_bytes=0)
    assert at(8, quiet).bound == "gpu"
    assert at(8, replace(quiet, loop_s=40e-3)).bound == "loop"
    slow = at(8, replace(quiet, cpu_s=20e-3))
    assert slow.bound == "loader"
    assert slow.loader_cores == pytest.approx(20)
    assert slow.step_s == pytest.approx(32 * 20e-3 / 10)


def test_a_count_that_does_not_divide_the_batch_has_no_budget() -> None:
    assert budget(LOAD, 48, CLUSTER) is None
    assert [one.gpus for one in budgets([LOAD], (8, 48, 64), CLUSTER)] == [8, 64]


def test_batches_of_its_own_on_every_gpu_halve_the_hours_of_twice_the_gpus() -> None:
    each = replace(LOAD, grows=True, gradient_bytes=0, read_bytes=0)
    assert at(128, each).images_per_gpu == 256
    assert at(128, each).hours == pytest.approx(at(64, each).hours / 2)


@pytest.mark.parametrize("setting", ["gpus_per_node", "cores_per_gpu", "network_gbps"])
def test_a_cluster_of_nothing_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Cluster(**{setting: 0})


def test_loads_of_the_paper_are_its_latents_and_gradients() -> None:
    full = recipes.get("imagenet256")
    stages = ["shard", "fusion", "latents", "diffusion", "evaluate"]
    loads = {load.stage: load for load in count_loads(full, count_run(full, stages), 989.4, 0.4)}
    assert list(loads) == ["fusion", "latents", "diffusion"]
    diffusion = loads["diffusion"]
    assert diffusion.read_bytes == 2 * 768 * 16 * 16 * 2  # both views
    assert diffusion.gradient_bytes == 4 * 838_380_628
    assert diffusion.gpu_s == pytest.approx(4.90e-3, rel=0.01)  # TF32 at 40 % of the peak
    assert loads["latents"].images == 1_281_167
    assert loads["latents"].grows


def test_sharding_takes_as_long_at_any_size_where_files_are_kept() -> None:
    assert shard_cpu_s(recipes.get("imagenet512"), 10) == pytest.approx(10 * SHARD_CPU_S)
    squares = override(recipes.get("cifar10"), ["shard.resolution_px=32"])
    assert shard_cpu_s(squares, 10) == pytest.approx(10 * SHARD_CPU_S / 64)


def test_sharded_training_sends_more() -> None:
    settings = ["compute.sharding=fsdp2", "compute.reduce_dtype=bfloat16"]
    full = override(recipes.get("cifar10"), settings)
    (load,) = count_loads(full, count_run(full, ["diffusion"]), 989.4, 0.4)
    assert (load.copies, load.halved) == ((2, 1), True)
