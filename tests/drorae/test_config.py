from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drorae.config import Compute, digest, field_docs, flatten, from_json, override, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    lr: float = 1e-3
    """Learning rate. From nowhere."""
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"inner.lr={self.lr} is out of range: expected a positive number.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Middle:
    model: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)
    steps: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    name: str
    middle: Middle = field(default_factory=Middle)
    on: bool = False


ROOT = Root(name="r")


def test_json_round_trip_rebuilds_the_same_object() -> None:
    assert from_json(Root, to_json(ROOT)) == ROOT


@settings(deadline=None)  # a busy machine takes long now and then
@given(st.integers(-(2**63) + 1, 2**63 - 1), st.floats(1e-9, 9e18), st.booleans())
def test_any_values_survive_the_round_trip(steps: int, lr: float, on: bool) -> None:
    root = Root(name="x", on=on, middle=Middle(steps=steps, model=Inner(lr=lr)))
    assert from_json(Root, to_json(root)) == root
    assert digest(root) == digest(from_json(Root, to_json(root)))


def test_override_by_full_path_changes_only_that_leaf() -> None:
    changed = override(ROOT, ["middle.model.lr=0.5"])
    assert changed.middle.model.lr == 0.5
    assert changed.middle.other == ROOT.middle.other


def test_override_may_leave_out_a_section_when_only_one_field_fits() -> None:
    assert override(ROOT, ["middle.steps=7"]).middle.steps == 7
    with pytest.raises(ValueError, match="ambiguous"):
        override(ROOT, ["middle.lr=1"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("middle.stepz=1", "no configuration path.*middle.steps"),
        ("nothing", "no assignment"),
        ("middle.steps=many", "expected int"),
        ("middle.steps=true", "expected int"),
        ("middle.model.kind=c", r"expected one of \['a', 'b'\]"),
        ("middle.model.lr=-1", "expected a positive number"),
        ("middle.model.sizes=3", "expected a list"),
        ("middle.model.pair=[1]", "expected 2"),
        ("middle.model.limit=x", "expected int"),
        ("middle.model=3", "expected the fields of Inner"),
    ],
)
def test_wrong_overrides_say_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(ROOT, [assignment])


@pytest.mark.parametrize(
    ("assignment", "value"),
    [("on=true", True), ("name=plain text", "plain text"), ("middle.model.limit=null", None)],
)
def test_values_are_json_or_else_text(assignment: str, value: object) -> None:
    changed = override(ROOT, [assignment])
    name = assignment.split("=")[0].split(".")[-1]
    holder = changed if hasattr(changed, name) else changed.middle.model
    assert getattr(holder, name) == value


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupled:
    left: int = 1
    right: int = 1

    def __post_init__(self) -> None:
        if self.left != self.right:
            raise ValueError(f"left={self.left} does not fit right={self.right}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    coupled: Coupled = field(default_factory=Coupled)
    path: str = "a"
    second: str | None = None


@pytest.mark.parametrize("order", [1, -1])
def test_fields_that_must_fit_each_other_change_together_in_any_order(order: int) -> None:
    changed = override(Pair(), ["coupled.left=2", "coupled.right=2"][::order])
    assert changed.coupled == Coupled(left=2, right=2)
    with pytest.raises(ValueError, match="does not fit"):
        override(Pair(), ["coupled.left=2"])


def test_the_later_of_two_assignments_wins() -> None:
    inside = "middle.model.lr=0.5"
    whole = 'middle.model={"lr": 0.25}'
    assert override(ROOT, [inside, "middle.model.lr=0.75"]).middle.model.lr == 0.75
    assert override(ROOT, [inside, whole]).middle.model.lr == 0.25
    assert override(ROOT, [whole, inside]).middle.model.lr == 0.5


def test_a_path_that_begins_with_a_tilde_is_below_the_home_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert override(ROOT, ["name=~/photos"]).name == "~/photos"
    for path in ("~/photos", "a~b", "s3://a/~b"):
        compute = Compute(cache_path=path)
        assert compute.cache_path == path.replace("~/", "/somewhere/")
        assert override(Compute(), [f"cache_path={path}"]) == compute
        assert from_json(Compute, {"cache_path": path}) == compute


@pytest.mark.parametrize("text", ["2012", "true", "1e3", "[x]"])
def test_a_text_field_takes_what_looks_like_a_number_as_text(text: str) -> None:
    changed = override(Pair(), [f"path={text}", f"second={text}"])
    assert (changed.path, changed.second) == (text, text)
    assert override(changed, ["second=null"]).second is None


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"Root\.names is no field.*name"):
        from_json(Root, {"names": "x"})
    with pytest.raises(ValueError, match="lacks the field 'name'"):
        from_json(Root, {})


def test_non_finite_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        to_json({"a": float("nan")})
    with pytest.raises(ValueError, match="expected dataclass"):
        to_json(object())


def test_flatten_gives_dotted_leaves() -> None:
    flat = flatten(ROOT)
    assert flat["middle.model.lr"] == 1e-3
    assert flat["middle.model.sizes"] == "[1,2]"


def test_field_docs_carry_the_text_under_the_field() -> None:
    rows = {row.path: row for row in field_docs(ROOT)}
    assert rows["middle.model.lr"].doc == "Learning rate. From nowhere."
    assert rows["middle.model.kind"].doc == ""


def test_every_compute_field_is_documented() -> None:
    assert all(row.doc for row in field_docs(Compute()))


def test_compute_refuses_no_workers() -> None:
    with pytest.raises(ValueError, match=r"compute\.num_workers"):
        Compute(num_workers=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate_steps": 0}, "compute.accumulate_steps=0 .* at least 1"),
        ({"rollback_after_skips": 0}, "compute.rollback_after_skips=0 .* at least 1"),
        ({"keep_every_steps": -1}, "compute.keep_every_steps=-1 .* 0 or more"),
        ({"sharding": "none", "num_workers": 2}, "sharding=none .* use sharding=ddp or fsdp2"),
    ],
)
def test_impossible_ways_to_run_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compute(**fields)


@pytest.mark.parametrize(
    ("fields", "device_type"),
    [
        ({}, "cpu"),
        ({"use_gpu": True}, "cuda"),
        ({"use_gpu": True, "device": "cpu"}, "cpu"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_arithmetic_follows_the_device_and_else_what_ray_gives(
    fields: dict[str, Any], device_type: str
) -> None:
    assert Compute(**fields).device_type == device_type
