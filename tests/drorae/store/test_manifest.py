import json
import math
import pickle

import pytest

from drorae.store.files import FileEntry
from drorae.store.manifest import (
    DamagedOutput,
    Manifest,
    decode_manifest,
    describe_hardware,
    encode_manifest,
    finite_metrics,
    installed_packages,
)


def example(**changes):
    fields = {
        "stage": "fusion",
        "key": "abc",
        "version": "1",
        "config": {"lr": 1e-4, "layers": [1, 2]},
        "input_keys": {"shard": "def"},
        "files": (FileEntry(name="fusion.safetensors", size_bytes=3, sha256="00"),),
        "metrics": {"loss": 0.5, "bad": None},
        "seed": 7,
        "code_digest": "11",
        "packages": {"numpy": "2"},
        "hardware": {"gpus": []},
        "wall_s": 1.5,
        "device_hours": 0.1,
        "attempt": 2,
        "run_ids": {"prefect": "p"},
        "created_at": "2026-11-22T00:00:00+00:00",
    }
    return Manifest(**(fields | changes))


def test_manifest_survives_json():
    text = json.dumps(encode_manifest(example()))
    assert decode_manifest(json.loads(text), "/x") == example()
    assert decode_manifest(encode_manifest(example(seed=None)), "/x").seed is None


@pytest.mark.parametrize("data", [{}, [], {"stage": 1}, {**encode_manifest(example()), "new": 1}])
def test_unreadable_manifest_is_damage(data):
    with pytest.raises(DamagedOutput, match=r"manifest.json is not readable"):
        decode_manifest(data, "/x")


def test_damage_lists_every_problem_and_can_cross_processes():
    error = pickle.loads(pickle.dumps(DamagedOutput("/out", ["a is missing", "b: sha256 differs"])))
    assert str(error).startswith("output /out is damaged: a is missing; b: sha256 differs.")
    assert error.problems == ("a is missing", "b: sha256 differs")
    assert isinstance(error, RuntimeError)


def test_metric_that_is_not_finite_becomes_none():
    assert finite_metrics({"a": 1, "b": math.nan, "c": -math.inf}) == {
        "a": 1.0,
        "b": None,
        "c": None,
    }


def test_provenance_names_packages_and_hardware():
    assert {"numpy", "torch"} <= set(installed_packages())
    hardware = describe_hardware(["H100"])
    assert hardware["gpus"] == ["H100"]
    assert hardware["cores"] >= 1
    assert hardware["ram_bytes"] > 1e8
    assert hardware["cpu"]
