import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drorae import recipes
from drorae.config import from_json, override, to_json
from drorae.models.checkpoint_layout import import_decoder, load_latent_stats
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.dit import DiT, DiTConfig
from drorae.recipes.full import FullJob
from drorae.store.context import StageContext, StageResult
from drorae.store.stage_run import run_once
from drorae.store.workspace import StageOutput, Workspace
from drorae.training.jobs import DecoderStage
from pipelines import cli, stages
from pipelines.plan import Request, make_plan
from pipelines.sources import look

SIZES = {"width": 16, "layers": 1, "heads": 2, "mlp_hidden": 24}
SMALL = [f"decoder.model.{name}={value}" for name, value in SIZES.items()]
SHAPE = (384, 8, 8)  # the smoke recipe's latents


def drorae(workspace: Path, command: str, *arguments: object, sets: list[str] = SMALL) -> int:
    flags = [word for text in sets for word in ("--set", text)]
    return cli.main([command, *map(str, arguments), *flags, "--workspace", str(workspace)])


def make_decoder(seed: int = 0, **changes: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(DecoderConfig(latent_channels=384, grid=8, patch_px=4, **{**SIZES, **changes}))


def full_of(*sets: object) -> FullJob:
    return override(recipes.get("smoke"), [*SMALL, *map(str, sets)])


def keys_of(*sets: object) -> dict[str, str]:
    full = full_of(*sets)
    return stages.stage_keys(full, sources=look(full, []))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "workspace"


@pytest.fixture
def model_pt(tmp_path: Path) -> Path:
    """A training checkpoint as RAE writes it, whose EMA differs from its online weights."""
    content = {
        name: {f"decoder.{k}": v for k, v in make_decoder(seed).state_dict().items()}
        for name, seed in (("ema", 0), ("model", 1))
    }
    torch.save({"step": 3, **content}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def stat_pt(tmp_path: Path) -> Path:
    torch.save({"mean": torch.randn(SHAPE), "var": torch.rand(SHAPE)}, tmp_path / "stat.pt")
    return tmp_path / "stat.pt"


def commit(workspace: Path, stage: str, key: str, files: dict[str, bytes]) -> StageOutput:
    place = Workspace(str(workspace))
    ctx = StageContext(
        stage=stage,
        key=key,
        output_uri=place.stage_uri(stage, key),
        inputs={},
        compute=full_of().compute,
    )

    def build() -> StageResult:
        return StageResult(files=[ctx.put_bytes(name, data) for name, data in files.items()])

    return run_once(place, stage, key, build)[0]


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in tensors.items()})


