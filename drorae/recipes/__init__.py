"""Recipes: functions that return whole configurations, found by name."""

import difflib
import inspect
from collections.abc import Callable

from drorae.recipes.ablations import ABLATIONS
from drorae.recipes.cifar10 import cifar10
from drorae.recipes.full import FullJob
from drorae.recipes.imagenet import imagenet256, imagenet256_rae, imagenet256_raev2, imagenet512
from drorae.recipes.smoke import smoke

__all__ = ["FullJob", "describe", "get", "names"]

_FUNCTIONS = (smoke, cifar10, imagenet256, imagenet256_rae, imagenet256_raev2, imagenet512)
_RECIPES: dict[str, Callable[[], FullJob]] = {
    **{function.__name__: function for function in _FUNCTIONS},
    **ABLATIONS,
}


def names() -> list[str]:
    """Names of all recipes: the smallest first, then the ablations table by table."""
    return list(_RECIPES)


def get(name: str) -> FullJob:
    """Configuration of a recipe.

    Raises:
        ValueError: Unknown name; lists close matches and all names.
    """
    return _find(name)()


def describe(name: str) -> str:
    """Command, expected time and result, and whether the recipe ran at full size."""
    recipe = _find(name)
    if name in ABLATIONS:
        return ABLATIONS[name].describe()
    return inspect.getdoc(recipe) or ""


def _find(name: str) -> Callable[[], FullJob]:
    if name in _RECIPES:
        return _RECIPES[name]
    close = difflib.get_close_matches(name, _RECIPES, n=3, cutoff=0.4)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    main = [known for known in _RECIPES if known not in ABLATIONS]
    raise ValueError(
        f"{name!r} is no recipe.{hint} Expected one of {', '.join(main)}, or an ablation of "
        "`drorae recipes list`."
    )
