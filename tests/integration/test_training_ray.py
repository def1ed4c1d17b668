"""Groups of training workers on a real local Ray: which failures start them again."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray.cloudpickle
import torch
from torch import distributed as dist
from torch import nn

from drorae.config import Compute
from drorae.failure import Fatal
from drorae.store.context import StageContext, StageResult
from drorae.training.guards import FiniteGuard
from drorae.training.jobs import OptimConfig
from drorae.training.optim import build_optimizer
from drorae.training.ray_worker import train_on_ray
from drorae.training.world import World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    # Ray 2.60 warns of options of its own that nobody set, each time it copies its DataContext.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

# Workers do not see the test folder.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TIMEOUT_S = 400.0


def train(ctx: StageContext, world: World, *, folder: str, fault: str) -> StageResult:
    """Note the start of this rank, then meet the fault while the others wait in a collective."""
    starts = len(list(Path(folder).glob(f"{world.rank}-*")))
    Path(folder, f"{world.rank}-{starts}").touch()
    if world.world_size > 1:
        dist.barrier()
    if fault == "nan":
        _meet_a_nan(world)
    elif world.rank == 1 and fault == "mistake":
        raise ValueError("batch_images=7 does not divide")
    elif world.rank == 1 and fault == "kill" and starts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if world.world_size > 1:
        dist.all_reduce(torch.zeros(1))
    return StageResult(files=[], metrics={"loss": 1.0})


def _meet_a_nan(world: World) -> None:
    layer = nn.Linear(2, 1)
    guard = FiniteGuard(build_optimizer(layer, OptimConfig(lr=0.1)), world.device, world=world)
    guard.arm(3, torch.tensor(float("nan") if world.rank == world.world_size - 1 else 1.0))
    guard.check("fusion", OptimConfig())


@pytest.fixture
def run(tmp_path: Path):
    def start(fault: str, num_workers: int = 2) -> StageResult:
        folder = tmp_path / "starts"
        folder.mkdir()
        compute = Compute(num_workers=num_workers, collective_timeout_s=TIMEOUT_S)
        ctx = StageContext(
            stage="fusion", key="k", output_uri=str(tmp_path / "out"), compute=compute
        )
        return train_on_ray(ctx, train, {"folder": str(folder), "fault": fault})

    return start


def starts_of(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "starts").iterdir())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_stage_in_its_first_run(run, tmp_path, num_workers):
    with pytest.raises(Fatal, match="is not finite at step 3"):
        run("nan", num_workers)
    assert starts_of(tmp_path) == [f"{rank}-0" for rank in range(num_workers)]


@pytest.mark.timeout(TIMEOUT_S / 2)
def test_a_mistake_of_one_rank_ends_the_others_that_wait_for_it(run, tmp_path):
    with pytest.raises(ValueError, match="batch_images=7 does not divide"):
        run("mistake")
    assert starts_of(tmp_path) == ["0-0", "1-0"]


def test_a_killed_worker_starts_the_group_again(run, tmp_path):
    assert run("kill").metrics == {"loss": 1.0}
    assert starts_of(tmp_path) == ["0-0", "0-1", "1-0", "1-1"]