def test_an_imported_decoder_is_the_stage_output_that_later_runs_find(
    workspace: Path, model_pt: Path, stat_pt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drorae(workspace, "import", "--decoder", model_pt, "--stats", stat_pt) == 0
    told = capsys.readouterr().out
    assert "built: " in told
    assert "weights: ema" in told
    named = re.findall(r"--set (decoder\.released\S*=sha256:[0-9a-f]{64})", told)
    assert len(named) == 2

    plan = make_plan(Request(overrides=(*SMALL, *named), workspace=str(workspace)))
    states = {step.stage: step.state for step in plan.steps}
    assert states["decoder"] == "present"
    output = Workspace(str(workspace)).find("decoder", plan.keys["decoder"], "sha256")
    assert output is not None
    state = load_file(output.local("decoder.safetensors"))
    for name, value in make_decoder(0).state_dict().items():
        assert torch.equal(state[name], value)
    stats, released = load_latent_stats(output.local("stats.safetensors")), torch.load(stat_pt)
    assert torch.equal(stats.mean, released["mean"])
    assert torch.equal(stats.var, released["var"])
    config = output.read_json("config.json")
    assert from_json(DecoderConfig, config["model"]) == make_decoder().config
    assert output.manifest.config["decoder"]["released"] == str(model_pt)
    assert output.manifest.input_keys == {}

    assert drorae(workspace, "import", "--decoder", model_pt, "--stats", stat_pt) == 0
    assert "reused: " in capsys.readouterr().out


def test_the_key_of_an_import_covers_content_not_place_or_training(
    model_pt: Path, stat_pt: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.bin"
    moved.write_bytes(model_pt.read_bytes())
    base = keys_of(f"decoder.released={model_pt}")
    assert keys_of(f"decoder.released={moved}") == base
    steps = [f"decoder.released={model_pt}", "decoder.train.num_steps=7"]
    assert keys_of(*steps) == base
    other_shards = keys_of(f"decoder.released={model_pt}", "shard.seed=5")
    assert other_shards["decoder"] == base["decoder"]
    assert other_shards["fusion"] != base["fusion"]
    with_stats = keys_of(f"decoder.released={model_pt}", f"decoder.released_stats={stat_pt}")
    assert with_stats["decoder"] != base["decoder"]
    assert keys_of()["decoder"] != base["decoder"]
    torch.save(make_decoder(9).state_dict(), moved)
    assert keys_of(f"decoder.released={moved}")["decoder"] != base["decoder"]
    wider = keys_of(f"decoder.released={model_pt}", "decoder.model.mlp_hidden=32")
    assert wider["decoder"] != base["decoder"]


def test_latents_read_the_decoder_only_for_imported_statistics(
    model_pt: Path, stat_pt: Path
) -> None:
    given = [f"decoder.released={model_pt}", f"decoder.released_stats={stat_pt}"]
    given.append("fusion.model.kind=rae")
    stage = stages.find_stage("latents")
    plain, imported = full_of(*given), full_of(*given, "latents.stats=imported")
    keys = stages.stage_keys(plain)
    assert stages.needs_of(plain, stage, keys) == ("shard", "fusion")
    assert stages.needs_of(imported, stage, keys) == ("shard", "decoder", "fusion")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_then_import_gives_equal_tensors(
    workspace: Path, model_pt: Path, stat_pt: Path, tmp_path: Path, suffix: str
) -> None:
    released = [f"decoder.released={model_pt}", f"decoder.released_stats={stat_pt}"]
    out, stats_out = tmp_path / f"out{suffix}", tmp_path / f"stats{suffix}"
    assert drorae(workspace, "import", "--decoder", model_pt, "--stats", stat_pt) == 0
    sets = [*SMALL, *released]
    flags = ("--stage", "decoder", "--out", out, "--stats", stats_out)
    assert drorae(workspace, "export", *flags, sets=sets) == 0
    again = import_decoder(out, heads=2)
    for name, value in make_decoder(0).state_dict().items():
        assert torch.equal(again.state[name], value)
    assert torch.equal(load_latent_stats(stats_out).var, torch.load(stat_pt)["var"])

    place = Workspace(str(workspace))
    assert drorae(workspace, "import", "--decoder", out, "--stats", stats_out) == 0
    outputs = [m for m in place.outputs() if m.stage == "decoder"]
    assert len(outputs) == 2
    files = [{entry.name: entry.sha256 for entry in m.files} for m in outputs]
    for name in ("decoder.safetensors", "stats.safetensors"):
        assert files[0][name] == files[1][name]


def test_every_stage_is_exported_as_its_averaged_weights(workspace: Path, tmp_path: Path) -> None:
    keys, out = keys_of(), tmp_path / "out.safetensors"
    config = DiTConfig(
        input_size=4, in_channels=6, hidden_size=(16, 24), depth=(1, 1), num_heads=(2, 2)
    )
    weights = {
        "finetune": ("decoder", make_decoder(2).state_dict()),
        "fusion": ("fusion", {"router.weight": torch.randn(2, 3)}),
        "guide": ("dit", DiT(config).state_dict()),
    }
    for stage, (name, state) in weights.items():
        online = {key: value + 1 for key, value in state.items()}
        files = {f"{name}.safetensors": saved(state), f"{name}_online.safetensors": saved(online)}
        files["config.json"] = json.dumps({"model": stage}).encode()
        commit(workspace, stage, keys[stage], files)
        for path in (out, tmp_path / "out.pt"):
            assert drorae(workspace, "export", "--stage", stage, "--out", path) == 0
        for found in (load_file(out), torch.load(tmp_path / "out.pt", weights_only=True)):
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], value) for key, value in state.items())
        with safe_open(out, "pt") as file:
            facts = file.metadata()
        assert (facts["stage"], facts["key"], facts["weights"]) == (stage, keys[stage], "ema")
        assert json.loads(facts["config"]) == {"model": stage}
    DiT(config).load_state_dict(torch.load(tmp_path / "out.pt"), strict=True)


