"""The diffusion transformer of RAE: DiT-DH (trunk and wide head) and the plain LightningDiT.

It predicts the velocity of the straight path between clean latents (t = 0) and noise (t = 1). In
DiT-DH a trunk of narrow blocks reads time and class, and its output tokens drive, token by token,
two wide blocks that read the noisy latent afresh; there is no other connection. State-dict keys
equal the reference's, so released checkpoints load strictly. Parts are in
`drorae.models.dit_layers`, sizes in `drorae.models.dit_config`. The reference's own embedding of
patches larger than 1 cannot run (it expects the latent already cut up); here it is an ordinary
patch embedding.
Source: RAE (DiTwDDTHead, LightningDiT); RAEv2 for the base head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from drorae.models.dit_config import DiTConfig, dit_preset
from drorae.models.dit_layers import (
    Block,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    TimeEmbedding,
    drop_labels,
    unpatchify,
)
from drorae.models.layers import sincos_position_table
from drorae.models.matmul import Linear
from drorae.models.rotary import RotaryPositions
from drorae.shapes import Bool, Float, Int, Tensor

__all__ = ["DiT", "DiTConfig", "DiTOutput", "dit_preset", "drop_labels"]


class DiTOutput(NamedTuple):
    """Both predictions of a model with a base head."""

    velocity: Tensor
    """Prediction of the full model, [B, C, H, W]."""
    base: Tensor
    """Prediction of the base head, the weak partner of internal guidance, [B, C, H, W]."""


class DiT(nn.Module):
    """Velocity network in latent space; a fresh one predicts zero.

    Set `activation_checkpointing` to recompute block activations in the backward pass: about a
    third more compute for memory of one block. Run in bfloat16 through autocast with float32
    weights and a float32 `noisy`: the residual stream and the output then stay float32.

    Args:
        config: Sizes and options.
    """

    pos_embed: nn.Parameter | None
    feat_rope: RotaryPositions | None
    enc_feat_rope: RotaryPositions | None
    dec_feat_rope: RotaryPositions | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        width, out_width = config.widths[0], config.widths[-1]
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(config.num_label_rows, width, config.label_init_std)
        self.x_embedder = PatchEmbedding(config.in_channels, out_width, config.patches[-1])
        self.final_layer = self._build_final_layer(-1)
        if config.has_head:
            self.s_embedder = PatchEmbedding(config.in_channels, width, config.patches[0])
            self.s_projector = Linear(width, out_width) if width != out_width else nn.Identity()
        self.pos_embed = self._build_positions() if config.use_pos_embed else None
        self._build_rotary()
        self.blocks = nn.ModuleList(
            self._build_block(part)
            for part, depth in enumerate(config.depths)
            for _ in range(depth)
        )
        self.base_final_layer = (
            self._build_final_layer(0) if config.base_head_after is not None else None
        )
        self._initialise()

    @property
    def null_label(self) -> int:
        """The label that means "no class".

        Raises:
            ValueError: If the model was built without one.
        """
        if self.config.class_dropout_prob == 0:
            raise ValueError(
                "This model has no null class (class_dropout_prob=0): classifier-free guidance "
                "needs one; train with class_dropout_prob > 0 or use AutoGuidance."
            )
        return self.config.num_classes

    def forward(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
        *,
        drop: Bool[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
        with_base: bool = False,
    ) -> Float[Tensor, "batch channels height width"] | DiTOutput:
        """Predict the velocity `noise - clean`.

        Args:
            noisy: Point on the path between normalised clean latents and noise.
            t: One time per sample in [0, 1]; 1 is noise.
            labels: Classes; the null class is `null_label`.
            drop: Labels to replace by the null class. If none, training mode draws them.
            generator: Source of that draw.
            with_base: Return `DiTOutput`, for training and sampling with internal guidance.

        Raises:
            ValueError: If the latent does not have the configured shape, or a base prediction is
                asked of a model without a base head.
        """
        self._check_input(noisy, with_base)
        time = self.t_embedder(t)
        label = self.y_embedder(self._dropped(labels, drop, generator))
        trunk, base_tokens = self._run_trunk(noisy, time, label)
        if self.config.has_head:
            tokens, active = self._run_head(noisy, time, trunk)
        else:
            tokens, active = trunk, F.silu(time + label)[:, None]
        velocity = self._to_map(self.final_layer(tokens, active), -1, noisy)
        if self.base_final_layer is None or base_tokens is None or not with_base:
            return velocity
        weak = F.silu(time[:, None] + base_tokens)
        base = self.base_final_layer(weak, F.silu(weak))
        return DiTOutput(velocity, self._to_map(base, 0, noisy))

    def _run_trunk(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        time: Float[Tensor, "batch dim"],
        label: Float[Tensor, "batch dim"],
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens dim"] | None]:
        has_head = self.config.has_head
        # The reference applies one more SiLU to the condition of DiT-DH than to that of the plain
        # model.
        active = F.silu(F.silu(time + label) if has_head else time + label)[:, None]
        tokens = self.s_embedder(noisy) if has_head else self.x_embedder(noisy)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        rotary = self.enc_feat_rope if has_head else self.feat_rope
        base_tokens = None
        for index, block in enumerate(self.blocks[: self.config.depths[0]], start=1):
            tokens = self._run_block(block, tokens, active, rotary)
            if index == self.config.base_head_after:
                base_tokens = tokens
        return tokens, base_tokens

    def _run_head(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        time: Float[Tensor, "batch dim"],
        trunk: Float[Tensor, "batch tokens dim"],
    ) -> tuple[Float[Tensor, "batch fine head_dim"], Float[Tensor, "batch fine head_dim"]]:
        # Only the time is added again: the class reaches the head through the trunk's tokens.
        condition = self.s_projector(F.silu(time[:, None] + trunk))
        active = self._spread_over_head_tokens(F.silu(condition))
        tokens = self.x_embedder(noisy)
        for block in self.blocks[self.config.depths[0] :]:
            tokens = self._run_block(block, tokens, active, self.dec_feat_rope)
        return tokens, active

    def _run_block(
        self, block: nn.Module, tokens: Tensor, active: Tensor, rotary: nn.Module | None
    ) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            out = checkpoint(
                block, tokens, active, rotary, use_reentrant=False, preserve_rng_state=False
            )
            assert isinstance(out, Tensor)
            return out
        return block(tokens, active, rotary)

    def _spread_over_head_tokens(
        self, active: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch fine dim"]:
        """Repeat each trunk token for as many head tokens, along the row-major sequence.

        So does the reference. The repeats follow rows, not the square under the trunk's patch.
        """
        ratio = self.config.patches[0] // self.config.patches[1]
        return active if ratio == 1 else active.repeat_interleave(ratio**2, dim=1)

    def _dropped(
        self, labels: Tensor, drop: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        if drop is not None:
            return torch.where(drop, self.null_label, labels)
        probability = self.config.class_dropout_prob
        if not self.training or probability == 0:
            return labels
        return drop_labels(labels, probability, self.null_label, generator)

    def _to_map(self, patches: Tensor, part: int, like: Tensor) -> Tensor:
        return unpatchify(patches, self.config.patches[part]).to(like.dtype)

    def _check_input(self, noisy: Tensor, with_base: bool) -> None:
        size = self.config.input_size
        expected = (self.config.in_channels, size, size)
        if tuple(noisy.shape[1:]) != expected:
            raise ValueError(
                f"The latent has shape {tuple(noisy.shape)}: expected [batch, {expected[0]}, "
                f"{size}, {size}]; "
                "check the tokenizer, or in_channels and input_size of the model."
            )
        if with_base and self.base_final_layer is None:
            raise ValueError(
                "with_base=True needs a base head, and this model has none: expected "
                "base_head_after to be set."
            )

    def _build_block(self, part: int) -> Block:
        config = self.config
        return Block(
            config.widths[part],
            config.heads[part],
            mlp_ratio=config.mlp_ratio,
            use_qknorm=config.use_qknorm,
            use_swiglu=config.use_swiglu,
            use_rmsnorm=config.use_rmsnorm,
        )

    def _build_final_layer(self, part: int) -> FinalLayer:
        config = self.config
        num_values = config.in_channels * config.patches[part] ** 2
        return FinalLayer(config.widths[part], num_values, use_rmsnorm=config.use_rmsnorm)

    def _build_positions(self) -> nn.Parameter:
        grid = self.config.input_size // self.config.patches[0]
        table = sincos_position_table(self.config.widths[0], grid)
        # A parameter, as in the reference, so that it lies in checkpoints; never trained.
        return nn.Parameter(table[None].to(torch.get_default_dtype()).clone(), requires_grad=False)

    def _build_rotary(self) -> None:
        names = ("enc_feat_rope", "dec_feat_rope") if self.config.has_head else ("feat_rope",)
        for part, name in enumerate(names):
            head_dim = self.config.widths[part] // self.config.heads[part]
            grid = self.config.input_size // self.config.patches[part]
            setattr(self, name, RotaryPositions(head_dim, grid) if self.config.use_rope else None)

    def _initialise(self) -> None:
        """Linear layers keep PyTorch's default in DiT-DH; Xavier, zero bias in the plain model."""
        if not self.config.has_head:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        self.t_embedder.reset()
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                module.reset()
