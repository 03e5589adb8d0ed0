"""Checkpoints: `checkpoints/000040/`, whole or not there at all.

    manifest.json run, update, number of ranks, and size and checksum of every other file
    state.json    policy version, dispatcher, what the run must have in common with its resumption
    engine/       parameters, optimizer, step count and random state of every rank
    policy/       the policy as a Hugging Face folder that vLLM can serve

`checkpoints/best-000040/` is the policy of the best evaluation so far, a Hugging Face folder with its score in
`best.json`, and a manifest. There is a second one while no checkpoint covers the newest: training may return to before
it. `checkpoints/damaged-000040/` is a checkpoint that could not be resumed from, until a newer one is written.

Invariants
- A checkpoint is written under a temporary name, synced to disk and renamed: a folder with a number for a name is
  complete and durable.
- Nothing is resumed from, exported or evaluated whose files are not those that were written (`services/manifest.py`).
  Where the newest checkpoint is damaged, training resumes from the one before it.
- A checkpoint that cannot be written leaves nothing behind, and the older ones untouched.
- Whatever checkpoint training goes on from, the best policy of the updates up to it is there.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services import manifest
from services.config.tree import Config
from services.errors import CheckpointFailed, FolderDamaged
from services.manifest import MANIFEST_NAME
from services.model_folder import read_others, read_weights, share_weights
from services.run_folder import WARMSTART_NAME
from services.weights.adapter import is_adapter, merged

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_BEST = "best-"
_DAMAGED = "damaged-"
_SCORE = "best.json"
_STATE = "state.json"
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


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were written; None where there is no checkpoint.

    Damaged ones that are newer are named in a warning, one line each.

    Raises:
        CheckpointFailed: there are checkpoints, and all of them are damaged.
    """
    found, damaged = _newest(folder, only="")
    if found is not None:
        for problem in damaged:
            log.warning("%s; using %s instead", problem, found.name)
    return found


def newest_with_state(folder: Path) -> Path | None:
    """As `newest_intact`, but of the files only the state is read, and nothing is said of damaged ones.

    Raises:
        CheckpointFailed: no checkpoint can be resumed from, as far as that is known without its weights.
    """
    return _newest(folder, only=_STATE)[0]


def _newest(folder: Path, only: str) -> tuple[Path | None, list[FolderDamaged]]:
    """The newest checkpoint whose files beginning with `only` are intact, and what is wrong with newer ones."""
    damaged: list[FolderDamaged] = []
    for found in sorted(_complete(folder), reverse=True):
        try:
            _verify(found, only)
        except FolderDamaged as error:
            damaged.append(error)
            continue
        return found, damaged
    if damaged:
        raise CheckpointFailed(
            f"no checkpoint in {folder} is intact; {damaged[0]}: copy one back, or start a run of another name"
        )
    return None, damaged


def set_aside_after(folder: Path, version: int) -> None:
    """Rename the checkpoints after `version`, which are damaged: their numbers will be used again."""
    for found in _complete(folder):
        if int(found.name) > version:
            aside = found.with_name(_DAMAGED + found.name)
            shutil.rmtree(aside, ignore_errors=True)
            found.rename(aside)


def _verify(checkpoint: Path, only: str) -> None:
    update = manifest.read(checkpoint).get("update")
    if update != int(checkpoint.name):
        raise FolderDamaged(f"{checkpoint} is damaged: its {MANIFEST_NAME} is that of update {update}")
    manifest.verify(checkpoint, only)


def read_state(checkpoint: Path, config: Config) -> TrainerState:
    """State of a checkpoint that is intact.

    Raises:
        CheckpointFailed: it cannot be read, or was written by a run that this one cannot go on from.
    """
    try:
        state = TrainerState(**json.loads((checkpoint / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointFailed(f"cannot read {checkpoint / 'state.json'}: {error}") from error
    written_by = manifest.read(checkpoint).get("run")
    if written_by != config.run.name:
        raise CheckpointFailed(f"{checkpoint} was written by the run {written_by}, this one is {config.run.name}")
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
    run: str,
    ranks: int,
) -> Path:
    """Write the checkpoint of `state.version`, then drop all but the newest `keep`, and best policies that are the best
    no longer; the new folder.

    Args:
        weights: the policy under its Hugging Face names, or its adapters. model: folder whose other files, and weights
            below the adapters, complete the export.
        engine: writes the ranks' files into a folder. engine_bytes: about how much that is.
        run, ranks: name of the run and number of its ranks, for the manifest.

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
        (partial / _STATE).write_text(json.dumps(asdict(state), indent=1))
        manifest.write(partial, {"kind": "checkpoint", "run": run, "update": state.version, "ranks": ranks})
        if final.exists():
            _discard(final)
        partial.rename(final)
        manifest.sync(folder)
        for damaged in folder.glob(f"{_DAMAGED}*"):
            shutil.rmtree(damaged, ignore_errors=True)
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

    One whose score is damaged does not count, and is named in a warning. Its weights are not looked at.
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
        (partial / _SCORE).write_text(json.dumps({"update": version, "success_rate": success}))
        manifest.write(partial, {"kind": "policy", "update": version})
        if final.exists():
            _discard(final)
        partial.rename(final)
        manifest.sync(folder)
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
    intact = _kept_as_best(folder)
    for damaged in set(folder.glob(f"{_BEST}*")) - set(intact):
        damaged.rename(folder / f"{_DAMAGED}{damaged.name}")
    covered: dict[bool, list[Path]] = {True: [], False: []}
    for found in intact:
        covered[newest is not None and _version_of_best(found) <= int(newest.name)].append(found)
    for some in covered.values():
        for beaten in sorted(some, key=_score, reverse=True)[1:]:
            _discard(beaten)


def _kept_as_best(folder: Path) -> list[Path]:
    """Folders of best policies whose score is intact, newest first: of equal ones that one counts."""
    kept = []
    for found in sorted(folder.glob(f"{_BEST}*"), reverse=True):
        try:
            manifest.verify(found, only=_SCORE)
        except FolderDamaged as error:
            log.warning("%s; it does not count as the best policy", error)
            continue
        kept.append(found)
    return kept


def _version_of_best(found: Path) -> int:
    return int(found.name.removeprefix(_BEST))


def _score(found: Path) -> float:
    return float(json.loads((found / _SCORE).read_text())["success_rate"])


def whole_policy(weights: Mapping[str, Tensor], model: Path) -> Mapping[str, Tensor]:
    """All that a folder holds: the weights, or those of `model` with the adapters added, and what was not trained.

    Such is the vision tower of a larger model of which the learner trains the part for text.
    """
    if is_adapter(weights):
        return merged(weights, read_weights(model))
    return {**weights, **dict(read_others(model, weights))}


def export_policy(folder: Path, weights: Mapping[str, Tensor], model: Path) -> None:
    """Write the policy as a Hugging Face folder: these weights, and configuration and tokenizer of `model`.

    How `model` was warm-started stays behind: it says nothing of the run that came after.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.iterdir()):
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, WARMSTART_NAME, MANIFEST_NAME)):
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
    return [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]


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