def test_statistics_of_a_trained_run_are_those_of_its_latents(
    workspace: Path, tmp_path: Path
) -> None:
    keys, stats = keys_of(), {"mean": torch.randn(SHAPE), "var": torch.rand(SHAPE)}
    commit(workspace, "latents", keys["latents"], {"stats.safetensors": saved(stats)})
    config = json.dumps({}).encode()
    tensors = {"dit.safetensors": saved({"a": torch.zeros(2)}), "config.json": config}
    commit(workspace, "diffusion", keys["diffusion"], tensors)
    flags = ("--stage", "diffusion", "--out", tmp_path / "dit.pt", "--stats", tmp_path / "stat.pt")
    assert drorae(workspace, "export", *flags) == 0
    written = torch.load(tmp_path / "stat.pt", weights_only=True)
    assert list(written) == ["mean", "var"]
    assert torch.equal(written["mean"], stats["mean"])


def test_what_cannot_be_imported_or_exported_is_told_in_one_line(
    workspace: Path, model_pt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, small_stats = tmp_path / "wide.safetensors", tmp_path / "stats.safetensors"
    save_file(make_decoder(0, mlp_hidden=40).state_dict(), wide)
    save_file({"mean": torch.zeros(384, 4, 4), "var": torch.ones(384, 4, 4)}, small_stats)
    digest = f"sha256:{'a' * 64}"
    export = ("export", "--stage", "fusion", "--out")
    cases = [
        (("import", "--decoder", wide), "--set decoder.model.mlp_hidden=40"),
        (("import", "--decoder", model_pt, "--stats", small_stats), "shape (384, 4, 4)"),
        (("import", "--decoder", tmp_path / "no.pt"), "no.pt does not exist"),
        (("import", "--decoder", digest), "expected what `drorae import` put there"),
        (("import", "--decoder", "sha256:12"), "is no digest"),
        ((*export, tmp_path / "a.pt"), "stages ['fusion'] of recipe smoke are not in"),
        ((*export, tmp_path / "no" / "a.pt"), "cannot be written"),
        ((*export, tmp_path / "a.pt", "--format", "safetensors"), "ends in .safetensors"),
    ]
    for arguments, message in cases:
        assert drorae(workspace, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not list(Workspace(str(workspace)).outputs())


def test_statistics_without_their_decoder_or_latents_are_refused(
    model_pt: Path, stat_pt: Path
) -> None:
    with pytest.raises(ValueError, match=r"without decoder\.released"):
        DecoderStage(
            model=full_of().decoder.model, train=full_of().decoder.train, released_stats="x"
        )
    given = [f"decoder.released={model_pt}", f"decoder.released_stats={stat_pt}"]
    with pytest.raises(
        ValueError, match=r"latents\.stats=imported with fusion\.model\.kind=drorae"
    ):
        full_of(*given, "latents.stats=imported")
    with pytest.raises(ValueError, match=r"latents\.stats=imported"):
        full_of(f"decoder.released={model_pt}", "fusion.model.kind=rae", "latents.stats=imported")
    assert to_json(full_of(*given))["decoder"]["released_stats"] == str(stat_pt)
