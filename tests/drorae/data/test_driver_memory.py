"""The driver of the shard stage holds columns, not objects."""

import os
import subprocess
import sys
from pathlib import Path

BYTES_PER_IMAGE = 1_200
"""Most that an image adds to the peak: 300,000 images fit 1 GB beside the program."""


def test_the_drivers_memory_grows_by_a_kilobyte_an_image(tmp_path: Path):
    count = 40_000
    script = Path(__file__).with_name("measure_driver.py")
    command = [sys.executable, str(script), str(count), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth_bytes = int(done.stdout.split()[0])
    assert growth_bytes / count < BYTES_PER_IMAGE
