"""FLOPs and memory of every stage, put together from its networks' counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drorae.cost.count import NetworkCost, Role
from drorae.data.jobs import LatentJob
from drorae.evaluation.job import EvaluateJob
from drorae.training.jobs import AdversarialConfig, DiffusionStage, TokenizerTraining

__all__ = [
    "PEAK_SHARE",
    "Flops",
    "Memory",
    "Networks",
    "StageCost",
    "diffusion_cost",
    "evaluate_cost",
    "latents_cost",
    "tokenizer_cost",
]

Flops = Mapping[str, float]
"""FLOPs by number format of the matrix products: bfloat16, tf32, float32."""

PEAK_SHARE = {"bfloat16": 1.0, "tf32": 0.5, "float32": 66.9 / 989.4}
"""Peak rate of a format over bfloat16's. NVIDIA H100 SXM data sheet, dense: 989.4, 494.7, 66.9."""

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """All networks of a run."""

    encoder: NetworkCost
    fusion: NetworkCost
    last_layer: NetworkCost
    """RAE's latent: what the stages `decoder` and `control` use for a fusion."""
    decoder: NetworkCost
    lpips: NetworkCost
    critic_trunk: NetworkCost
    critic_heads: NetworkCost
    diffusion: NetworkCost
    guide: NetworkCost


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one GPU, the most in any step of a stage, without the caching allocator's slack."""

    images: int
    """Images of a global batch that this GPU takes."""
    weights: int
    """4 x values of all networks on the GPU; master weights are float32."""
    gradients: int
    """4 x trained values."""
    optimizer: int
    """8 x trained values: AdamW's two moments."""
    average: int
    """4 x trained values: EMA."""
    buckets: int
    """4 x trained values with more than one worker: DistributedDataParallel's own copy."""
    activations: int
    """images x what autograd keeps for one image (`drorae.cost.count`), half under bfloat16."""

    @property
    def total(self) -> int:
        """Sum."""
        states = self.weights + self.gradients + self.optimizer + self.average
        return states + self.buckets + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """One stage."""

    stage: str
    images: int
    """Images that pass through, repeats counted."""
    flops: Flops
    """Of the whole stage."""
    step_flops: Flops = field(default_factory=dict)
    """Of one image in a step of training with every term on."""
    memory: dict[str, Memory] = field(default_factory=dict)
    """On one GPU: `none` for the whole batch on it, `ddp` for its part of the batch."""

    def gpu_hours(self, peak_tflops: float, mfu: float) -> float:
        """Hours of one GPU.

        Args:
            peak_tflops: Peak rate in bfloat16, 10^12 FLOPs a second.
            mfu: Share of the peak that is reached.
        """
        seconds = sum(
            flops / (peak_tflops * 1e12 * PEAK_SHARE[kind] * mfu)
            for kind, flops in self.flops.items()
        )
        return seconds / 3600


@dataclass(frozen=True, slots=True)
class _Part:
    """A network on the path of a training step's gradients."""

    network: NetworkCost
    role: Role
    autocast: bool = True
    """Whether autocast covers it."""

    def kept_bytes(self, precision: str) -> float:
        halved = self.autocast and precision == "bfloat16"
        return self.network.activation_bytes[self.role] * (0.5 if halved else 1.0)


