"""Configuration as frozen dataclasses: JSON round trip, digest, override by path, field docs.

Every configuration class lies beside the code that it configures; this module knows none of them.
It imports only the standard library, so that planning a run needs no torch. `Compute` lives here
because it belongs to no stage: it says how a stage runs (workers, threads, checkpoint intervals),
never what it computes, and is therefore part of no stage key.
"""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "ACCELERATED",
    "Compute",
    "FieldDoc",
    "Resources",
    "canonical_json",
    "digest",
    "expand_home",
    "field_docs",
    "flatten",
    "from_json",
    "override",
    "to_json",
]

T = TypeVar("T")

MAX_NUMBER = 1 << 63
"""Numbers of this size and above, infinity among them, fit into no field of Arrow or torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How stages run on this machine or cluster. No stage key depends on it."""

    num_workers: int = 1
    """Ray Train workers of a training stage. The order of samples does not depend on it."""
    min_workers: int = 0
    """Fewest workers with which a training stage goes on while machines are missing; it takes more
    again, up to `num_workers`, when they are back. Each change continues from the last checkpoint,
    and every count must divide the global batch. 0: always `num_workers`; it waits for machines."""
    threads_per_worker: int = 2
    """CPU threads that torch may use in one worker."""
    loader_threads: int = 4
    """Threads of a worker or actor that read and decode images and latents ahead of their use. In
    training each makes one batch, and at most twice as many are held ready."""
    use_gpu: bool = False
    """Ask Ray for one GPU for each training worker and each actor that runs networks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where arithmetic runs: `auto` on the GPU that Ray gave if `use_gpu`, else on the CPU. `cpu`
    with `use_gpu` computes on the CPUs of machines that declare GPUs, which is how placement is
    tested; `cuda` without it uses a GPU that Ray does not count."""
    sharding: Literal["none", "ddp", "fsdp2"] = "ddp"
    """How several workers hold the trained network: `ddp` whole on each, `fsdp2` cut into shards
    (weights, gradients, moments and EMA), `none` forbids more than one worker."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which several workers add up the gradients of the trained network.
    `bfloat16` halves what is sent (3.4 GB a step at 0.84 billion parameters) and rounds each sum to
    8 bits, so results then depend slightly on the number of workers."""
    accumulate_steps: int = 1
    """Parts that a worker's share of a batch is worked through in, one after the other; the global
    batch stays. Saves memory, changes no result beyond rounding."""
    compile: bool = False
    """Compile the trained network with torch.compile: minutes at the start, faster steps after."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: about a third more compute, less memory."""
    data_actors: int = 1
    """Ray Data actors that shard, encode or sample at the same time. Actors that run networks are
    as many as the cluster has GPUs instead if `use_gpu`."""
    parallel_stages: int = 2
    """Stages that may run at the same time when the graph allows it (embedded runs)."""
    log_every_steps: int = 10
    """Steps between two log points; each costs one host synchronisation."""
    save_every_steps: int = 500
    """Steps between two training checkpoints."""
    save_every_s: float = 600.0
    """Seconds after which the next log point writes a checkpoint even if `save_every_steps` is not
    reached."""
    keep_checkpoints: int = 2
    """Training checkpoints kept per stage; older ones are deleted after a newer one is complete."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this many steps are kept until the stage is complete; 0: none."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop the stage before its step, or leave
    that step out and count it."""
    rollback_after_skips: int = 8
    """Steps left out in a row after which training goes back to its last checkpoint and goes on
    with the next data; a second time without a new checkpoint stops the stage."""
    max_failures: int = 3
    """Restarts of the Ray Train worker group from the last checkpoint before the stage fails, and
    restarts after a lost Ray Train controller. After so many the count starts again if there was a
    new checkpoint meanwhile, so a stage fails after at least `max_failures` + 1 and at most twice
    as many failures in a row without one; 0: no restart at all. Machines taken away with notice do
    not count."""
    collective_timeout_s: float = 600.0
    """Longest wait of a rank for the others before it is declared hung, and longest evaluation,
    checkpoint or first step with the discriminator. Ray's own default is no limit."""
    hang_timeout_s: float = 90.0
    """Longest time between two batches before a rank is taken for hung and the group is restarted,
    or 20 typical steps of this run if that is longer. It is found a quarter of this time later at
    the latest: by default within 120 s (106 s on 2026-11-24, `python -m tests.chaos --only hung
    --hang-timeout-s 90`). Not measured are the first step, which may compile, and
    what `collective_timeout_s` limits; a store that is away is waited for as long as requests wait.
    A process that answers nothing at all is found within a minute, or this time if it is
    shorter."""
    cache_path: str = ""
    """Folder for hidden-state caches and downloads; empty: beside a local workspace, else the
    user's cache."""
    cache_limit_gb: float = 0.0
    """Most gigabytes (10^9 bytes) of shards that a machine keeps of a remote workspace, for all of
    its processes together; the least recently used ones make room, those in use never do. 0: as
    much as the disk holds. Below what is in use at a time (about `order.streams` times
    `order.window_shards` shards, divided by the machines) rows are read one by one instead."""

    def __post_init__(self) -> None:
        """Check ranges."""
        expand_home(self, "cache_path")
        counts = ("num_workers", "threads_per_worker", "loader_threads")
        for name in (*counts, "data_actors", "parallel_stages"):
            _require(getattr(self, name) >= 1, f"compute.{name}", getattr(self, name), "at least 1")
        for name in ("log_every_steps", "save_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"compute.{name}", getattr(self, name), "at least 1")
        for name in ("accumulate_steps", "rollback_after_skips"):
            _require(getattr(self, name) >= 1, f"compute.{name}", getattr(self, name), "at least 1")
        for name in ("max_failures", "keep_every_steps", "cache_limit_gb"):
            _require(getattr(self, name) >= 0, f"compute.{name}", getattr(self, name), "0 or more")
        for name in ("collective_timeout_s", "hang_timeout_s", "save_every_s"):
            _require(getattr(self, name) > 0, f"compute.{name}", getattr(self, name), "above 0")
        few, many = self.min_workers, self.num_workers
        _require(0 <= few <= many, "compute.min_workers", few, f"0 to num_workers={many}")
        if self.sharding == "none" and self.num_workers > 1:
            raise ValueError(
                f"compute.sharding=none with compute.num_workers={self.num_workers}: expected one "
                "worker; use sharding=ddp or fsdp2, or num_workers=1."
            )

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """Kind of device that runs the arithmetic of workers and actors."""
        if self.device == "auto":
            return "cuda" if self.use_gpu else "cpu"
        return self.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What Ray sets aside for one process of a stage; the stage table says it for every stage."""

    cpus: float = 1.0
    """Logical CPUs. 0: it mostly waits and fits beside anything."""
    gpus: float = 0.0
    """GPUs, where `compute.use_gpu` asks for any."""
    memory_bytes: int = 0
    """Memory; 0: none is set aside."""


ACCELERATED = Resources(gpus=1.0)
"""A process that runs networks: one GPU where there are any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldDoc:
    """One line of a configuration listing."""

    path: str
    value: Any
    doc: str


def expand_home(config: Any, *names: str) -> None:
    """Replace `~` by the home folder in the fields that hold paths; called in `__post_init__`.

    So it is the same whether a recipe, JSON or `--set shard.source=~/photos`, whose `~` a shell
    leaves as it is, gave the path.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, os.path.expanduser(value))


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range: expected {expected}.")


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def _is_list_or_tuple(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def to_json(value: Any) -> Any:
    """Turn a configuration into dicts, lists and scalars.

    Raises:
        ValueError: For a value that JSON cannot hold exactly (a non-finite float, an unknown type).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if _is_mapping(value):
        return {str(k): to_json(v) for k, v in value.items()}
    if _is_list_or_tuple(value):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} cannot be stored as JSON: expected a finite number.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{type(value).__name__} cannot be stored as JSON: expected dataclass, list, dict or "
        "scalar."
    )


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: equal configurations give equal text."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def from_json(cls: type[T], data: Any, path: str = "") -> T:
    """Rebuild a configuration from `to_json` output, checking names and types.

    Args:
        cls: Dataclass to build.
        data: Parsed JSON.
        path: Where `data` lies in the whole configuration; appears in errors.

    Raises:
        ValueError: Unknown or missing field, or a value of the wrong type; names the path.
    """
    return _coerce(cls, data, path or cls.__name__)


