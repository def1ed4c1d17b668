"""How often a 95 % interval of `drorae.evaluation.bootstrap` holds the true mean, by simulation.

    PYTHONPATH=. python tests/benchmarks/interval_coverage.py

A data set is drawn anew each time: classes with means from N(0, spread^2), images of a class from
N(its mean, 1); the true mean over all classes is 0. Printed are hits of 100 for numbers of classes,
images per class and spreads between classes.
"""

import argparse
import sys

import numpy as np

from drorae.evaluation.bootstrap import intervals


def coverage(
    num_classes: int, per_class: int, spread: float, *, trials: int, replicates: int, seed: int
) -> float:
    """Share of drawn data sets whose interval holds the true mean."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    hits = 0
    for trial in range(trials):
        means = generator.normal(scale=spread, size=num_classes)
        values = means[labels] + generator.normal(size=len(labels))
        found = intervals({"x": values}, labels=labels, replicates=replicates, seed=trial)["x"]
        hits += found.lo <= 0.0 <= found.hi
    return hits / trials


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
    sizes = (1, 2, 5, 40)
    _print("| classes | spread between classes | " + " | ".join(f"{n} per class" for n in sizes))
    _print("|---" * (2 + len(sizes)) + "|")
    for num_classes in (10, 30, 100):
        for spread in (0.0, 0.5, 2.0):
            shares = [
                coverage(
                    num_classes,
                    size,
                    spread,
                    trials=options.trials,
                    replicates=options.replicates,
                    seed=1,
                )
                for size in sizes
            ]
            row = " | ".join(f"{100 * share:.1f}" for share in shares)
            _print(f"| {num_classes} | {spread} | {row} |")


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
