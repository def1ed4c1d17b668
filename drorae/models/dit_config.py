"""Configuration and size presets of the diffusion transformer, without torch: quick to import.

Fields carry the names of the RAE reference constructors, so that a released configuration can be
pasted in. The network itself is in `drorae.models.dit`.
"""

from dataclasses import dataclass

__all__ = ["DIT_PRESETS", "HEAD_WIDTH", "DiTConfig", "dit_preset"]

HEAD_WIDTH = 2048
"""Width of the two head blocks in every DiT-DH size. Source: RAE, DiT-DH configurations."""

HEAD_DEPTH = 2
HEAD_NUM_HEADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes and options of a diffusion transformer.

    Two numbers in `hidden_size` and `depth` mean (trunk, head): DiT-DH. One number means the plain
    LightningDiT.
    """

    input_size: int = 16
    """Side of the latent map, in latent positions. 16 for 256 px, 32 for 512 px (RAE)."""
    in_channels: int = 768
    """Channels of the latent map: the width of the encoder."""
    hidden_size: int | tuple[int, ...] = (1152, HEAD_WIDTH)
    """Channels of a token: (trunk, head), or one number without a head."""
    depth: int | tuple[int, ...] = (28, HEAD_DEPTH)
    """Number of blocks: (trunk, head), or one number without a head."""
    num_heads: int | tuple[int, ...] = (16, HEAD_NUM_HEADS)
    """Attention heads: (trunk, head); one number serves both."""
    num_classes: int = 1000
    """Number of classes. Label `num_classes` is the null class when `class_dropout_prob` > 0."""
    patch_size: int | tuple[int, ...] = 1
    """Latent positions a side of one token: (trunk, head); one number serves both."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part over the token width, before the 2/3 of SwiGLU."""
    class_dropout_prob: float = 0.1
    """Probability to replace a label by the null class in training. 0 removes the null class and
    with it CFG."""
    use_qknorm: bool = False
    """Normalise queries and keys over each head. Off in every released configuration."""
    use_swiglu: bool = True
    """SwiGLU feed-forward; otherwise two linear layers with a tanh GELU between them."""
    use_rope: bool = True
    """Two-dimensional rotary positions in every attention."""
    use_rmsnorm: bool = True
    """RMSNorm with a learned weight; otherwise LayerNorm without one."""
    wo_shift: bool = False
    """Accepted for released configurations only: must be false."""
    use_pos_embed: bool = True
    """Add the fixed sin-cos table to the trunk's tokens."""
    label_init_std: float = 0.02
    """Standard deviation of a fresh label table. RAE: 0.02, with which classes take tens of
    thousands of steps to matter; short schedules want about 1."""
    base_head_after: int | None = None
    """Trunk block after which a second, weaker output is taken for internal guidance (RAEv2: 8);
    none: no such output."""

    def __post_init__(self) -> None:
        """Check that the sizes fit one another."""
        self._check_lengths()
        self._check_ranges()
        for part, (width, heads, patch) in enumerate(
            zip(self.widths, self.heads, self.patches, strict=True)
        ):
            self._check_part("head" if part else "trunk", width, heads, patch)

    @property
    def has_head(self) -> bool:
        """Whether this is DiT-DH: a wide head driven token by token by the trunk."""
        return len(self.widths) == 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Token width of (trunk, head) or (trunk,)."""
        return _as_tuple(self.hidden_size)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of (trunk, head) or (trunk,)."""
        return _as_tuple(self.depth)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of (trunk, head) or (trunk,)."""
        return _spread(self.num_heads, len(self.widths))

    @property
    def patches(self) -> tuple[int, ...]:
        """Patch sides of (trunk, head) or (trunk,)."""
        return _spread(self.patch_size, len(self.widths))

    @property
    def num_label_rows(self) -> int:
        """Rows of the label table: the classes, and the null class if labels are ever dropped."""
        return self.num_classes + (1 if self.class_dropout_prob > 0 else 0)

    def _check_lengths(self) -> None:
        if len(self.widths) not in (1, 2) or len(self.depths) != len(self.widths):
            raise ValueError(
                f"hidden_size={self.hidden_size} and depth={self.depth} do not fit: expected two "
                "numbers each "
                "(trunk, head) for DiT-DH or one number each for a plain DiT."
            )
        for name, values in (("num_heads", self.heads), ("patch_size", self.patches)):
            if len(values) != len(self.widths):
                raise ValueError(
                    f"{name}={getattr(self, name)} has {len(values)} numbers: expected one, or as "
                    "many as "
                    f"hidden_size={self.hidden_size}."
                )

    def _check_ranges(self) -> None:
        if self.wo_shift:
            raise ValueError(
                "wo_shift=True has no defined meaning: the reference head uses the missing shift "
                "and fails. "
                "Expected False; set it to False."
            )
        positive = (self.input_size, self.in_channels, self.num_classes, *self.depths)
        if min(positive) < 1 or min(self.widths + self.heads + self.patches) < 1:
            raise ValueError(
                f"{self} has a size below 1: expected positive sizes, depths, heads and patches."
            )
        if not 0.0 <= self.class_dropout_prob < 1.0:
            raise ValueError(
                f"class_dropout_prob={self.class_dropout_prob} is out of range: expected 0 <= p < "
                "1."
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} is out of range: expected more than 0.")
        last = self.depths[0]
        if self.base_head_after is not None and not 1 <= self.base_head_after <= last:
            raise ValueError(
                f"base_head_after={self.base_head_after} is no trunk block: expected 1..{last}, "
                "or null for none."
            )
        if self.has_head and self.patches[0] % self.patches[1]:
            raise ValueError(
                f"patch_size={self.patch_size} does not fit: expected the trunk's patch to be a "
                "multiple of the "
                "head's, so that each trunk token drives whole head tokens."
            )

    def _check_part(self, part: str, width: int, heads: int, patch: int) -> None:
        if self.input_size % patch:
            raise ValueError(
                f"input_size={self.input_size} does not divide into patches of {patch} ({part}): "
                "expected a multiple; change input_size or patch_size."
            )
        if width % heads:
            raise ValueError(
                f"hidden_size {width} ({part}) does not divide over {heads} heads: "
                "expected a multiple; change hidden_size or num_heads."
            )
        if self.use_rope and (width // heads) % 4:
            raise ValueError(
                f"{part}: hidden_size {width} over {heads} heads gives a head width of "
                f"{width // heads}: expected a "
                "multiple of 4, because rotary positions need pairs in rows and columns. Change "
                "num_heads or set "
                "use_rope=False."
            )
        if part == "trunk" and self.use_pos_embed and width % 4:
            raise ValueError(
                f"hidden_size {width} (trunk) does not fit the sin-cos table: expected a multiple "
                "of 4 "
                "(sine and cosine of rows and columns), or use_pos_embed=False."
            )


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _spread(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else value


DIT_PRESETS: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Trunk (hidden_size, depth, num_heads) by size letter. Source: DiT paper; RAE ships S and XL of
DiT-DH."""


def dit_preset(
    name: str, in_channels: int = 768, input_size: int = 16, num_classes: int = 1000
) -> DiTConfig:
    """Configuration of a named size: `DiT-DH-XL` with the wide head, `DiT-XL` without; S to XL.

    Args:
        name: Preset name.
        in_channels: Channels of the latent map.
        input_size: Side of the latent map.
        num_classes: Number of classes without the null class.

    Raises:
        ValueError: Unknown name; lists the known ones.
    """
    family, _, size = name.rpartition("-")
    if family not in ("DiT", "DiT-DH") or size not in DIT_PRESETS:
        known = [f"{kind}-{letter}" for kind in ("DiT-DH", "DiT") for letter in DIT_PRESETS]
        raise ValueError(f"{name!r} is no diffusion transformer preset: expected one of {known}.")
    width, depth, heads = DIT_PRESETS[size]
    has_head = family == "DiT-DH"
    return DiTConfig(
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        hidden_size=(width, HEAD_WIDTH) if has_head else width,
        depth=(depth, HEAD_DEPTH) if has_head else depth,
        num_heads=(heads, HEAD_NUM_HEADS) if has_head else heads,
    )
