"""Checkpoints, `checkpoints/000040/`: complete, or absent.

    manifest.json run, update, number of ranks, and size and checksum of every other file
    state.json    policy version, dispatcher, and what a resumed run must have in common with this one
    engine/       parameters, optimizer, step count and random state of every rank
    policy/       the policy as a Hugging Face folder that vLLM can serve

`checkpoints/best-000040/` is the policy of the best evaluation so far: a Hugging Face folder, its score in `best.json`,
and a manifest. There is a second one while no checkpoint covers the newest, because training may return to an update
before it. `checkpoints/damaged-000040/` is a checkpoint that could not be resumed from; the next checkpoint deletes it.

Invariants
- A checkpoint is written under a temporary name, synced to disk and renamed: a folder whose name is a number is
  complete and durable.
- Nothing is resumed, exported or evaluated unless its files are those that were written (`services/manifest.py`). If
  the newest checkpoint is damaged, training resumes from the one before it.
- A checkpoint that cannot be written leaves nothing behind, and older ones untouched.
- Whichever checkpoint training resumes from, the best policy of the updates up to it exists.
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
from services.files import PARTIAL, new_folder
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
    """The trainer's own part of a checkpoint.

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


def end_reached(config: Config, version: int, seconds: float) -> str | None:
    """Why a run that has done `version` updates in `seconds` of training is at its end; None if it is not."""
    updates, minutes = config.learner.updates, config.run.minutes
    if version >= updates:
        return f"{version} of {updates} updates are done (learner.updates)"
    if minutes is not None and seconds >= 60 * minutes:
        return f"{version} updates in {seconds / 60:.1f} of {minutes:g} minutes are done (run.minutes)"
    return None


def identity(config: Config) -> dict[str, object]:
    """Settings a resumed run must share with this one: the order of tasks, the groups in Redis, the trained parameters.

    The number of ranks, the ZeRO stage and off-loading may differ: the engine's files hold whole tensors. None stands
    for a setting that is not used, as for one that an older checkpoint does not have.
    """
    params = {
        env.name: env.model_dump(mode="json", include={"params"})["params"] for env in config.environments if env.params
    }
    return {
        "run.seed": config.run.seed,
        "env.name": config.env.name,
        "env.split": config.env.split,
        "env.tasks": config.env.tasks,
        "env.params": params or None,
        "envs": [[env.name, env.split, env.tasks, env.weight] for env in config.envs],
        "learner.group_size": config.learner.group_size,
        "model.dtype": config.model.dtype,
        "model.lora": None if config.model.lora is None else config.model.lora.model_dump(mode="json"),
    }


def require_none(folder: Path) -> None:
    """Raise CheckpointFailed if the folder of a new run holds checkpoints."""
    found = latest(folder)
    if found is not None:
        raise CheckpointFailed(f"{found} exists: continue that run with --resume, or choose another run.name")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None if there is none."""
    found = sorted(_complete(folder))
    return found[-1] if found else None


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were written; None if there is no checkpoint.

    Logs one warning for each newer one that is damaged.

    Raises:
        CheckpointFailed: there are checkpoints, and all of them are damaged.
    """
    found, damaged = _newest(folder, only="")
    if found is not None:
        for problem in damaged:
            log.warning("%s; using %s instead", problem, found.name)
    return found


def newest_with_state(folder: Path) -> Path | None:
    """As `newest_intact`, but verifies only the state's file and logs nothing: quick, for checks before a start.

    Raises:
        CheckpointFailed: there are checkpoints, and the state of each is damaged.
    """
    return _newest(folder, only=_STATE)[0]


def _newest(folder: Path, only: str) -> tuple[Path | None, list[FolderDamaged]]:
    """The newest checkpoint whose files that begin with `only` are intact, and the damage of newer ones."""
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
            f"no intact checkpoint in {folder}; {damaged[0]}: restore one from a copy, or choose another run.name"
        )
    return None, damaged


def set_aside_after(folder: Path, version: int) -> None:
    """Rename the checkpoints after `version`, which are damaged: their numbers will be reused."""
    for found in _complete(folder):
        if int(found.name) > version:
            aside = found.with_name(_DAMAGED + found.name)
            shutil.rmtree(aside, ignore_errors=True)
            found.rename(aside)


def _verify(checkpoint: Path, only: str) -> None:
    """Raise FolderDamaged if a file that begins with `only` is not as written, or the manifest is another update's."""
    update = manifest.read(checkpoint).get("update")
    if update != int(checkpoint.name):
        raise FolderDamaged(f"{checkpoint} is damaged: its {MANIFEST_NAME} is that of update {update}")
    manifest.verify(checkpoint, only)


