"""Every scenario, each in a process of its own with its own cluster."""

import subprocess
import sys

import pytest

from tests.chaos.cluster import REPOSITORY
from tests.chaos.scenarios import SCENARIOS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_stage_survives(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--only", name],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
