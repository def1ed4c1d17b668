import pytest

from drorae import recipes
from drorae.config import override
from drorae.cost.count import NetworkCost
from drorae.cost.networks import count_dit, count_encoder, count_perceptual, split_fusion
from drorae.cost.run import RunCost, count_run
from drorae.cost.stages import PEAK_SHARE, Networks, StageCost, evaluate_cost, tokenizer_cost
from drorae.models.dit_config import DiTConfig
from drorae.models.encoder_config import FAMILIES, EncoderConfig
from pipelines.stages import STAGES

ALL = [stage.name for stage in STAGES]
IMAGENET = recipes.get("imagenet256")


@pytest.fixture(scope="module")
def paper() -> RunCost:
    return count_run(IMAGENET, ALL)


def network(name: str, flops: int) -> NetworkCost:
    kept = {"trained": 10, "passed": 5, "frozen": 0}
    return NetworkCost(
        name=name,
        parameters=100,
        trainable=90,
        step_flops={"frozen": flops, "passed": 2 * flops, "trained": 3 * flops},
        activation_bytes=kept,
    )


NETWORKS = Networks(
    encoder=network("encoder", 1),
    fusion=network("fusion", 10),
    last_layer=network("last", 0),
    decoder=network("decoder", 100),
    lpips=network("lpips", 1000),
    critic_trunk=network("trunk", 10**4),
    critic_heads=network("heads", 10**5),
    diffusion=network("diffusion", 10**6),
    guide=network("guide", 10**7),
)


def stage_of(cost: RunCost, name: str) -> StageCost:
    return next(stage for stage in cost.stages if stage.stage == name)


def test_parameters_of_the_paper_are_those_of_released_weights(paper: RunCost) -> None:
    by_name = {found.name: found.parameters for found in paper.networks}
    assert by_name == {
        "encoder dinov2-with-registers-base": 86_583_552,
        "fusion drorae": 56_853_516,
        "decoder 1152 x 28": 415_352_704,
        "LPIPS vgg": 14_716_166,
        "discriminator trunk": 21_670_272,
        "discriminator heads": 7_386_245,
        "diffusion": 838_675_796,
        "guide": 196_455_764,
    }
    assert paper.fusion_split["experts"] == 12 * (2 * 768 * 3072 + 3072 + 768)
    assert paper.fusion_split["hidden_norm"] == 12 * 2 * 3072


def test_flops_of_the_paper_are_those_of_its_matrices(paper: RunCost) -> None:
    flops = {found.name: found.forward_flops for found in paper.networks}
    experts = 256 * 12 * 2 * 2 * 768 * 3072
    assert flops["fusion drorae"] == pytest.approx(experts, rel=0.003)  # and the router
    # 261 tokens, 12 blocks, each 12 matrices of 768 x 768 and two products of attention.
    blocks = 12 * (261 * 2 * 12 * 768**2 + 2 * 2 * 261**2 * 768)
    embedding = 256 * 2 * 768 * 3 * 14**2
    assert flops["encoder dinov2-with-registers-base"] == blocks + embedding


def test_storage_and_steps_of_the_paper(paper: RunCost) -> None:
    storage = {found.what: found.size_bytes for found in paper.storage}
    assert storage["latents"] == 2 * 1_281_167 * 768 * 16 * 16 * 2  # both views
    assert stage_of(paper, "diffusion").images == 80 * 5004 * 256
    assert stage_of(paper, "latents").images == 2 * 1_281_167
    assert list(stage_of(paper, "latents").flops) == ["tf32"]  # as latents.precision says
    assert stage_of(paper, "diffusion").memory["ddp"].images == 32
    assert stage_of(paper, "diffusion").memory["none"].images == 256


def test_memory_adds_up(paper: RunCost) -> None:
    one = stage_of(paper, "diffusion").memory["ddp"]
    assert one.weights == 4 * 838_675_796
    assert one.gradients == one.average == one.buckets == one.optimizer // 2 == 4 * 838_380_628
    assert one.total == one.weights + 5 * one.gradients + one.activations
    alone = stage_of(paper, "diffusion").memory["none"]
    assert (alone.buckets, alone.activations) == (0, 8 * one.activations)


@pytest.mark.parametrize("name", ["imagenet256", "imagenet256_raev2", "imagenet512"])
def test_every_stage_fits_gpus_of_80_gb(name: str) -> None:
    cost = count_run(recipes.get(name), ALL)
    totals = {stage.stage: stage.memory["ddp"].total for stage in cost.stages if stage.memory}
    assert 20e9 < max(totals.values()) < 70e9  # room for the allocator