def _coerce(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return _coerce_literal(kind, value, path)
    if origin in (Union, types.UnionType):
        return _coerce_union(kind, value, path)
    if origin is tuple:
        return _coerce_tuple(kind, value, path)
    if origin is list:
        return list(_coerce_tuple(tuple[(*get_args(kind), ...)], value, path))
    if origin in (dict, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(kind):
        return _coerce_dataclass(kind, value, path)
    return _coerce_scalar(kind, value, path)


def _coerce_literal(kind: Any, value: Any, path: str) -> Any:
    if value in get_args(kind):
        return value
    raise ValueError(f"{path}={value!r} is not a choice: expected one of {list(get_args(kind))}.")


def _coerce_union(kind: Any, value: Any, path: str) -> Any:
    options = get_args(kind)
    if value is None and type(None) in options:
        return None
    problems: list[str] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(option, value, path)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(
        problems[0] if len(problems) == 1 else f"{path}={value!r} fits no allowed type: {problems}"
    )


def _coerce_tuple(kind: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not _is_list_or_tuple(value):
        raise ValueError(f"{path}={value!r} has the wrong type: expected a list such as [1,2].")
    args = get_args(kind)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_coerce(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ValueError(f"{path} has {len(value)} entries: expected {len(args)}.")
    return tuple(
        _coerce(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _coerce_dataclass(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not _is_mapping(value):
        raise ValueError(
            f"{path}={value!r} has the wrong type: expected the fields of {kind.__name__}."
        )
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    unknown = [k for k in value if k not in names]
    if unknown:
        raise ValueError(f"{path}.{unknown[0]} is no field.{_suggest(unknown[0], names)}")
    fields = {k: _coerce(hints[k], v, f"{path}.{k}") for k, v in value.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in fields
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path} lacks the field {missing[0]!r}: give all of {missing}.")
    return kind(**fields)


def _coerce_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind in (int, float) and isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
        raise ValueError(f"{path}={value!r} is out of range: expected less than 2^63, and no NaN.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{path}={value!r} has the wrong type: expected {kind.__name__}.")


def override(config: T, assignments: Sequence[str]) -> T:
    """Apply `section.field=value` assignments to a configuration.

    A path may leave out inner sections when exactly one field fits: `fusion.expert_hidden` is
    `fusion.model.expert_hidden`. Values are JSON (`1e-4`, `true`, `[1,2]`, `null`); what is no JSON
    is taken as text. All assignments are applied before any class checks itself, so that fields
    which have to fit each other can change together, in any order. Of two for one field the later
    wins.

    Raises:
        ValueError: No `=`, unknown path (close matches are listed), ambiguous path, wrong type, or
            a value that the configuration class refuses.
    """
    changes: dict[str, str] = {}
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign or not path:
            raise ValueError(f"{assignment!r} is no assignment: expected section.field=value.")
        full = _resolve(config, path.strip())
        # A whole section replaces what was set inside it before; later assignments win.
        changes = {p: v for p, v in changes.items() if not f"{p}.".startswith(f"{full}.")}
        changes[full] = text
    return _changed(config, changes, "")


def _changed(config: Any, changes: Mapping[str, str], prefix: str) -> Any:
    """A configuration with all changes below `prefix` applied to each of its classes at once."""
    hints = get_type_hints(config.__class__)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        path = f"{prefix}{f.name}"
        inner = {p: v for p, v in changes.items() if p.startswith(f"{path}.")}
        value = getattr(config, f.name)
        if path in changes:
            value = _coerce(hints[f.name], _parse(changes[path], hints[f.name]), path)
        if inner:
            value = _changed(value, inner, f"{path}.")
        if path in changes or inner:
            fields[f.name] = value
    return dataclasses.replace(config, **fields)


def _parse(text: str, kind: Any) -> Any:
    """The JSON value of a text; the text itself where it is none, or where text is wanted."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    # A folder may be called 2012.
    if kind is str or (value is not None and set(get_args(kind)) == {str, type(None)}):
        return value if isinstance(value, str) else text
    return value


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        yield path
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{path}.")


def _resolve(config: Any, path: str) -> str:
    known = list(_paths(config))
    if path in known:
        return path
    head, _, tail = path.partition(".")
    fits = [p for p in known if tail and p.startswith(f"{head}.") and p.endswith(f".{tail}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(f"{path} is ambiguous: expected one of {fits}.")
    raise ValueError(f"{path} is no configuration path.{_suggest(path, known)}")


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    last = name.rsplit(".", 1)[-1]
    close += [p for p in known if p.rsplit(".", 1)[-1] == last and p not in close][:4]
    if not close:
        close = [p for p in known if "." not in p]
    return f" Close matches: {', '.join(close)}."


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a configuration by dotted path; lists become one text. For MLflow parameters."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = (
                canonical_json(value) if isinstance(value, list | tuple | Mapping) else value
            )
    return flat


def field_docs(config: Any, prefix: str = "") -> list[FieldDoc]:
    """Every leaf with its value and the text that stands under the field in the source."""
    docs = _docs_of(config.__class__)
    rows: list[FieldDoc] = []
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            rows += field_docs(value, f"{path}.")
        else:
            rows.append(FieldDoc(path=path, value=value, doc=docs.get(f.name, "")))
    return rows


def _docs_of(cls: type) -> dict[str, str]:
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
            continue
        if isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs
