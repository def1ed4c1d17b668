"""One local Ray for all integration tests of a session: starting it takes about seven seconds."""

from collections.abc import Iterator

import pytest

from drorae.config import Compute
from drorae.data.ray_session import connect_ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    started = connect_ray(Compute(num_workers=2, data_actors=2))
    yield
    if started:
        ray.shutdown()
