"""`python -m drorae.parity` on the reference's folder, on folders of other sizes, on damage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import plain_reference
import pytest
import torch
from safetensors.torch import load_file, save_file

from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.dit import DiT
from drorae.models.reference_config import read_decoder_fields, read_dit_config
from drorae.parity.__main__ import main
from drorae.parity.folder import max_abs_error

GOLDEN = Path(__file__).parents[1] / "golden"
DIT_NAMES = (
    *("time_grid", "velocity", "loss"),
    *("sample_unguided", "sample_cfg", "sample_autoguidance"),
)
DECODER_NAMES = ("image_from_tokens", "image_from_normalised_latent")
ALL_NAMES = {*DIT_NAMES, *DECODER_NAMES}
FILES = (
    *("dit_dh.json", "dit_dh.safetensors", "dit_dh_weak.safetensors", "dit_dh_io.safetensors"),
    *("rae_decoder.json", "rae_decoder.safetensors", "rae_decoder_io.safetensors"),
    "latent_stats.pt",
)
SETTINGS = {
    "num_grid_points": 5,
    "time_shift": 2.5,
    "guidance_scale": 2.0,
    "guidance_interval": [0.0, 1.0],
}
DIT = {
    "input_size": 4,
    "in_channels": 5,
    "hidden_size": [24, 40],
    "depth": [2, 1],
    "num_heads": [3, 2],
    "num_classes": 4,
}
PLAIN = DIT | {"hidden_size": 24, "depth": 2, "num_heads": 3}
DECODER = {
    "latent_channels": 6,
    "width": 24,
    "layers": 2,
    "heads": 3,
    "mlp_hidden": 20,
    "grid": 3,
    "patch_px": 2,
    "layer_norm_eps": 1e-12,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "stats_eps": 1e-5,
    "qkv_bias": True,
    "hidden_act": "gelu",
}
SHOWN = ("qkv_bias", "hidden_act")  # not in the visible folder's file


def run(folder, capsys):
    status = main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    return status, {line.split()[0]: line for line in lines}


def random_state(module, seed=0):
    """Weights as in the reference's folder: N(0, 0.08), norms 1 + N(0, 0.1); tables stay."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in module.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        is_norm = "norm" in key and key.endswith("weight")
        state[key] = 1 + 0.1 * drawn if is_norm else 0.08 * drawn
        if any(table in key for table in ("pos_embed", "freqs", "t_embedder.W")):
            state[key] = value.clone()
    return state


def make_dit(
    folder, model=None, weak=None, batch=3, learn_sigma=False, dtype=torch.float32, **settings
):
    model = DIT | (model or {}) if model is None or "depth" not in model else model
    content = {"model": model, **SETTINGS, **settings}
    state = rounded(random_state(DiT(read_dit_config(model))), dtype)
    if learn_sigma:
        state |= with_sigma(state, model)
    weak_state = None
    if weak is not None:
        content["weak_model"] = weak
        weak_state = rounded(random_state(DiT(read_dit_config(weak)), seed=1), dtype)
    plain_reference.write_dit(folder, content, state, weak_state, batch)


def rounded(state, dtype):
    return {key: value.to(dtype).float() for key, value in state.items()}


def with_sigma(state, model):
    """Final layer with twice the channels, the first half of each position as before."""
    doubled, positions = {}, model.get("patch_size", 1) ** 2
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (positions, model["in_channels"]))
        doubled[key] = torch.cat([rows, torch.randn_like(rows)], dim=1).flatten(0, 1)
    return doubled


def make_decoder(folder, changes=None, shown=None, stats=None, token_side=3):
    fields = DECODER | (changes or {})
    shown = shown or {k: v for k, v in fields.items() if k not in SHOWN or v != DECODER[k]}
    ours = {k: v for k, v in fields.items() if k != "stats_eps"}
    ours |= {k: tuple(ours[k]) for k in ("image_mean", "image_std")}
    state = random_state(Decoder(DecoderConfig(**ours)))
    shape = (fields["latent_channels"], fields["grid"], fields["grid"])
    if stats is None:
        stats = {"mean": torch.randn(shape), "var": torch.rand(shape) + 0.1}
    plain_reference.write_decoder(folder, shown, fields, state, stats, token_side)


