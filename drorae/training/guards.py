"""Guards of a training loop: stop before a non-finite update, without a host sync in every step.

The flag lives on the device. Once a loss or gradient norm is not finite, the fused optimiser skips
this and every later update (`found_inf`), so the weights stay those of the last good step; the host
reads the flag where it synchronises anyway, at a log or save point, and raises.
"""

import torch
from torch import Tensor

from drorae.config import canonical_json

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Remembers on the device the first step whose loss or gradient norm was not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._optimizer = optimizer
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]

    def arm(self, step: int, *values: Tensor) -> None:
        """Call before `optimizer.step()`: a value that is not finite skips it on the device."""
        finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
        fresh = ~finite & (self._first_bad_step < 0)
        self._first_bad_step.masked_fill_(fresh, step)
        self._optimizer.found_inf = (self._first_bad_step >= 0).float()  # pyright: ignore[reportAttributeAccessIssue]

    def check(self, stage: str, config: object) -> None:
        """Raise if any step so far was bad (one host synchronisation).

        Raises:
            RuntimeError: Names the first bad step and the configuration.
        """
        step = int(self._first_bad_step)
        if step >= 0:
            raise RuntimeError(
                f"{stage}: loss or gradient norm is not finite at step {step}; the weights were "
                "not changed from there on. Lower optim.lr, set optim.clip_norm, or use "
                "precision=float32; then rerun the stage, it continues from its last checkpoint. "
                f"Configuration: {canonical_json(config)}"
            )
