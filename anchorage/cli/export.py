"""`anchorage export`: the policy of a run or of one checkpoint as a Hugging Face folder of its own.

With it goes its configuration, for `anchorage eval --policy FOLDER`, without the addresses, folders and credentials of
the machine it comes from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from services import manifest
from services.config.load import load_config, portable_config
from services.errors import CheckpointFailed
from services.manifest import MANIFEST_NAME
from services.model_folder import check_model_folder
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, run_of


def export(source: Path, out: Path, *, best: bool) -> Path:
    """Copy the policy of `source`, a run's folder or a checkpoint's, to `out`; the folder it was copied from.

    Raises:
        CheckpointFailed: there is no such policy, `out` holds something already, or it cannot be written.
    """
    policy = policy_of(source, best=best)
    check_model_folder(policy)
    out = out.absolute()  # `.` has no name for the partial copy to lie beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointFailed(f"{out} is there already: name a folder that is new or empty")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(policy, partial, ignore=shutil.ignore_patterns("best.json", MANIFEST_NAME))
        if (run := run_of(policy)) is not None:
            (partial / CONFIG_NAME).write_text(portable_config(load_config(run / CONFIG_NAME)))
        manifest.write(partial, {"kind": "policy"})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointFailed(f"cannot write {out}: {_reason(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return policy


def _reason(error: OSError) -> str:
    """`copytree` collects the errors of all files: (from, to, text) of each."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def policy_of(source: Path, *, best: bool = False) -> Path:
    """The folder of the policy of a run (of its newest intact checkpoint, or its best), or of a checkpoint.

    Raises:
        CheckpointFailed: there is none, or its files are not as they were written.
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