def copy_golden(folder):
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    return folder


def edit_tensors(path, **changes):
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if callable(change) else change
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_reference_s_folder_passes():
    done = subprocess.run(
        [sys.executable, "-m", "drorae.parity", str(GOLDEN)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[0] for line in lines] == [*DIT_NAMES, *DECODER_NAMES]
    for name, error, tolerance, status in lines:
        assert float(tolerance) == (2e-4 if name.startswith("sample") else 2e-5)
        assert float(error) <= 2e-6, name  # far below, so that other machines have room
        assert status == "ok"


@pytest.mark.parametrize(("section", "weights"), [("model", ""), ("weak_model", "_weak")])
def test_fresh_tables_equal_the_stored_ones(section, weights):
    fields = json.loads((GOLDEN / "dit_dh.json").read_text())[section]
    stored = load_file(GOLDEN / f"dit_dh{weights}.safetensors")
    fresh = DiT(read_dit_config(fields)).state_dict()
    keys = [key for key in fresh if "freqs" in key or key == "pos_embed"]
    assert len(keys) == 5
    for key in keys:
        torch.testing.assert_close(fresh[key], stored[key], rtol=0, atol=2e-6)


def test_the_fresh_position_table_of_the_decoder_equals_the_stored_one():
    fields = read_decoder_fields(json.loads((GOLDEN / "rae_decoder.json").read_text()))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    del fields["stats_eps"]
    stored = load_file(GOLDEN / "rae_decoder.safetensors")["decoder_pos_embed"]
    fresh = Decoder(DecoderConfig(**fields)).decoder_pos_embed
    torch.testing.assert_close(fresh, stored, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"use_qknorm": True}, {"guidance_scale": 4.0, "guidance_interval": [0.3, 0.9]}),
        ({"use_qknorm": True, "use_rmsnorm": False}, {"time_shift": 1.0}),
        ({"use_rmsnorm": False, "use_swiglu": False}, {"num_grid_points": 2}),
        ({"use_rope": False, "num_heads": [12, 8]}, {"guidance_scale": 1.0}),
        ({"use_pos_embed": False}, {"guidance_interval": [1.0, 1.0]}),
        ({"hidden_size": [32, 32], "num_heads": 2}, {"guidance_interval": [-1.0, 0.5]}),
        ({"mlp_ratio": 3.3, "input_size": 5}, {"time_shift": 13.8564, "num_grid_points": 12}),
        ({"patch_size": [1, 1], "depth": [1, 3]}, {"guidance_interval": [0.9, 0.4]}),
        ({"patch_size": 2}, {}),
        ({"patch_size": [2, 1]}, {}),
        ({"class_dropout_prob": 0.0}, {}),
        ({"class_dropout_prob": 0.7, "num_classes": 1}, {}),
        (PLAIN, {}),
        (PLAIN | {"patch_size": 2, "use_qknorm": True, "use_gembed": True}, {}),
        (PLAIN | {"use_swiglu": False, "use_rmsnorm": False, "learn_sigma": False}, {}),
    ],
)
def test_folders_of_other_sizes_and_options_pass(model, settings, tmp_path, capsys):
    model = model if "depth" in model and model["depth"] == 2 else DIT | model
    weak = model | {"depth": 1 if model["depth"] == 2 else [1, 1]}
    make_dit(tmp_path, model, weak, **settings)
    status, lines = run(tmp_path, capsys)
    assert status == 0, lines
    absent = {"sample_cfg"} if model.get("class_dropout_prob") == 0.0 else set()
    assert {n for n in DIT_NAMES if lines[n].endswith("ok")} == set(DIT_NAMES) - absent


@pytest.mark.parametrize("patch", [1, 2])
def test_the_plain_model_s_learned_sigma_is_dropped(patch, tmp_path, capsys):
    model = PLAIN | {"patch_size": patch, "learn_sigma": True}
    make_dit(tmp_path, model, learn_sigma=True)
    status, lines = run(tmp_path, capsys)
    assert status == 0, lines
    assert lines["sample_autoguidance"].endswith("skipped: dit_dh_weak.safetensors is missing")