def tokenizer_cost(
    stage: str,
    job: TokenizerTraining,
    networks: Networks,
    *,
    num_train_images: int,
    num_workers: int,
) -> StageCost:
    """The stages decoder, fusion, finetune and control."""
    fusion = networks.last_layer if stage in ("decoder", "control") else networks.fusion
    fusion_role: Role = "trained" if stage == "fusion" else "frozen"
    decoder_role: Role = "passed" if stage == "fusion" else "trained"
    pair = networks.lpips.step_flops["passed"] + networks.lpips.forward_flops
    lpips = pair if job.lpips_weight else 0
    encode = networks.encoder.forward_flops
    cached = job.hidden_states != "none"
    trained = fusion.step_flops[fusion_role] + networks.decoder.step_flops[decoder_role]
    # What autocast leaves out; cuDNN's convolutions use TF32 unless set otherwise.
    outside = "float32" if job.precision == "float32" else "tf32"
    plain = _add({job.precision: trained, "tf32": lpips}, {outside: 0 if cached else encode})
    guided, learning = _adversarial(job.adversarial, networks, fusion, outside)
    starts = job.adversarial.in_steps(max(1, num_train_images // job.batch_images))
    share = {
        "guided": _share_after(starts.start_step, job.num_steps),
        "learning": _share_after(starts.learn_from_step, job.num_steps),
    }
    images = job.num_steps * job.batch_images
    total = _times(plain, images)
    total = _add(total, _times(guided, images * share["guided"]))
    total = _add(total, _times(learning, images * share["learning"]))
    if cached:
        total = _add(total, {outside: encode * min(images, num_train_images)})
    parts = [_Part(fusion, fusion_role), _Part(networks.decoder, decoder_role)]
    parts += [_Part(networks.lpips, "passed", autocast=False)] if lpips else []
    if guided:
        parts.append(_Part(networks.critic_trunk, "passed", autocast=False))
        parts.append(_Part(networks.critic_heads, "trained", autocast=False))
    return StageCost(
        stage=stage,
        images=images,
        flops=total,
        step_flops=_add(plain, _add(guided, learning)),
        memory=_memory(parts, [networks.encoder], job.batch_images, num_workers, job.precision),
    )


def diffusion_cost(
    stage: str, job: DiffusionStage, network: NetworkCost, *, num_workers: int
) -> StageCost:
    """The stages diffusion and guide."""
    step: Flops = {job.precision: network.step_flops["trained"]}
    images = job.num_steps * job.batch_images
    parts = [_Part(network, "trained")]
    return StageCost(
        stage=stage,
        images=images,
        flops=_times(step, images),
        step_flops=step,
        memory=_memory(parts, [], job.batch_images, num_workers, job.precision),
    )


def latents_cost(job: LatentJob, networks: Networks, num_train_images: int) -> StageCost:
    """Encode every training image once, and mirrored."""
    images = num_train_images * (2 if job.flip else 1)
    once = networks.encoder.forward_flops + networks.fusion.forward_flops
    return StageCost(stage="latents", images=images, flops={job.precision: float(once * images)})


def evaluate_cost(
    job: EvaluateJob, networks: Networks, *, num_val_images: int, num_decoders: int
) -> StageCost:
    """Reconstruct the held-out photos, draw samples; feature networks are left out.

    LPIPS is always float32, the rest as the job says.
    """
    steps = (job.num_grid_points - 1) * (2 if job.sampler == "heun" else 1)
    generator, decoder = networks.diffusion.forward_flops, networks.decoder.forward_flops
    weak = {"cfg": generator, "autoguidance": networks.guide.forward_flops}
    drawn = sum(steps * (generator + weak.get(name, 0)) + decoder for name in job.guidances)
    once = networks.encoder.forward_flops + networks.fusion.forward_flops
    reconstructed = once + num_decoders * decoder
    flops = job.num_samples * drawn + num_val_images * reconstructed
    lpips = num_val_images * num_decoders * 2 * networks.lpips.forward_flops
    images = job.num_samples * len(job.guidances) + num_val_images
    cost = _add({job.precision: flops}, {"float32": lpips})
    return StageCost(stage="evaluate", images=images, flops=cost)


def _adversarial(
    config: AdversarialConfig, networks: Networks, fusion: NetworkCost, number_format: str
) -> tuple[Flops, Flops]:
    """One image of the generator's term, and of a step of the discriminator."""
    if config.weight == 0:
        return {}, {}
    trunk, heads = networks.critic_trunk, networks.critic_heads
    guided = trunk.step_flops["passed"] + heads.step_flops["passed"]
    fresh = fusion.forward_flops + networks.decoder.forward_flops  # a fake of the new weights
    pair = 2 * (trunk.forward_flops + heads.step_flops["trained"])  # real and fake
    return {number_format: float(guided)}, {number_format: float(fresh + pair)}


def _memory(
    parts: Sequence[_Part],
    idle: Sequence[NetworkCost],
    batch_images: int,
    num_workers: int,
    precision: str,
) -> dict[str, Memory]:
    """Memory of a training step.

    Args:
        parts: Networks on the path of gradients.
        idle: Networks that only hold weights.
        batch_images: Global batch.
        num_workers: GPUs.
        precision: Of autocast.
    """
    values = sum(n.parameters for n in [*(part.network for part in parts), *idle])
    trained = FLOAT_BYTES * sum(p.network.trainable for p in parts if p.role == "trained")
    kept = sum(part.kept_bytes(precision) for part in parts)

    def on(workers: int) -> Memory:
        images = -(-batch_images // workers)
        return Memory(
            images=images,
            weights=FLOAT_BYTES * values,
            gradients=trained,
            optimizer=2 * trained,
            average=trained,
            buckets=trained if workers > 1 else 0,
            activations=round(images * kept),
        )

    return {"none": on(1)} | ({"ddp": on(num_workers)} if num_workers > 1 else {})


def _share_after(step: int, num_steps: int) -> float:
    return max(0, num_steps - step) / num_steps


def _times(flops: Flops, factor: float) -> Flops:
    return {kind: value * factor for kind, value in flops.items()}


def _add(left: Flops, right: Flops) -> Flops:
    kinds = dict.fromkeys([*left, *right])
    return {kind: float(left.get(kind, 0) + right.get(kind, 0)) for kind in kinds}
