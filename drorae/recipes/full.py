"""The whole configuration of a run: a section per stage, the shared encoder, how to compute."""

import dataclasses
from dataclasses import dataclass, field

from drorae.config import Compute
from drorae.data.jobs import LatentJob, ShardJob
from drorae.evaluation.job import EvaluateJob, ReportJob
from drorae.models.encoder_config import EncoderConfig
from drorae.training.jobs import DecoderStage, DiffusionStage, FinetuneStage, FusionStage

__all__ = ["FullJob"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FullJob:
    """Everything that a run of the graph needs to know.

    A stage sees only the sections that its key covers (the table in pipelines/stages.py).
    """

    recipe: str
    """Name of the recipe that this configuration started from."""
    seed: int = 0
    """Seed of initialisation, sample order, noise and generated samples."""
    shard: ShardJob
    """Raw images to shards."""
    encoder: EncoderConfig
    """The frozen encoder."""
    decoder: DecoderStage
    """RAE's decoder."""
    fusion: FusionStage
    """The fusion module."""
    finetune: FinetuneStage
    """The decoder, tuned to the fused latents."""
    latents: LatentJob = field(default_factory=LatentJob)
    """The latent cache."""
    diffusion: DiffusionStage
    """The generator."""
    guide: DiffusionStage
    """The weak generator for AutoGuidance."""
    evaluate: EvaluateJob = field(default_factory=EvaluateJob)
    """Measurements."""
    report: ReportJob = field(default_factory=ReportJob)
    """The page."""
    compute: Compute = field(default_factory=Compute)
    """How to compute; changes no key."""

    def __post_init__(self) -> None:
        """Check what only the whole configuration can know."""
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is out of range: expected 0 or more.")
        self._check_tokens()
        self._check_views()
        self._check_latents()
        self._check_imported_stats()
        self._check_guidances()

    @property
    def control(self) -> FinetuneStage:
        """The honest baseline: the last-layer decoder, trained on for as many steps as DRoRAE."""
        steps = self.fusion.train.num_steps + self.finetune.train.num_steps
        return FinetuneStage(train=dataclasses.replace(self.finetune.train, num_steps=steps))

    def _check_tokens(self) -> None:
        decoder = self.decoder.model
        if decoder.latent_channels != self.encoder.width:
            raise ValueError(
                f"decoder.model.latent_channels={decoder.latent_channels} does not fit "
                f"encoder.width={self.encoder.width}: expected the same number."
            )
        if decoder.grid != self.encoder.grid:
            raise ValueError(
                f"decoder.model.grid={decoder.grid} does not fit the encoder, which gives "
                f"{self.encoder.grid} tokens a side (encoder.input_px / encoder.patch_px)."
            )
        side_px = decoder.grid * decoder.patch_px
        if side_px != self.shard.resolution_px:
            raise ValueError(
                f"the decoder draws {side_px} px (decoder.model.grid x patch_px) but "
                f"shard.resolution_px={self.shard.resolution_px}: expected the same number."
            )

        given = (decoder.image_mean, decoder.image_std)
        expected = (self.encoder.image_mean, self.encoder.image_std)
        if given != expected:
            raise ValueError(
                f"decoder.model.image_mean, image_std = {given} differ from the encoder's "
                f"{expected}: expected the same, since the decoder's output is image * std + mean."
            )

    def _check_views(self) -> None:
        phases = {"fusion": self.fusion.train, "finetune": self.finetune.train}
        phases |= {} if self.decoder.released else {"decoder": self.decoder.train}
        for name, train in phases.items():
            if train.view == "random_crop" and self.shard.view_px is None:
                raise ValueError(
                    f"{name}.train.view=random_crop needs whole training images: set "
                    "shard.pictures=source and shard.view_px, for example "
                    f"{self.shard.resolution_px * 3 // 2}."
                )

    def _check_imported_stats(self) -> None:
        if self.latents.stats != "imported":
            return
        if not self.decoder.released_stats or self.fusion.model.kind != "rae":
            raise ValueError(
                f"latents.stats=imported with fusion.model.kind={self.fusion.model.kind} and "
                f"decoder.released_stats={self.decoder.released_stats!r}: expected kind rae, whose "
                "latents the statistics belong to, and their file; or set latents.stats=computed."
            )

    def _check_latents(self) -> None:
        for name, stage in (("diffusion", self.diffusion), ("guide", self.guide)):
            expected = (self.encoder.width, self.encoder.grid)
            given = (stage.model.in_channels, stage.model.input_size)
            if given != expected:
                raise ValueError(
                    f"{name}.model.in_channels, input_size = {given} do not fit the encoder's "
                    f"latents: expected {expected}."
                )

    def _check_guidances(self) -> None:
        model, wanted = self.diffusion.model, self.evaluate.guidances
        if "internal" in wanted and model.base_head_after is None:
            raise ValueError(
                "evaluate.guidances names internal, which needs the base head of the generator: "
                "set diffusion.model.base_head_after (RAEv2: 8) or leave internal out."
            )
        if "cfg" in wanted and model.class_dropout_prob == 0:
            raise ValueError(
                "evaluate.guidances names cfg, which needs the null class: set "
                "diffusion.model.class_dropout_prob above 0 or leave cfg out."
            )