HF_DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 20,
    "hidden_act": "gelu_new",
    "qkv_bias": False,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "hidden_size": 768,
    "patch_size": "placeholder",
    "image_size": 224,
    "model_type": "vit_mae",
    "hidden_dropout_prob": 0.1,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "eps": 0.1,
}
HF_CHANGES = {
    "hidden_act": "gelu_new",
    "qkv_bias": False,
    "layer_norm_eps": 1e-6,
    "stats_eps": 0.1,
}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"token_side": 5},
        {"token_side": 2},
        {"changes": {"stats_eps": 0.3, "layer_norm_eps": 1e-2}},
        {"changes": {"qkv_bias": False, "hidden_act": "silu"}},
        {"changes": {"hidden_act": "relu", "heads": 8, "grid": 2, "patch_px": 5}},
        {"stats": {"mean": torch.randn(6, 3, 3)}},
        {"stats": {"var": torch.rand(6, 3, 3) + 0.5}},
        {"stats": {"mean": torch.randn(1, 6, 3, 3), "var": torch.rand(1, 6, 3, 3)}},
        {"changes": HF_CHANGES, "shown": HF_DECODER},
        {"changes": HF_CHANGES, "shown": {"decoder": HF_DECODER}},
        {"changes": {"latent_channels": 7, "width": 1152, "heads": 16, "layers": 1}},
    ],
)
def test_decoder_folders_of_other_sizes_and_names_pass(case, tmp_path, capsys):
    make_decoder(tmp_path, **case)
    status, lines = run(tmp_path, capsys)
    assert status == 0, lines
    assert all(lines[name].endswith("ok") for name in DECODER_NAMES)
    assert "dit_dh.json is missing" in lines["velocity"]


def failures(folder, capsys):
    status, lines = run(folder, capsys)
    assert status == 1, lines
    return {name: line for name, line in lines.items() if " FAIL" in line}


