"""A run's numbers for Weights & Biases: the only file that knows that package, which is an optional extra.

Invariants
- Without the package, or online without a key, there is one clear line before anything is trained.
- `offline` reaches no network; `wandb sync` sends what it wrote.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from services.errors import AnchorageError

KEY_VARIABLE = "WANDB_API_KEY"
STEP = "update"


class WandbUnavailable(AnchorageError):
    """The package is not installed, or there is no key, or no answer."""


def wandb_problem(mode: Literal["offline", "online"]) -> str | None:
    """Why nothing can be sent or written; None where nothing is known. Does not import the package."""
    if mode == "online" and not os.environ.get(KEY_VARIABLE):
        return f"telemetry.wandb=online needs a key in {KEY_VARIABLE}; or say telemetry.wandb=offline"
    if importlib.util.find_spec("wandb") is None:
        return "telemetry.wandb needs the package wandb: pip install 'anchorage[wandb]', or say telemetry.wandb=off"
    return None


class WandbRun:
    """Sends records until it is closed. A resumed run of the same name goes on where it was."""

    def __init__(self, folder: Path, project: str, mode: Literal["offline", "online"]) -> None:
        """`folder` is the run's: its name is the run's there, and what is written offline lies in it.

        Raises:
            WandbUnavailable: see there.
        """
        problem = wandb_problem(mode)
        if problem is not None:
            raise WandbUnavailable(problem)
        import wandb

        # Nothing of the machine, of the code or of the console is told: only the run's own numbers.
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True
        )
        try:
            self._run: Any = wandb.init(
                mode=mode,
                dir=str(folder),
                project=project,
                id=folder.name,
                name=folder.name,
                resume="allow",
                settings=settings,
            )
        except (wandb.Error, OSError) as error:
            raise WandbUnavailable(f"Weights & Biases does not answer: {' '.join(str(error).split())[:300]}") from None
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, update: int, scalars: Mapping[str, float]) -> None:
        self._run.log({STEP: update, **scalars})

    def close(self) -> None:
        """Finish; may be called again."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()
