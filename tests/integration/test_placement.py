"""Where work runs on a cluster whose head declares no GPU: two nodes declare one each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from drorae.config import to_json
from drorae.evaluation.job import EvaluateJob
from tests.drorae.evaluation.evaluation_fakes import make_encoder, make_lpips, make_outputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOB = EvaluateJob(
    num_val_images=0,
    num_samples=7,
    guidances=("unguided", "cfg"),
    num_grid_points=3,
    feature_px=32,
    kid_subset=4,
    isc_splits=2,
    batch_images=4,
    chunk_samples=3,
    chunk_photos=4,
    bootstrap_replicates=100,
    lpips_net="alex",
    num_grid_images=2,
    num_diagnostic_images=5,
)

# Ray reads the cluster's token when it is first imported.
DRIVER = """
import pathlib, sys
from tests.chaos import cluster
with cluster.running(2, {}, num_gpus=1):
    from tests.integration import placement_driver
    placement_driver.main(pathlib.Path(sys.argv[1]))
"""


def write_assets(folder: Path) -> None:
    """Random weights in place of the two networks that evaluate needs."""
    torch.manual_seed(0)
    features = folder / "efficientnet-lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), features)
    index = {}
    for path in (features, make_lpips(folder)):
        index[path.stem] = {"files": [{"name": path.name, "size_bytes": path.stat().st_size}]}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver reported."""
    folder = tmp_path_factory.mktemp("placement")
    for name in ("assets", "encoder", "stages", "cache"):
        (folder / name).mkdir()
    write_assets(folder / "assets")
    encoder = make_encoder(folder / "encoder")
    outputs = make_outputs(folder / "stages", encoder)
    inputs = {"outputs": to_json(outputs), "encoder": to_json(encoder), "evaluate": to_json(JOB)}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    environment = {
        "DRORAE_ASSETS": str(folder / "assets"),
        "DRORAE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "RAY_raylet_start_wait_time_s": "120",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_actors_and_ranks_run_where_gpus_are_declared_and_the_driver_on_the_head(
    ran: dict[str, Any],
) -> None:
    assert ran["driver"] == ran["head"]
    assert ran["head"] not in ran["declare_gpus"]
    assert len(ran["declare_gpus"]) == 2
    assert ran["num_ranks"] == 2
    for kind in ("ranks", "evaluate"):
        assert set(ran[kind].values()) == set(ran["declare_gpus"]), kind


def test_every_task_of_evaluate_ran_in_an_actor(ran: dict[str, Any]) -> None:
    kinds = {name.partition("-")[0] for name in ran["evaluate"]}
    assert kinds == {"reconstruct", "real", "inspect", "unguided", "cfg", "measure"}


def test_two_actors_find_what_one_process_finds_bit_for_bit(ran: dict[str, Any]) -> None:
    assert ran["on_actors"] == ran["in_process"]
