"""Checkpoints: `checkpoints/000040/`, whole or not there at all.

    state.json    policy version, dispatcher, what the run must have in common with its resumption
    engine/       parameters, optimizer, step count and random state of every rank
    policy/       the policy as a Hugging Face folder that vLLM can serve

Invariants
- A checkpoint is written under a temporary name, synced to disk and renamed: a folder with a number for a name is
  complete and durable.
- A checkpoint that cannot be written leaves nothing behind, and the older ones untouched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from services.config.tree import Config
from services.errors import CheckpointFailed

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What the trainer itself must remember.

    Attributes:
        version: policy version, the number of updates done.
        dispatcher: `Dispatcher.state()`.
        seconds: of training so far.
        identity: see `identity`.
    """

    version: int
    dispatcher: dict[str, object]
    seconds: float
    identity: dict[str, object]


def identity(config: Config) -> dict[str, object]:
    """What a resumption must share with the run: the order of tasks, the groups in Redis, the shape of the engine."""
    return {
        "run.seed": config.run.seed,
        "env.name": config.env.name,
        "env.split": config.env.split,
        "env.tasks": config.env.tasks,
        "learner.group_size": config.learner.group_size,
        "learner.ranks": config.learner.ranks,
        "learner.zero_stage": config.learner.zero_stage,
        "model.dtype": config.model.dtype,
    }


def require_none(folder: Path) -> None:
    """Raise `CheckpointFailed` where a new run would find the checkpoints of an old one."""
    found = latest(folder)
    if found is not None:
        raise CheckpointFailed(f"{found} is there already: go on with --resume, or give the new run another run.name")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if there is one."""
    found = sorted(_complete(folder))
    return found[-1] if found else None


def read_state(checkpoint: Path, config: Config) -> TrainerState:
    """State of a checkpoint.

    Raises:
        CheckpointFailed: it cannot be read, or was written by a run that this one cannot go on from.
    """
    try:
        state = TrainerState(**json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointFailed(f"cannot read {checkpoint / 'state.json'}: {error}") from error
    for key, value in identity(config).items():
        if state.identity.get(key) != value:
            raise CheckpointFailed(
                f"{checkpoint} was written with {key}={state.identity.get(key)}, this run has {key}={value}: "
                "use the same value, or start a run of another name"
            )
    return state


def save(
    folder: Path,
    state: TrainerState,
    *,
    weights: Mapping[str, Tensor],
    model: Path,
    engine: Callable[[Path], None],
    engine_bytes: int,
    keep: int,
) -> Path:
    """Write the checkpoint of `state.version`, then drop all but the newest `keep`; the new folder.

    Args:
        weights: the policy under its Hugging Face names. model: folder whose other files complete the export.
        engine: writes the ranks' files into a folder. engine_bytes: about how much that is.

    Raises:
        CheckpointFailed: not enough space, or a file could not be written.
    """
    final = folder / f"{state.version:06d}"
    partial = folder / f".{final.name}.partial"
    needed = engine_bytes + sum(tensor.nbytes for tensor in weights.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(folder)
        _check_space(folder, needed)
        (partial / "engine").mkdir(parents=True)
        engine(partial / "engine")
        export_policy(partial / "policy", weights, model)
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
        _sync_tree(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
        _sync(folder)
        for old in sorted(_complete(folder))[:-keep]:
            _discard(old)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CheckpointFailed(f"cannot write the checkpoint {final}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def export_policy(folder: Path, weights: Mapping[str, Tensor], model: Path) -> None:
    """Write the policy as a Hugging Face folder: these weights, and configuration and tokenizer of `model`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, folder / file.name)
    try:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:
        # safetensors wraps the operating system's error in its own, as text.
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error)) from error


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name.isdigit() and (p / "state.json").is_file()]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointFailed(
            f"a checkpoint takes about {needed / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB left: "
            "free some space, lower checkpoint.keep, or move run.dir"
        )


def _discard(checkpoint: Path) -> None:
    """Rename first: a removal that is cut short must not leave half a checkpoint under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _discard_leftovers(folder: Path) -> None:
    for pattern in (".*.partial", ".*.removed"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


def _sync_tree(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        _sync(path)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
