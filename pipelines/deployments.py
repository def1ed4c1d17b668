"""Register the deployments: `full`, and one per stage of the table.

`python -m pipelines.deployments --pool drorae --directory REPOSITORY` talks to the configured
Prefect server. The entry point is a module, so a worker needs the package installed and no copy of
the sources.
"""

import argparse
import sys
from typing import Any

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.types.entrypoint import EntrypointType

from pipelines.graph import drorae
from pipelines.stages import STAGES

DESCRIPTION = "Parameters: recipe, overrides (list of section.field=value), workspace, force, ..."


def register(pool: str, directory: str | None, limit: int) -> list[str]:
    """Create or update all deployments, and return their names.

    Args:
        pool: Work pool of the workers.
        directory: Working folder of the flow runs on a worker; None leaves it to the pool.
        limit: Runs of one deployment at the same time; further ones wait.
    """
    variables = {"working_dir": directory} if directory else {}
    names = []
    for name, parameters in _deployments().items():
        deployment: Any = drorae.to_deployment(
            name=name,
            parameters=parameters,
            description=DESCRIPTION,
            work_pool_name=pool,
            job_variables=variables,
            entrypoint_type=EntrypointType.MODULE_PATH,
            concurrency_limit=ConcurrencyLimitConfig(
                limit=limit, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
        )
        deployment.apply()
        names.append(f"drorae/{name}")
    return names


def _deployments() -> dict[str, dict[str, str]]:
    return {"full": {}} | {stage.name: {"only": stage.name} for stage in STAGES}


def main(argv: list[str]) -> None:
    """Register the deployments as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", default="drorae", help="work pool (default: drorae)")
    parser.add_argument("--directory", help="working folder of flow runs on a process worker")
    parser.add_argument("--limit", type=int, default=4, help="runs at the same time (default: 4)")
    options = parser.parse_args(argv)
    for name in register(options.pool, options.directory, options.limit):
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
