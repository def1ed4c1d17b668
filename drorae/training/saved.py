"""A training state as a checkpoint holds it: whole tensors by name, for any number of ranks.

`gather` and `put_back` are collectives where there are several ranks. Rank 0 has the file; the
others receive from it, so a store is read once and all ranks continue from the same step.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from drorae.training.parallel import is_sharded, sharded_like, whole
from drorae.training.world import World

if TYPE_CHECKING:
    from drorae.training.state import TrainState

__all__ = ["FORMAT", "gather", "put_back"]

FORMAT = 2
"""Changes when older checkpoints can no longer be read. 1: optimiser state by number."""


WEIGHTS = ("module", "optimizer", "ema")
"""Entries that ranks share tensor by tensor; the others are small."""


def gather(state: "TrainState", world: World) -> dict[str, Any]:
    """Everything that a continuation needs, on rank 0; elsewhere empty.

    The tensors may be those of the running state: copy them before the next step.
    """
    sharded = is_sharded(state.module)
    if not (sharded or world.is_main):
        return {}
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    saved = {
        "module": get_model_state_dict(state.module, options=options),
        "optimizer": get_optimizer_state_dict(state.module, state.optimizer, options=options),
        "ema": whole_on_main(state.ema, world),
    }
    return saved | _plain(state) if world.is_main else {}


def _plain(state: "TrainState") -> dict[str, Any]:
    """What is the same on every rank, and needs no gathering."""
    return {
        "format": FORMAT,
        "step": state.step,
        "history": state.history,
        "best": state.best,
        "data_digest": state.data_digest,
        "rolled_back_at": state.rolled_back_at,
        "guard": state.guard.state_dict(),
        "extra": state.extra.state_dict() if state.extra is not None else None,
    }


def whole_on_main(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Full tensors on rank 0, gathered one by one; of sharded ones the others get nothing."""
    found = {}
    for name, value in tensors.items():
        full = whole(value.detach())
        if world.is_main or full is value:
            found[name] = full.cpu() if full is not value and full.is_cuda else full
    return found


def put_back(state: "TrainState", saved: dict[str, Any] | None, world: World) -> bool:
    """Bring a state to what rank 0 has read; False if that is nothing.

    Raises:
        RuntimeError: A checkpoint of another format.
    """
    plain = _from_main({k: v for k, v in saved.items() if k not in WEIGHTS} if saved else {}, world)
    if not plain:
        return False
    if plain.get("format") != FORMAT:
        raise RuntimeError(
            f"{state.name}: the training checkpoint has format {plain.get('format', 1)}: expected "
            f"{FORMAT}; finish the stage with the version that wrote it, or delete its checkpoints."
        )
    _put_weights(state, saved or {key: {} for key in WEIGHTS}, world)
    state.step, state.history = plain["step"], plain["history"]
    state.best, state.data_digest = plain["best"], plain["data_digest"]
    state.rolled_back_at = plain["rolled_back_at"]
    state.guard.load_state_dict(plain["guard"])
    if state.extra is not None:
        state.extra.load_state_dict(plain["extra"])
    return True


def _put_weights(state: "TrainState", saved: dict[str, Any], world: World) -> None:
    several = world.world_size > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    set_model_state_dict(state.module, saved["module"], options=options)
    set_optimizer_state_dict(
        state.module, state.optimizer, optim_state_dict=saved["optimizer"], options=options
    )
    for name, like in state.ema.items():
        full = saved["ema"][name].to(world.device) if world.is_main else None
        state.ema[name] = sharded_like(_broadcast(full, like, world), like)


def _broadcast(full: Tensor | None, like: Tensor, world: World) -> Tensor:
    if full is None:
        full = torch.empty(like.shape, dtype=like.dtype, device=world.device)
    if world.world_size > 1:
        dist.broadcast(full, src=0)
    return full


def _from_main(value: Any, world: World) -> Any:
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
