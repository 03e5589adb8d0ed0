"""Tracker for TensorBoard, as event files in the run's folder: the only file that uses that package."""

from __future__ import annotations

from collections.abc import Mapping

from services.tracking import RunInfo, require_package

FOLDER_NAME = "tensorboard"


class TensorBoard:
    """Writes scalars to `tensorboard` in the run's folder. Steps that a resumed run repeats hide the earlier ones."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.resume_step is None else run.resume_step + 1
        self._events = SummaryWriter(log_dir=str(run.folder / FOLDER_NAME), purge_step=purge_step)

    @staticmethod
    def problem(params: None) -> str | None:
        """Return why the tracker cannot work; None if it can."""
        return require_package("tensorboard", "pip install tensorboard, or remove it from telemetry.trackers")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `services.tracking.Tracker`."""
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """See `services.tracking.Tracker`."""
        self._events.close()
