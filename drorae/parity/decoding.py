"""Checks of the decoder: images from tokens, and from normalised latents through statistics."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from drorae.config import from_json, to_json
from drorae.models.autoencoder import STATS_EPS, denormalise_latent, map_to_tokens
from drorae.models.checkpoint_layout import check_tensors, import_decoder, load_latent_stats
from drorae.models.decoder import Decoder, DecoderConfig
from drorae.models.reference_config import (
    read_decoder_fields,
    unknown_decoder_keys,
    without_keys,
)
from drorae.parity.folder import Check, Part
from drorae.shapes import Tensor

__all__ = ["DecoderPart"]

WEIGHTS, STATS = "rae_decoder.safetensors", "latent_stats.pt"


class DecoderPart(Part):
    """Images of a decoder from tokens and from normalised latents."""

    config_file = "rae_decoder.json"
    io_file = "rae_decoder_io.safetensors"

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The known keys of the configuration file under our names."""
        unknown = unknown_decoder_keys(self.content, self.config_file)
        self.passed_over |= dict.fromkeys(unknown)
        return read_decoder_fields(without_keys(self.content, unknown), self.config_file)

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder; sizes that the file does not give are read from its tensors."""
        given = {name: value for name, value in self.fields.items() if name != "stats_eps"}
        weights = self.path(WEIGHTS)
        imported = import_decoder(weights, heads=given.get("heads"))
        sizes = to_json(imported.config)
        config = from_json(DecoderConfig, sizes | given, self.config_file)
        complaint = f"{weights.name} does not fit {self.config_file}"
        with torch.device("meta"):  # sizes that do not fit may be beyond any memory
            check_tensors(imported.state, Decoder(config).state_dict(), complaint)
        decoder = Decoder(config).eval()
        decoder.load_state_dict(imported.state, strict=True)
        return decoder

    def image_from_tokens(self) -> Tensor:
        """Tokens as the encoder gives them."""
        return self.decoder(self.read("tokens"))

    def image_from_normalised_latent(self) -> Tensor:
        """A latent map as the diffusion model gives it, through the statistics."""
        stats = load_latent_stats(self.folder / STATS)
        eps = float(self.fields.get("stats_eps", STATS_EPS))
        latent = self.read("latent_normalised")
        sizes = zip(stats.mean.shape, latent.shape[1:], strict=False)
        if latent.ndim != 4 or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(
                f"{STATS} has shape {tuple(stats.mean.shape)}: expected that of one latent of "
                f"{tuple(latent.shape)}"
            )
        return self.decoder(map_to_tokens(denormalise_latent(latent, stats.mean, stats.var, eps)))

    checks: Mapping[str, Check] = {
        "image_from_tokens": Check(compute=image_from_tokens, inputs=("tokens",), files=(WEIGHTS,)),
        "image_from_normalised_latent": Check(
            compute=image_from_normalised_latent,
            inputs=("latent_normalised",),
            files=(WEIGHTS, STATS),
        ),
    }
