"""Scenarios run only when they are asked for: `pytest -m chaos`, or `make chaos`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "chaos" in str(config.getoption("-m")):
        return
    asked_for_elsewhere = [item for item in items if item.get_closest_marker("chaos")]
    items[:] = [item for item in items if item not in asked_for_elsewhere]
    if asked_for_elsewhere:
        config.hook.pytest_deselected(items=asked_for_elsewhere)
