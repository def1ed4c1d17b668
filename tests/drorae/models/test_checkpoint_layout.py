from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drorae.models.checkpoint_layout import (
    LatentStats,
    import_decoder,
    load_latent_stats,
    save_latent_stats,
)
from drorae.models.decoder import Decoder, DecoderConfig

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPE = DecoderConfig(
    latent_channels=12, width=16, layers=2, heads=2, mlp_hidden=24, grid=3, patch_px=2
)


def make_state(seed=0):
    torch.manual_seed(seed)
    return Decoder(SHAPE).state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def make_layouts():
    ema, online = make_state(0), make_state(1)
    encoder = {"encoder.encoder.layer.0.norm1.weight": torch.ones(3)}
    whole = {**encoder, **prefixed(ema, "decoder.")}
    train = {
        "step": 7,
        "epoch": 1,
        "model": prefixed({**encoder, **prefixed(online, "decoder.")}, "module."),
        "ema": whole,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    wrapped = prefixed({**encoder, **prefixed(ema, "decoder._orig_mod.")}, "module._orig_mod.")
    return {"flat.pt": ema, "rae.pt": whole, "train.pt": train, "wrapped.pt": wrapped}, ema, online


@pytest.mark.parametrize(
    "name", ["flat.pt", "rae.pt", "train.pt", "wrapped.pt", "flat.safetensors"]
)
def test_every_layout_gives_the_same_decoder(name, tmp_path):
    layouts, ema, _ = make_layouts()
    if name.endswith(".safetensors"):
        save_file(ema, tmp_path / name)
    else:
        torch.save(layouts[name], tmp_path / name)
    imported = import_decoder(tmp_path / name, heads=2)
    assert imported.config == SHAPE
    Decoder(imported.config).load_state_dict(imported.state, strict=True)
    for key, value in ema.items():
        assert torch.equal(imported.state[key], value)


def test_the_report_says_what_was_found(tmp_path):
    layouts, _, _ = make_layouts()
    for name, content in layouts.items():
        torch.save(content, tmp_path / name)
    report = import_decoder(tmp_path / "train.pt", heads=2).report
    assert (report.weights, report.rae_prefix, report.container) == ("ema", True, "pickle")
    assert report.ignored == ("encoder.encoder.layer.0.norm1.weight",)
    assert import_decoder(tmp_path / "wrapped.pt", heads=2).report.wrappers == (
        "_orig_mod",
        "module",
    )
    assert import_decoder(tmp_path / "flat.pt", heads=2).report.weights == "plain"


def test_online_weights_are_taken_on_request_or_without_ema(tmp_path):
    layouts, _, online = make_layouts()
    torch.save(layouts["train.pt"], tmp_path / "both.pt")
    del layouts["train.pt"]["ema"]
    torch.save(layouts["train.pt"], tmp_path / "online.pt")
    for name, prefer in (("both.pt", "model"), ("online.pt", "ema")):
        imported = import_decoder(tmp_path / name, heads=2, prefer=prefer)
        assert imported.report.weights == "model"
        assert torch.equal(imported.state["decoder_embed.weight"], online["decoder_embed.weight"])


def test_half_precision_files_load_as_float32(tmp_path):
    torch.save({k: v.half() for k, v in make_state().items()}, tmp_path / "half.pt")
    state = import_decoder(tmp_path / "half.pt", heads=2).state
    assert {v.dtype for v in state.values()} == {torch.float32}


def test_the_golden_file_gives_its_configuration():
    imported = import_decoder(GOLDEN / "rae_decoder.safetensors", heads=4)
    assert (imported.config.width, imported.config.mlp_hidden, imported.config.grid) == (48, 80, 4)


def test_a_missing_extra_or_misshapen_tensor_is_an_error(tmp_path):
    state = make_state()
    del state["decoder_layers.1.output.dense.bias"]
    torch.save(state, tmp_path / "missing.pt")
    torch.save({**make_state(), "decoder_tail": torch.ones(1)}, tmp_path / "extra.pt")
    torch.save({**make_state(), "decoder_norm.bias": torch.ones(3)}, tmp_path / "shape.pt")
    for name, message in (
        ("missing.pt", "1 missing .first: decoder_layers.1.output.dense.bias"),
        ("extra.pt", "1 unexpected .first: decoder_tail"),
        ("shape.pt", r"decoder_norm.bias \(3,\) instead of \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            import_decoder(tmp_path / name, heads=2)


def test_files_that_hold_no_decoder_are_named(tmp_path):
    torch.save({"heads.0.weight": torch.ones(2)}, tmp_path / "disc.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"a": torch.ones(1), "b": 3}, tmp_path / "mixed.pt")
    torch.save({"decoder_embed.weight": torch.ones(16, 4)}, tmp_path / "part.pt")
    torch.save({"a": Path("x")}, tmp_path / "evil.pt")
    for name, message in (
        ("disc.pt", "no decoder_embed.weight"),
        ("step.pt", "no tensors"),
        ("list.pt", "a list"),
        ("mixed.pt", "b is a int"),
        ("part.pt", "lacks"),
        ("evil.pt", "weights only"),
    ):
        with pytest.raises(ValueError, match=message):
            import_decoder(tmp_path / name, heads=2)
    with pytest.raises(FileNotFoundError, match="no file"):
        import_decoder(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_pos_embed": torch.ones(16)}, "decoder_pos_embed has shape .16,., expected 3"),
        ({"decoder_embed.weight": torch.tensor(1.0)}, "decoder_embed.weight has shape .., exp"),
        ({"decoder_pred.weight": torch.ones(0, 16)}, "decoder_pred.weight has shape .0, 16."),
        ({"decoder_pos_embed": torch.ones(1, 1, 16)}, r"decoder_pos_embed \(1, 1, 16\) instead"),
        ({"decoder_layers.99999999.output.dense.bias": torch.ones(16)}, "1 unexpected"),
        ({"decoder_layers.x.output.dense.bias": torch.ones(16)}, "1 unexpected"),
        ({"module.decoder_norm.bias": torch.ones(16)}, "decoder_norm.bias twice"),
        ({"decoder_norm.bias": torch.full((16,), torch.nan)}, "not finite .first: decoder_norm"),
        ({3: torch.ones(1)}, "the key 3"),
    ],
)
def test_odd_tensors_are_named_with_the_file(changes, message, tmp_path):
    torch.save({**make_state(), **changes}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=f"odd.pt.*{message}"):
        import_decoder(tmp_path / "odd.pt", heads=2)


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_a_damaged_file_is_one_error_that_names_it(name, tmp_path):
    path = tmp_path / name
    save_file(make_state(), path) if name.endswith("s") else torch.save(make_state(), path)
    whole = path.read_bytes()
    pieces = (b"", b"h", whole[:8], whole[:100], whole[: len(whole) // 2], whole[:-1])
    for content in (*pieces, b"<html>404 not found</html>", b"hello world", b"{}", b"PK"):
        path.write_bytes(content)
        for read in (lambda p: import_decoder(p, heads=2), load_latent_stats):
            with pytest.raises(ValueError, match=f"{name}.*expected") as caught:
                read(path)
            assert len(str(caught.value)) < len(str(path)) + 330


def test_the_content_tells_the_format_not_the_name(tmp_path):
    state = make_state()
    save_file(state, tmp_path / "model.pt")
    torch.save(state, tmp_path / "model.safetensors")
    for name, container in (("model.pt", "safetensors"), ("model.safetensors", "pickle")):
        imported = import_decoder(tmp_path / name, heads=2)
        assert imported.report.container == container
        assert all(torch.equal(imported.state[key], value) for key, value in state.items())


def test_heads_must_be_given_for_unknown_widths(tmp_path):
    torch.save(make_state(), tmp_path / "flat.pt")
    with pytest.raises(ValueError, match="pass `heads`"):
        import_decoder(tmp_path / "flat.pt")


def test_statistics_survive_our_format(tmp_path):
    released = load_latent_stats(GOLDEN / "latent_stats.pt")
    save_latent_stats(released, tmp_path / "stats.safetensors")
    again = load_latent_stats(tmp_path / "stats.safetensors")
    assert torch.equal(again.mean, released.mean)
    assert torch.equal(again.var, released.var)
    assert again.mean.shape == (24, 4, 4)


def test_absent_statistics_mean_zero_and_one(tmp_path):
    torch.save({"mean": torch.ones(2, 3, 3)}, tmp_path / "mean.pt")
    assert (load_latent_stats(tmp_path / "mean.pt").var == 1).all()
    torch.save({"var": torch.ones(2, 3, 3)}, tmp_path / "var.pt")
    assert (load_latent_stats(tmp_path / "var.pt").mean == 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"std": torch.ones(1)}, "expected `mean` and `var`"),
        ({"mean": torch.ones(2, 3, 3), "var": torch.ones(2, 1, 1)}, "expected one shape"),
        ({"mean": torch.ones(2), "var": torch.ones(2)}, "expected one shape"),
        ({"var": -torch.ones(2, 3, 3)}, "0 or more"),
        ({"mean": [0.0], "var": torch.ones(2, 3, 3)}, "mean is a list"),
        ({"mean": torch.ones(2, 2, 3, 3)}, "expected one shape"),
    ],
)
def test_wrong_statistics_are_named(content, message, tmp_path):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=message):
        load_latent_stats(tmp_path / "stats.pt")


def test_an_axis_of_one_sample_is_dropped_from_statistics(tmp_path):
    mean, var = torch.randn(2, 3, 3), torch.rand(2, 3, 3)
    torch.save({"mean": mean[None], "var": var[None]}, tmp_path / "stats.pt")
    stats = load_latent_stats(tmp_path / "stats.pt")
    assert torch.equal(stats.mean, mean)
    assert torch.equal(stats.var, var)


def test_statistics_are_plain_values():
    stats = LatentStats(mean=torch.zeros(1, 1, 1), var=torch.ones(1, 1, 1))
    assert stats.var.item() == 1
