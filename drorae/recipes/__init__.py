"""Recipes: functions that return whole configurations, found by name."""

import difflib
from collections.abc import Callable

from drorae.recipes.full import FullJob
from drorae.recipes.smoke import smoke

__all__ = ["FullJob", "describe", "get", "names"]

_RECIPES: dict[str, Callable[[], FullJob]] = {"smoke": smoke}


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(_RECIPES)


def get(name: str) -> FullJob:
    """Configuration of a recipe.

    Raises:
        ValueError: Unknown name; lists close matches and all names.
    """
    return _find(name)()


def describe(name: str) -> str:
    """The recipe's docstring: command, expected time and result, whether it ran at full size."""
    return (_find(name).__doc__ or "").strip()


def _find(name: str) -> Callable[[], FullJob]:
    if name in _RECIPES:
        return _RECIPES[name]
    close = difflib.get_close_matches(name, _RECIPES, n=3, cutoff=0.4)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"{name!r} is no recipe.{hint} Expected one of: {', '.join(names())}.")
