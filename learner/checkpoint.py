"""Checkpoints: `checkpoints/000040/`, whole or not there at all.

    state.json    policy version, dispatcher, what the run must have in common with its resumption
    engine/       parameters, optimizer, step count and random state of every rank
    policy/       the policy as a Hugging Face folder that vLLM can serve

`checkpoints/best-000040/` is the policy of the best evaluation so far, a Hugging Face folder with its score in
`best.json`. There is a second one while no checkpoint covers the newest: training may go back to before it.

Invariants
- A checkpoint is written under a temporary name, synced to disk and renamed: a folder with a number for a name is
  complete and durable.
- A checkpoint that cannot be written leaves nothing behind, and the older ones untouched.
- Whatever checkpoint training goes on from, the best policy of the updates up to it is there.
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
from services.model_folder import read_weights, share_weights
from services.run_folder import WARMSTART_NAME
from services.weights.adapter import is_adapter, merged

_BEST = "best-"
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
    """What a resumption must share with the run: the order of tasks, the groups in Redis, the trained parameters.

    Not the number of ranks, the ZeRO stage or what is off-loaded: the engine's files hold whole tensors.
    """
    return {
        "run.seed": config.run.seed,
        "env.name": config.env.name,
        "env.split": config.env.split,
        "env.tasks": config.env.tasks,
        "envs": [[env.name, env.split, env.tasks, env.weight] for env in config.envs],
        "learner.group_size": config.learner.group_size,
        "model.dtype": config.model.dtype,
        "model.lora": None if config.model.lora is None else config.model.lora.model_dump(mode="json"),
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
    """Write the checkpoint of `state.version`, then drop all but the newest `keep`, and best policies that are the best
    no longer; the new folder.

    Args:
        weights: the policy under its Hugging Face names, or its adapters. model: folder whose other files, and weights
            below the adapters, complete the export.
        engine: writes the ranks' files into a folder. engine_bytes: about how much that is.

    Raises:
        CheckpointFailed: not enough space, or a file could not be written.
    """
    final = folder / f"{state.version:06d}"
    partial = folder / f".{final.name}.partial"
    policy = whole_policy(weights, model)
    needed = engine_bytes + sum(tensor.nbytes for tensor in policy.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(folder)
        _check_space(folder, needed)
        (partial / "engine").mkdir(parents=True)
        engine(partial / "engine")
        export_policy(partial / "policy", policy, model)
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
        _sync_tree(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
        _sync(folder)
        for old in sorted(_complete(folder))[:-keep]:
            _discard(old)
        _drop_beaten(folder)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise CheckpointFailed(f"cannot write the checkpoint {final}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def best(folder: Path) -> tuple[Path, float] | None:
    """The best policy kept in `folder`, and its success rate in the evaluation that found it so.

    Raises:
        CheckpointFailed: a score cannot be read.
    """
    return max(((found, _score(found)) for found in _kept_as_best(folder)), key=lambda each: each[1], default=None)


def keep_best(folder: Path, version: int, success: float, weights: Mapping[str, Tensor], model: Path) -> None:
    """Keep the policy of `version`, the best so far. The one before stays until a checkpoint covers this one.

    Raises:
        CheckpointFailed: it could not be written.
    """
    final = folder / f"{_BEST}{version:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        export_policy(partial, whole_policy(weights, model), model)
        (partial / "best.json").write_text(json.dumps({"update": version, "success_rate": success}))
        _sync_tree(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
        _sync(folder)
        _drop_beaten(folder)
    except OSError as error:
        raise CheckpointFailed(f"cannot write the best policy {final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def forget_best(folder: Path, after: int) -> None:
    """Drop the best policies of updates after `after`: they will be done again."""
    for found in _kept_as_best(folder):
        if _version_of_best(found) > after:
            _discard(found)


def _drop_beaten(folder: Path) -> None:
    """Keep two best policies at most: the best that the newest checkpoint covers, and the best of those after it.

    A run that dies goes on from that checkpoint, and will do again what came after it.
    """
    newest = latest(folder)
    covered: dict[bool, list[Path]] = {True: [], False: []}
    for found in _kept_as_best(folder):
        covered[newest is not None and _version_of_best(found) <= int(newest.name)].append(found)
    for some in covered.values():
        for beaten in sorted(some, key=_score, reverse=True)[1:]:
            _discard(beaten)


def _kept_as_best(folder: Path) -> list[Path]:
    """Folders of best policies, newest first: of equal ones that one counts."""
    return sorted(folder.glob(f"{_BEST}*"), reverse=True)


def _version_of_best(found: Path) -> int:
    return int(found.name.removeprefix(_BEST))


def _score(found: Path) -> float:
    try:
        return float(json.loads((found / "best.json").read_text())["success_rate"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointFailed(f"cannot read {found / 'best.json'}: {error}") from error


def whole_policy(weights: Mapping[str, Tensor], model: Path) -> Mapping[str, Tensor]:
    """The weights, or where they are adapters those of `model` with the adapters added."""
    return merged(weights, read_weights(model)) if is_adapter(weights) else weights


def export_policy(folder: Path, weights: Mapping[str, Tensor], model: Path) -> None:
    """Write the policy as a Hugging Face folder: these weights, and configuration and tokenizer of `model`.

    How `model` was warm-started stays behind: it says nothing of the run that came after.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.iterdir()):
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, WARMSTART_NAME)):
            shutil.copyfile(file, folder / file.name)
    _set_type(folder / "config.json", weights)
    try:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:
        # safetensors wraps the operating system's error in its own, as text.
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error)) from error
    share_weights(folder)


def _set_type(config: Path, weights: Mapping[str, Tensor]) -> None:
    """Name the weights' type in the configuration, which may tell that of the model the run began with."""
    settings = json.loads(config.read_text())
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2) + "\n")


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
