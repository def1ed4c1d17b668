import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli

LOADS = (
    "import sys; from pipelines import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def plan(workspace: Path, *arguments: str) -> int:
    return cli.main(["plan", "--recipe", "cifar10", *arguments, "--workspace", str(workspace)])


def test_a_recipe_on_a_gpu_prints_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "--set", "compute.use_gpu=true", "--set", "compute.num_workers=2") == 0
    out = capsys.readouterr().out
    assert "20,292,212" in out  # parameters of the generator
    assert "GPU-hours at 0.4 of the peak: 989.4 TFLOP/s" in out
    assert "50,000 x 384 x 8 x 8 x 2 bytes x 2 views" in out
    memory = [line.split() for line in out.splitlines() if line.startswith("diffusion ")]
    assert ["none", "128"] in [line[1:3] for line in memory]
    assert ["ddp", "64"] in [line[1:3] for line in memory]


def test_the_cost_as_json_scales_with_rate_and_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cost(*arguments: str) -> dict[str, Any]:
        assert plan(tmp_path, "--json", "--cost", *arguments) == 0
        return json.loads(capsys.readouterr().out)["cost"]

    once, slow = cost(), cost("--mfu", "0.1", "--train-images", "1000")
    hours, slow_hours = once["gpu_hours"], slow["gpu_hours"]
    assert set(hours) >= {"decoder", "fusion", "latents", "diffusion", "guide", "evaluate"}
    assert slow_hours["diffusion"] == pytest.approx(4 * hours["diffusion"])
    assert slow_hours["latents"] == pytest.approx(4 * hours["latents"] / 50)


@pytest.mark.parametrize("arguments", [["--json"], ["--no-cost", "--set", "compute.use_gpu=true"]])
def test_a_plan_without_costs_loads_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    command = ["plan", "--recipe", "cifar10", *arguments, "--workspace", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *command], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "GPU-hours" not in done.stdout


@pytest.mark.parametrize("rate", [["--mfu", "0"], ["--mfu", "1.5"], ["--peak-tflops", "-1"]])
def test_impossible_rates_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: list[str]
) -> None:
    assert plan(tmp_path, "--cost", *rate) == 2
    assert "expected a positive peak" in capsys.readouterr().err


def test_the_cost_says_where_a_recipe_waits_and_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "--cost", "--network-gbps", "10") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nodes of 8 GPUs, 12 cores a GPU, 10 Gb/s a node" in out
    assert "GPUs on: network-bound" in out
    assert "latents.flip=false halves" in out
    assert "core-hours" in out  # of stage shard


def test_the_budgets_as_json_follow_the_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = ["--network-gbps", "40", "--gpus-per-node", "4"]
    assert plan(tmp_path, "--json", "--cost", *machines) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    (budget,) = (
        row for row in cost["budgets"] if row["stage"] == "diffusion" and row["gpus"] == 64
    )
    node_bytes = 4 * budget["images_per_gpu"] * 384 * 8 * 8 * 2 * 2
    assert budget["reads_s"] == pytest.approx(node_bytes / 5e9)
    assert cost["cluster"]["gpus_per_node"] == 4


def test_a_network_of_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "--cost", "--network-gbps", "0") == 2
    assert "--network-gbps 0.0: expected more than 0" in capsys.readouterr().err
