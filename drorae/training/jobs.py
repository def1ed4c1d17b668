"""Configuration sections of the tokenizer stages: a network, how it is trained, and where released weights come from."""

from dataclasses import dataclass

from drorae.models.decoder import DecoderConfig
from drorae.models.fusion import FusionConfig
from drorae.training.tokenizer import TokenizerTraining

__all__ = ["DecoderStage", "FinetuneStage", "FusionStage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderStage:
    """The `decoder` stage: train RAE's decoder, or import a released one."""

    model: DecoderConfig
    """Size of the decoder; an imported one must fit it."""
    train: TokenizerTraining
    """How it is trained; unused when `released` is given."""
    released: str = ""
    """Path or URI of released decoder weights (any of the five layouts); empty trains from scratch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionStage:
    """The `fusion` stage: train the fusion module only."""

    model: FusionConfig
    """The fusion module."""
    train: TokenizerTraining
    """How it is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneStage:
    """The `finetune` and `control` stages: train a decoder on from the `decoder` stage's weights."""

    train: TokenizerTraining
    """How it is trained."""
