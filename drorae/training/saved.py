"""A training state as a checkpoint holds it: tensors by name, and the rest as one small record.

The tensors are those of the running state, sharded as the module is: a checkpoint copies from them
and fills them in place, so no rank ever holds what belongs to others.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from drorae.training.loop import Checkpointing

if TYPE_CHECKING:
    from drorae.training.state import TrainState

__all__ = ["put_back", "save"]


def save(state: "TrainState", checkpoints: Checkpointing) -> None:
    """Keep a state (a collective)."""
    checkpoints.save(state.step, _tensors(state), _small(state) if state.world.is_main else {})


def put_back(state: "TrainState", checkpoints: Checkpointing) -> bool:
    """Bring a state to the newest checkpoint (a collective); False if there is none.

    Raises:
        Fatal: A checkpoint of another format or of other tensors.
    """
    is_fresh = not state.optimizer.state
    small = checkpoints.restore(lambda: _tensors(state))
    if small is None:
        if is_fresh:
            state.optimizer.state.clear()  # naming the moments counted one step of zeros
        return False
    state.step, state.history = small["step"], small["history"]
    state.best, state.data_digest = small["best"], small["data_digest"]
    state.rolled_back_at = small["rolled_back_at"]
    state.guard.load_state_dict(small["guard"])
    if state.extra is not None:
        state.extra.load_state_dict(small["extra"])
    return True


def _tensors(state: "TrainState") -> dict[str, Tensor]:
    """Weights, moments and averages. What else an optimiser has follows from job and step."""
    # torch's annotations allow for entries that AdamW and modules do not have.
    moments: Any = get_optimizer_state_dict(state.module, state.optimizer)["state"]
    weights: Any = get_model_state_dict(state.module)
    named: dict[str, Tensor] = {f"module.{name}": value for name, value in weights.items()}
    for name, values in moments.items():
        named |= {f"optimizer.{name}.{kind}": value for kind, value in values.items()}
    return named | {f"ema.{name}": value for name, value in state.ema.items()}


def _small(state: "TrainState") -> dict[str, Any]:
    """What is the same on every rank."""
    return {
        "step": state.step,
        "history": state.history,
        "best": state.best,
        "data_digest": state.data_digest,
        "rolled_back_at": state.rolled_back_at,
        "guard": state.guard.state_dict(),
        "extra": state.extra.state_dict() if state.extra is not None else None,
    }