def read_state(checkpoint: Path, config: Config) -> TrainerState:
    """Read the state of an intact checkpoint.

    Raises:
        CheckpointFailed: it cannot be read, or was written by a run that `config` cannot continue.
    """
    try:
        state = TrainerState(**json.loads((checkpoint / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointFailed(f"cannot read {checkpoint / 'state.json'}: {error}") from error
    written_by = manifest.read(checkpoint).get("run")
    if written_by != config.run.name:
        raise CheckpointFailed(f"{checkpoint} was written by the run {written_by}, not by {config.run.name}")
    for key, value in identity(config).items():
        if state.identity.get(key) != value:
            raise CheckpointFailed(
                f"{checkpoint} was written with {key}={state.identity.get(key)}, this run has {key}={value}: "
                "use the same value, or choose another run.name"
            )
    return state


def save(
    folder: Path,
    state: TrainerState,
    *,
    engine: Callable[[Path], None],
    policy: Callable[[Path], None],
    nbytes: int,
    keep: int,
    run: str,
    ranks: int,
) -> Path:
    """Write the checkpoint of `state.version`; then delete all but the newest `keep`, and surpassed best policies.

    Args:
        folder: of all checkpoints.
        state: the trainer's.
        engine: writes the ranks' files into a folder.
        policy: writes the policy as a Hugging Face folder.
        nbytes: about how much these two write.
        keep: number of checkpoints to keep.
        run: name of the run, for the manifest.
        ranks: number of ranks, for the manifest.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointFailed: not enough disk space, or a file cannot be written.
    """
    final = folder / f"{state.version:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(folder)
        _check_space(folder, nbytes)
        with new_folder(final, durable=True) as partial:
            (partial / "engine").mkdir()
            engine(partial / "engine")
            policy(partial / "policy")
            (partial / _STATE).write_text(json.dumps(asdict(state), indent=1))
            manifest.write(partial, {"kind": "checkpoint", "run": run, "update": state.version, "ranks": ranks})
            if final.exists():
                _discard(final)
        for damaged in folder.glob(f"{_DAMAGED}*"):
            shutil.rmtree(damaged, ignore_errors=True)
        for old in sorted(_complete(folder))[:-keep]:
            _discard(old)
        _drop_beaten(folder)
    except OSError as error:
        raise CheckpointFailed(f"cannot write the checkpoint {final}: {write_failure(error)}") from error
    return final


def best(folder: Path) -> tuple[Path, float] | None:
    """The best policy kept in `folder` and its success rate; None if there is none.

    A policy whose score is damaged does not count and is logged as a warning. Weights are not verified.
    """
    return max(((found, _score(found)) for found in _kept_as_best(folder)), key=lambda each: each[1], default=None)


def keep_best(folder: Path, version: int, success: float, policy: Callable[[Path], None]) -> None:
    """Write the policy of `version` as the best so far. The one before stays until a checkpoint covers this one.

    Args:
        folder: of all checkpoints.
        version: policy version.
        success: its success rate.
        policy: writes it as a Hugging Face folder.

    Raises:
        CheckpointFailed: it cannot be written.
    """
    final = folder / f"{_BEST}{version:06d}"
    try:
        with new_folder(final, durable=True) as partial:
            policy(partial)
            (partial / _SCORE).write_text(json.dumps({"update": version, "success_rate": success}))
            manifest.write(partial, {"kind": "policy", "update": version})
            if final.exists():
                _discard(final)
        _drop_beaten(folder)
    except OSError as error:
        raise CheckpointFailed(f"cannot write the best policy {final}: {error}") from error


def forget_best(folder: Path, after: int) -> None:
    """Delete the best policies of updates after `after`, which will be repeated."""
    for found in _kept_as_best(folder):
        if _version_of_best(found) > after:
            _discard(found)


def _drop_beaten(folder: Path) -> None:
    """Keep at most two best policies: the best that the newest checkpoint covers, and the best of those after it.

    A run that crashes resumes from that checkpoint and repeats the updates after it.
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
    """Folders of best policies with an intact score, newest first: the newest of equally good ones counts."""
    kept = []
    for found in sorted(folder.glob(f"{_BEST}*"), reverse=True):
        try:
            manifest.verify(found, only=_SCORE)
        except FolderDamaged as error:
            log.warning("ignoring a best policy: %s", error)
            continue
        kept.append(found)
    return kept


def _version_of_best(found: Path) -> int:
    return int(found.name.removeprefix(_BEST))


def _score(found: Path) -> float:
    return float(json.loads((found / _SCORE).read_text())["success_rate"])


def whole_policy(weights: Mapping[str, Tensor], model: Path) -> Mapping[str, Tensor]:
    """Complete trained weights to all tensors of a model folder.

    Adapters are merged into the weights of `model`. Tensors that only `model` has are added, such as the vision tower
    of a model whose text part is trained.
    """
    if is_adapter(weights):
        return merged(weights, read_weights(model))
    return {**weights, **dict(read_others(model, weights))}


def export_policy(folder: Path, weights: Mapping[str, Tensor], model: Path) -> None:
    """Write the policy as a Hugging Face folder: these weights, with the configuration and tokenizer of `model`.

    The record of `model`'s warm start is not copied: it does not describe this policy.

    Raises:
        OSError: a file cannot be written.
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
        # safetensors wraps the OS error in its own, as text only.
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error)) from error
    share_weights(folder)


def write_failure(error: OSError) -> str:
    """Why a file could not be written, in a few words."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)


def _set_type(config: Path, weights: Mapping[str, Tensor]) -> None:
    """Set the weights' dtype in the configuration, which may name that of the initial model."""
    settings = json.loads(config.read_text())
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2) + "\n")


def _complete(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, in no order."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointFailed(
            f"a checkpoint takes about {needed / 2**20:,.0f} MiB, and {folder} has {free / 2**20:,.0f} MiB left: "
            "free some space, lower checkpoint.keep, or move run.dir"
        )


def _discard(checkpoint: Path) -> None:
    """Delete a folder. Renames first, so that an interrupted deletion leaves no partial checkpoint under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _discard_leftovers(folder: Path) -> None:
    """Delete what interrupted writes and deletions left."""
    for pattern in (f".*{PARTIAL}", ".*.removed"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)
