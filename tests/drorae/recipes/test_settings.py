"""Whatever is given to a setting is taken, or refused in one line that names it."""

import pytest

from drorae import recipes
from drorae.config import digest, field_docs, override

FULL = recipes.get("smoke")
PATHS = [row.path for row in field_docs(FULL)]
VALUES = (
    *("0", "-1", "0.5", "2012", "99999999999999999999", "-1e300", "1e400", "NaN", "-Infinity"),
    *("", "null", "true", "no", "[]", "[[]]", "{}", '{"a":1}', "[1,2]", '"x"', "~", "'a'", "ü"),
)


def refusal(path: str, value: str) -> str:
    """Why a value is refused; empty where it is taken."""
    try:
        changed = override(FULL, [f"{path}={value}"])
    except ValueError as error:
        return str(error)
    assert digest(changed)
    return ""


def test_a_setting_takes_a_value_or_says_which_it_is() -> None:
    for number, path in enumerate(PATHS):  # an eighth of the values each, in turn
        for value in VALUES[number % 8 :: 8]:
            reason = refusal(path, value)
            assert not reason or path.rsplit(".", 1)[-1] in reason, (path, value)
            assert "\n" not in reason, (path, value)


@pytest.mark.parametrize(
    "assignment",
    [
        "seed=-1",
        "shard.seed=-1",
        "diffusion.optim.lr=NaN",
        "diffusion.optim.weight_decay=-0.1",
        "fusion.train.eval_every_steps=0",
        "fusion.train.lpips_weight=-1",
        "decoder.train.adversarial.discriminator.patch_px=0",
        "decoder.train.optim.betas=[0.9,1.0]",
        "evaluate.kid_subset=1",
        "evaluate.num_grid_images=0",
        "evaluate.bootstrap_replicates=1",
        "evaluate.isc_splits=0",
        "report.figure_dpi=0",
        "report.max_curve_points=-1",
        "compute.save_every_s=0",
        "shard.rows_per_shard=18446744073709551616",
    ],
)
def test_numbers_that_cannot_work_are_refused_before_any_work(assignment: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        override(FULL, [assignment])


def test_names_of_numbers_stay_text() -> None:
    changed = override(FULL, ["shard.source=2012", "report.title=1e3", "shard.label_column=007"])
    assert changed.shard.source == "2012"
    assert changed.report.title == "1e3"
    assert changed.shard.label_column == "007"
    assert override(FULL, ["shard.label_column=null"]).shard.label_column is None
