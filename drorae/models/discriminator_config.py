"""Shape of the patch discriminator and source of its trunk, without torch.

The network itself is in `drorae.models.discriminator`.
"""

from dataclasses import dataclass

from drorae.config import expand_home

__all__ = ["DiscriminatorConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Frozen trunk and trained heads. Shape defaults: DINO ViT-S/8 as in RAE."""

    source: str
    """DINO state dict (`dino_vit_small_patch8_224.pth`), `asset:NAME`, or `random` for tests and
    dry runs."""
    input_px: int = 224
    """Side to which images are resized, whatever their size. RAE uses 224 for 512 px images too."""
    patch_px: int = 8
    """Patch side of the trunk in pixels."""
    width: int = 384
    """Channels of the trunk."""
    depth: int = 12
    """Blocks of the trunk."""
    heads: int = 6
    """Attention heads of the trunk."""
    taps: tuple[int, ...] = (12, 3, 6, 9, 12)
    """Blocks whose output each head reads, 1 = first. RAE taps the last block twice."""
    kernel: int = 9
    """Window of a head's residual convolution along the token sequence."""

    def __post_init__(self) -> None:
        """Check what the configuration alone can know."""
        expand_home(self, "source")
        for name in ("input_px", "patch_px", "width", "depth", "heads", "kernel"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"discriminator.{name}={getattr(self, name)} is out of range: expected at "
                    "least 1."
                )
        if self.input_px % self.patch_px or self.width % self.heads:
            raise ValueError(
                f"discriminator: input_px={self.input_px} must be a multiple of "
                f"patch_px={self.patch_px}, and width={self.width} of heads={self.heads}."
            )
        if not self.taps or min(self.taps) < 1 or max(self.taps) > self.depth:
            raise ValueError(
                f"discriminator.taps={self.taps}: expected block numbers from 1 to {self.depth}."
            )
        if self.kernel % 2 == 0 or self.kernel // 2 > self.num_tokens:
            raise ValueError(
                f"discriminator.kernel={self.kernel}: expected an odd window no wider than "
                f"twice the {self.num_tokens} tokens."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that a head reads."""
        return (self.input_px // self.patch_px) ** 2