def test_only_what_is_asked_for_is_counted_and_unneeded_networks_are_not_shown() -> None:
    full = recipes.get("cifar10")
    cost = count_run(full, ["diffusion"], num_train_images=123)
    assert [stage.stage for stage in cost.stages] == ["diffusion"]
    assert cost.num_train_images == 123
    assert not any("discriminator" in found.name for found in cost.networks)
    capped = count_run(override(full, ["shard.max_train_images=1000"]), [])
    assert (capped.num_train_images, capped.num_val_images) == (1000, 10_000)


def test_a_tokenizer_step_adds_every_network_at_its_role() -> None:
    job = override(
        IMAGENET.fusion.train,
        ["num_steps=100", "batch_images=2", "order.streams=2", "adversarial.start_step=50",
         "adversarial.learn_from_step=25"],
    )  # fmt: skip
    cost = tokenizer_cost("fusion", job, NETWORKS, num_train_images=50, num_workers=1)
    trained_and_passed = 3 * 10 + 2 * 100
    guided = 2 * (10**4 + 10**5)
    learned = 10 + 100 + 2 * (10**4 + 3 * 10**5)
    assert cost.step_flops == {
        "bfloat16": trained_and_passed,
        "tf32": 3 * 1000 + 1 + guided + learned,
    }
    assert cost.flops["tf32"] == 200 * (3 * 1000 + 1 + 0.5 * guided + 0.75 * learned)
    memory = cost.memory["none"]
    assert memory.gradients == 4 * (90 + 90)  # fusion and heads
    assert memory.activations == 2 * (0.5 * (10 + 5) + 5 + 5 + 10)


def test_states_that_are_kept_are_computed_once() -> None:
    job = override(
        recipes.get("smoke").decoder.train, ["num_steps=100", "batch_images=2", "lpips_weight=0"]
    )
    cost = tokenizer_cost("decoder", job, NETWORKS, num_train_images=50, num_workers=1)
    assert cost.flops == {"float32": 200 * 3 * 100 + 50 * 1, "tf32": 0}


def test_samples_cost_what_their_guidance_evaluates() -> None:
    job = override(
        IMAGENET.evaluate,
        ["num_samples=10", "num_grid_points=3", 'guidances=["unguided","cfg","autoguidance"]'],
    )

    def drawn(sampler: str) -> float:
        settings = override(job, [f"sampler={sampler}"])
        cost = evaluate_cost(settings, NETWORKS, num_val_images=0, num_decoders=0)
        return cost.flops["tf32"]

    evaluations = 4 * 10**6 + 10**7
    assert drawn("euler") == 10 * (2 * evaluations + 3 * 100)
    assert drawn("heun") == 10 * (4 * evaluations + 3 * 100)


def test_hours_follow_the_rate_of_each_format() -> None:
    cost = StageCost(stage="x", images=1, flops={"bfloat16": 3.6e18, "tf32": 3.6e18})
    assert cost.gpu_hours(1000, 0.5) == pytest.approx(2 + 4)
    assert PEAK_SHARE["float32"] < 0.1


def test_a_base_head_is_counted() -> None:
    sizes = {"input_size": 4, "in_channels": 8, "hidden_size": 16, "depth": 2, "num_heads": 2}
    plain = count_dit("plain", DiTConfig(**sizes))
    headed = count_dit("headed", DiTConfig(**sizes, base_head_after=1))
    assert headed.parameters - plain.parameters == 16 + (16 * 8 + 8) + (16 * 32 + 32)
    assert headed.forward_flops > plain.forward_flops


@pytest.mark.parametrize(
    ("source", "family", "parameters"),
    [
        ("facebook/dinov2-base", "dinov2", 86_580_480),
        ("google/siglip2-base-patch16-256", "siglip_vision_model", 92_930_304),
        ("facebook/vit-mae-base", "vit_mae", 85_844_736),
        ("openai/clip-vit-base-patch16", "clip_vision_model", 85_799_424),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3_vit", 85_660_416),
    ],
)
def test_encoders_are_counted_from_their_names(source: str, family: str, parameters: int) -> None:
    patch = 14 if family == "dinov2" else 16
    config = EncoderConfig(
        source=source,
        input_px=224 if "clip" in family else 16 * patch,
        patch_px=patch,
        image_mean=FAMILIES[family].mean,
        image_std=FAMILIES[family].std,
    )
    assert count_encoder(config).parameters == parameters


def test_the_small_lpips_and_a_fusion_without_parameters() -> None:
    assert count_perceptual("alex", 64).parameters == 2_470_854
    full = recipes.get("ablation:table3/rae")
    assert split_fusion(full.fusion.model, full.encoder)["total"] == 0
