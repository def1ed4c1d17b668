"""A GPU host may have nothing but torch, transformers, safetensors, numpy and pytest."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Runs first in a fresh interpreter: what no distribution of the five needs cannot be imported.
BLOCKER = """
import importlib.metadata as metadata
import sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def needed(names):
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-").replace(".", "-")
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in requirements:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found

allowed = needed(["torch", "transformers", "safetensors", "numpy", "pytest"])
blocked = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not any(o.lower().replace("_", "-").replace(".", "-") in allowed for o in owners)
    and module not in ("drorae", "pipelines", "tests") and module not in sys.stdlib_module_names
}

class Filtered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Filtered
"""

IMPORTS = """
import importlib
import pkgutil

assert {"ray", "mlflow", "prefect", "pyarrow", "jaxtyping", "PIL"} <= blocked, sorted(blocked)
names = ["drorae.checkpoint", "drorae.parity.__main__"]
# The three that join the loops to stages, held-out images and Ray need more.
left_out = {"drorae.training.stages", "drorae.training.evaluators", "drorae.training.ray_worker"}
for package in ("models", "losses", "diffusion", "training", "parity"):
    path = importlib.import_module(f"drorae.{package}").__path__
    names += [module.name for module in pkgutil.walk_packages(path, f"drorae.{package}.")]
for name in sorted(set(names) - left_out):
    importlib.import_module(name)
print(len(names))
"""

COLLECT = """
import pytest
folders = [f"tests/drorae/{name}" for name in ("models", "losses", "diffusion", "training")]
# Whole stages read shards, which needs more.
left_out = "--ignore=tests/drorae/training/test_training_stages.py"
arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", left_out, *folders]
sys.exit(pytest.main([*arguments, "tests/drorae/test_parity.py"]))
"""


def run_blocked(code: str) -> str:
    # Plugins of pytest are found by entry points, which would import what is blocked.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_models_losses_diffusion_loops_and_parity_import_there():
    assert int(run_blocked(IMPORTS)) > 40


def test_their_tests_are_collected_there():
    shown = run_blocked(COLLECT)
    for name in ("models/test_dit.py", "training/test_tokenizer.py", "test_parity.py"):
        assert name in shown
