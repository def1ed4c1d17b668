"""What the CIFAR-10 recipes share: encoder, shapes that follow from it, RAE's AdamW."""

from drorae.models.decoder_config import DecoderConfig
from drorae.models.dit_config import DiTConfig
from drorae.models.encoder_config import EncoderConfig
from drorae.training.jobs import OptimConfig

__all__ = ["ENCODER", "IMAGE_PX", "decoder", "dit", "optim"]

IMAGE_PX = 32

ENCODER = EncoderConfig(
    source="asset:dinov2-s-saliency", input_px=112, patch_px=14, width=384, depth=12
)
"""DINOv2 ViT-S/14 fine-tuned for saliency: 8 x 8 tokens of a photo shown at 112 px."""


def decoder(width: int, layers: int, heads: int) -> DecoderConfig:
    """A decoder of photos from the encoder's tokens, with an MLP of four times its width."""
    return DecoderConfig(
        latent_channels=ENCODER.width,
        width=width,
        layers=layers,
        heads=heads,
        mlp_hidden=4 * width,
        grid=ENCODER.grid,
        patch_px=IMAGE_PX // ENCODER.grid,
    )


def dit(
    *,
    hidden_size: tuple[int, int],
    depth: tuple[int, int],
    num_heads: tuple[int, int],
    mlp_ratio: float = 4.0,
) -> DiTConfig:
    """A generator of the latents of ten classes; pairs are (backbone, head)."""
    return DiTConfig(
        input_size=ENCODER.grid,
        in_channels=ENCODER.width,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=10,
        mlp_ratio=mlp_ratio,
        label_init_std=1.0,
    )


def optim(lr: float, *, final_lr: float, warmup_steps: int) -> OptimConfig:
    """RAE's betas and no weight decay, a cosine after the warm-up, gradients clipped at 1."""
    return OptimConfig(
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=warmup_steps,
        final_lr=final_lr,
        clip_norm=1.0,
    )