def test_a_damaged_weight_fails_what_reads_it(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_tensors(
        folder / "dit_dh_weak.safetensors", **{"final_layer.linear.bias": lambda v: v + 0.01}
    )
    edit_tensors(folder / "rae_decoder.safetensors", **{"decoder_norm.bias": lambda v: v + 1e-3})
    assert set(failures(folder, capsys)) == {"sample_autoguidance", *DECODER_NAMES}


@pytest.mark.parametrize("name", [*DIT_NAMES, *DECODER_NAMES])
@pytest.mark.parametrize(
    "damage", [lambda v: v + 1e-3, lambda v: v * float("nan"), lambda v: v + float("inf")]
)
def test_a_damaged_expectation_fails(name, damage, tmp_path, capsys):
    folder = copy_golden(tmp_path)
    part = "rae_decoder" if name in DECODER_NAMES else "dit_dh"
    edit_tensors(folder / f"{part}_io.safetensors", **{name: damage})
    assert name in failures(folder, capsys)


def test_one_value_that_is_not_a_number_never_passes(tmp_path, capsys):
    folder = copy_golden(tmp_path)

    def poison(value):
        value.view(-1)[-1] = float("nan")
        return value

    edit_tensors(folder / "dit_dh_io.safetensors", x=poison, velocity=poison)
    found = failures(folder, capsys)
    assert set(found) == {"velocity"}
    assert "velocity nan 2e-05 FAIL values are not finite" in found["velocity"]
    infinite = torch.tensor([float("inf"), 0.0])
    assert not max_abs_error(infinite, infinite) <= 1.0


def test_wrong_shapes_are_named_without_a_trace(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_tensors(
        folder / "dit_dh_io.safetensors",
        velocity=lambda v: v[:, :-1],
        noise=lambda v: v[..., :-1],
        time_grid=lambda v: v[:-1],
        loss_t=lambda v: v[:1],
    )
    edit_tensors(folder / "rae_decoder_io.safetensors", tokens=lambda v: v[..., :-1])
    found = failures(folder, capsys)
    assert "expected (3, 23, 4, 4)" in found["velocity"]
    assert "[batch, 24, 4, 4]" in found["sample_unguided"]
    assert "expected (7,)" in found["time_grid"]
    assert "loss" in found
    assert "23 channels" in found["image_from_tokens"]
    assert all(len(line.splitlines()) == 1 for line in found.values())


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_json(folder / "dit_dh.json", lambda c: c["model"].update(depth=[2, 2]))
    edit_json(folder / "rae_decoder.json", lambda c: c.update(mlp_hidden=81))
    found = failures(folder, capsys)
    assert "unexpected (first: blocks.4." in found["velocity"]
    assert "misshapen" in found["image_from_tokens"]


@pytest.mark.parametrize(
    ("file", "change", "name", "message"),
    [
        ("dit_dh.json", lambda c: c["model"].update(wo_shift=True), "velocity", "wo_shift"),
        ("dit_dh.json", lambda c: c.update(guidance_interval=["a", 1]), "sample_cfg", "'a'"),
        ("dit_dh.json", lambda c: c["model"].update(num_classes=10**12), "loss", "instead of (10"),
        (
            "dit_dh.json",
            lambda c: c["model"].update(class_dropout_prob=0, num_classes=11),
            "sample_cfg",
            "no null class",
        ),
        ("dit_dh.json", lambda c: c.pop("guidance_scale"), "sample_cfg", "guidance_scale=None"),
        ("dit_dh.json", lambda c: c.update(guidance_interval=0.5), "sample_cfg", "0.5"),
        ("dit_dh.json", lambda c: c.pop("model"), "velocity", "lacks 'model'"),
        ("dit_dh.json", lambda c: c.update(model=3), "velocity", "expected constructor fields"),
        ("rae_decoder.json", lambda c: c.update(hidden_act="x"), "image_from_tokens", "'x'"),
        ("rae_decoder.json", lambda c: c.update(num_channels=1), "image_from_tokens", "expected 3"),
        ("rae_decoder.json", lambda c: c.update(eps=1), "image_from_tokens", "disagree"),
        ("rae_decoder.json", lambda c: c.pop("heads"), "image_from_tokens", "pass `heads`"),
    ],
)
def test_unknown_or_wrong_configuration_is_named(file, change, name, message, tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_json(folder / file, change)
    assert message in failures(folder, capsys)[name]


def test_unknown_keys_are_reported_and_the_tensors_decide(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_json(folder / "dit_dh.json", lambda c: c.update(solver="rk4"))
    edit_json(folder / "dit_dh.json", lambda c: c["model"].update(use_moe=True))
    edit_json(folder / "rae_decoder.json", lambda c: c.update(rope=1))
    status, lines = run(folder, capsys)
    assert status == 0, lines
    assert lines["solver"] == "solver skipped: unknown key of dit_dh.json"
    assert lines["model.use_moe"] == "model.use_moe skipped: unknown key of dit_dh.json"
    assert lines["rope"] == "rope skipped: unknown key of rae_decoder.json"
    assert {name for name, line in lines.items() if line.endswith(" ok")} == ALL_NAMES
    edit_tensors(folder / "dit_dh_io.safetensors", sample_cfg=lambda v: v + 1e-3)
    assert set(failures(folder, capsys)) == {"sample_cfg"}


@pytest.mark.parametrize("end", [0, 1])
def test_an_end_of_the_interval_written_with_fewer_digits_is_still_in_it(end, tmp_path, capsys):
    # The reference compares in float32, where several decimals are one number.
    make_dit(tmp_path)
    time = load_file(tmp_path / "dit_dh_io.safetensors")["time_grid"][1]
    exact, written = [0.0, 1.0], [0.0, 1.0]
    exact[end], written[end] = time.item(), above_and_below(time)[end]
    make_dit(tmp_path, DIT, DIT | {"depth": [1, 1]}, guidance_interval=exact)
    edit_json(tmp_path / "dit_dh.json", lambda c: c.update(guidance_interval=written))
    status, lines = run(tmp_path, capsys)
    assert status == 0, lines


def above_and_below(time):
    """Two numbers that float32 rounds to the time."""
    found = time.item() + 1e-8, time.item() - 1e-8
    assert all(torch.tensor(value) == time and value != time.item() for value in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_be_pickles_and_of_half_precision(dtype, tmp_path, capsys):
    make_dit(tmp_path, DIT, DIT | {"depth": [1, 1]}, dtype=dtype)
    for name in ("dit_dh", "dit_dh_weak"):
        file = tmp_path / f"{name}.safetensors"
        weights = {key: value.to(dtype) for key, value in load_file(file).items()}
        torch.save(weights, file.with_suffix(".pt"))
        file.unlink()
    status, lines = run(tmp_path, capsys)
    assert status == 0, lines
    assert {name for name in DIT_NAMES if lines[name].endswith(" ok")} == set(DIT_NAMES)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_read_fails_and_is_named(file, tmp_path, capsys):
    folder = copy_golden(tmp_path)
    whole = (folder / file).read_bytes()
    for content in (b"", b"{ no such format", whole[: len(whole) // 2], whole[:-1]):
        (folder / file).write_bytes(content)
        found = failures(folder, capsys)
        assert all(file in line and len(line) < 400 for line in found.values()), found


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
@pytest.mark.parametrize("file", FILES)
def test_what_stands_in_place_of_a_file_is_no_missing_file(file, kind, tmp_path, capsys):
    folder = copy_golden(tmp_path)
    (folder / file).unlink()
    if kind == "folder":
        (folder / file).mkdir()
    else:
        (folder / file).symlink_to(folder / "nothing")
    found = failures(folder, capsys)
    assert all(f"{file} is no file" in line for line in found.values()), found


def test_labels_without_a_class_and_statistics_of_another_grid_are_named(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_tensors(
        folder / "dit_dh_io.safetensors",
        y=lambda v: v + 1,
        labels=lambda v: v - 9,
        loss=lambda v: v.expand(2),
    )
    stats = torch.load(folder / "latent_stats.pt")
    torch.save({k: v[:, :3, :3] for k, v in stats.items()}, folder / "latent_stats.pt")
    found = failures(folder, capsys)
    assert "y=[1, 10, 11]; expected 0 to 10" in found["velocity"]
    assert "labels=[-8, -7, -6]; expected 0 to 10" in found["sample_cfg"]
    assert "(24, 3, 3)" in found["image_from_normalised_latent"]
    edit_tensors(folder / "dit_dh_io.safetensors", labels=lambda v: v + 9)
    assert "computed shape (1,), expected (2,)" in failures(folder, capsys)["loss"]


@pytest.mark.parametrize(
    ("file", "skipped"),
    [
        ("dit_dh_weak.safetensors", {"sample_autoguidance"}),
        ("dit_dh.safetensors", set(DIT_NAMES) - {"time_grid"}),
        ("dit_dh_io.safetensors", set(DIT_NAMES)),
        ("latent_stats.pt", {"image_from_normalised_latent"}),
        ("rae_decoder.safetensors", set(DECODER_NAMES)),
    ],
)
def test_a_missing_file_skips_its_checks_and_says_so(file, skipped, tmp_path, capsys):
    folder = copy_golden(tmp_path)
    (folder / file).unlink()
    status, lines = run(folder, capsys)
    assert status == 0
    for name, line in lines.items():
        assert line.endswith(f"skipped: {file} is missing") == (name in skipped)


def test_a_missing_input_fails_and_unknown_tensors_are_reported(tmp_path, capsys):
    folder = copy_golden(tmp_path)
    edit_tensors(folder / "dit_dh_io.safetensors", x=lambda v: None, sample_heun=torch.zeros(2))
    status, lines = run(folder, capsys)
    assert status == 1
    assert "lacks 'x'" in lines["velocity"]
    assert lines["sample_heun"] == "sample_heun skipped: unknown tensor of dit_dh_io.safetensors"


def test_a_folder_without_anything_to_check_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        assert main([str(folder)]) == 2
        assert "expected" in capsys.readouterr().err
    shutil.copy(GOLDEN / "dit_dh.json", tmp_path)
    assert main([str(tmp_path)]) == 2
