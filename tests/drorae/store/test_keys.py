import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drorae.config import Compute
from drorae.store.keys import KEY_HEX_DIGITS, code_digest, stage_key

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
)
CONFIGS = st.dictionaries(st.text(), SCALARS | st.lists(SCALARS, max_size=3), max_size=5)
INPUTS = st.dictionaries(st.text(min_size=1), st.text(), max_size=3)


def reversed_order(value):
    if isinstance(value, dict):
        return {k: reversed_order(v) for k, v in reversed(value.items())}
    return value


@given(CONFIGS, INPUTS)
def test_key_ignores_the_order_of_fields(config, inputs):
    nested = {"inner": config, "z": 1}
    key = stage_key("fusion", 1, nested, inputs)
    assert key == stage_key("fusion", 1, reversed_order(nested), reversed_order(inputs))
    assert len(key) == KEY_HEX_DIGITS
    assert int(key, 16) >= 0


@given(CONFIGS, INPUTS, st.text(min_size=1), SCALARS)
def test_key_changes_with_every_part(config, inputs, name, value):
    key = stage_key("fusion", 1, config, inputs)
    assert stage_key("decoder", 1, config, inputs) != key
    assert stage_key("fusion", 2, config, inputs) != key
    assert stage_key("fusion", 1, {**config, "new field": value, name: "changed"}, inputs) != key
    assert stage_key("fusion", 1, config, {**inputs, name: inputs.get(name, "") + "x"}) != key


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_key_tells_any_two_floats_apart(first, second):
    same = repr(first) == repr(second)
    assert (stage_key("s", 1, {"lr": first}, {}) == stage_key("s", 1, {"lr": second}, {})) == same


def test_key_of_a_dataclass_is_that_of_its_json():
    assert stage_key("s", 1, {"compute": Compute()}, {}) == stage_key(
        "s", "1", {"compute": {f: getattr(Compute(), f) for f in Compute.__dataclass_fields__}}, {}
    )


def test_key_is_the_same_in_another_process():
    code = (
        "from drorae.store.keys import stage_key;"
        "print(stage_key('s', 1, {'a': 0.1, 'b': 'x'}, {'i': 'k'}))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == stage_key("s", 1, {"b": "x", "a": 0.1}, {"i": "k"})


def test_value_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        stage_key("s", 1, {"lr": float("nan")}, {})


def test_code_digest_sees_content_and_names_but_not_the_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "package").mkdir(parents=True)
        (tmp_path / place / "package" / "a.py").write_text("a = 1")
        (tmp_path / place / "package" / "notes.txt").write_text(place)
    here, there = tmp_path / "here" / "package", tmp_path / "there" / "package"
    before = code_digest(here)
    assert before == code_digest(str(there))
    (there / "a.py").rename(there / "b.py")
    assert code_digest(there) != before
    (here / "a.py").write_text("a = 2")
    assert code_digest(here) != before
    assert code_digest(here / "a.py") != code_digest(here)
    with pytest.raises(FileNotFoundError, match="expected a package folder"):
        code_digest(tmp_path / "nowhere")


def test_store_imports_no_framework():
    code = (
        "import sys, drorae.store.stage_run, drorae.tracking;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'prefect', 's3fs', 'pyarrow') if m in "
        "sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
