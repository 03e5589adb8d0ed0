"""Copies the policy of a run, or of one checkpoint, to a Hugging Face folder of its own.

Its configuration goes with it, for `anchorage eval --policy FOLDER`, without the addresses, folders and credentials of
the machine that it comes from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from services import manifest
from services.config.load import load_config, portable_config
from services.errors import CheckpointFailed
from services.files import new_folder
from services.manifest import MANIFEST_NAME
from services.model_folder import check_model_folder
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, run_of


def export_policy(source: Path, out: Path, *, best: bool = False) -> Path:
    """Copy the policy of `source`, a run's folder or a checkpoint's, to `out`; return the folder it was copied from.

    Raises:
        CheckpointFailed: there is no such policy, `out` is not empty, or it cannot be written.
    """
    policy = policy_of(source, best=best)
    check_model_folder(policy)
    out = out.absolute()  # `.` has no name for the partial copy to lie beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointFailed(f"{out} exists and is not an empty folder: give a new or empty one")
    left_out = shutil.ignore_patterns("best.json", MANIFEST_NAME)
    try:
        with new_folder(out) as partial:
            shutil.copytree(policy, partial, ignore=left_out, dirs_exist_ok=True)
            if (run := run_of(policy)) is not None:
                (partial / CONFIG_NAME).write_text(portable_config(load_config(run / CONFIG_NAME)))
            manifest.write(partial, {"kind": "policy"})
    except OSError as error:
        raise CheckpointFailed(f"cannot write {out}: {_reason(error)}") from None
    return policy


def _reason(error: OSError) -> str:
    """Return the first reason: `copytree` collects the errors of all files, each as (from, to, text)."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def policy_of(source: Path, *, best: bool = False) -> Path:
    """Return the folder of a run's policy (of its newest intact checkpoint, or its best), or of a checkpoint's.

    Raises:
        CheckpointFailed: there is none, or its files are damaged.
    """
    from learner import checkpoint

    folder = source / CHECKPOINTS_NAME
    if best:
        found = checkpoint.best(folder)
        if found is None:
            raise CheckpointFailed(f"{folder} holds no best policy: it takes evaluation.every and checkpoint.keep_best")
        manifest.verify(found[0])
        return found[0]
    if (source / "policy").is_dir():
        manifest.verify(source, only="policy/")
        return source / "policy"
    newest = checkpoint.newest_intact(folder)
    if newest is None:
        raise CheckpointFailed(f"{source} is neither a checkpoint nor a run that has one")
    return newest / "policy"
