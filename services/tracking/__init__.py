"""Metrics trackers: where a run's metrics go besides `metrics.jsonl`. One file per service; plug-ins load alike.

A tracker is a class, or a function that returns an object: `(run: RunInfo) -> Tracker`, optionally with parameters of
its own as `params`. It is created, used and closed in one thread of its own (`background.py`). It may have a static
method `problem(params) -> str | None` that returns why it cannot work, without network access and within milliseconds.

Invariants
- A tracker that fails, hangs or is slow never stops or slows down a run: see `background.py`.
- Trackers receive the run's metrics and its settings without addresses, folders and credentials; no code, no console
  output, no machine statistics.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from services.config.tree import TelemetryConfig
from services.plugins import Plugin, PluginError, load, raised

TRACKERS: Mapping[str, str] = MappingProxyType(
    {
        "tensorboard": "services.tracking.tensorboard:TensorBoard",
        "wandb": "services.tracking.wandb:WeightsAndBiases",
        "mlflow": "services.tracking.mlflow:MLflow",
        "trackio": "services.tracking.trackio:Trackio",
    }
)
"""Built-in trackers by the names that `telemetry.trackers` accepts instead of `module:name`."""


class TrackerUnavailable(PluginError):
    """A tracker's package is not installed, or the tracker reports why it cannot work."""


class Tracker(Protocol):
    """Receives records until it is closed. Both methods may raise and may be slow."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the metrics of one update; values may be NaN or infinite. A resumed run repeats its later steps."""

    def close(self) -> None:
        """Flush and finish. Called once."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that is tracked.

    Attributes:
        folder: the run's folder, which has the run's name.
        resume_step: last step that a resumed run keeps; it repeats later ones. None: a new run.
        settings: the configuration as plain data, without addresses, folders and credentials.
    """

    folder: Path
    resume_step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name


def load_trackers(config: TelemetryConfig) -> dict[str, Callable[[RunInfo], Tracker]]:
    """Return the constructor of each of the run's trackers, by its name in the configuration.

    Raises:
        PluginError: see `services.plugins.load`.
        TrackerUnavailable: a package is not installed, or the tracker reports a problem.
    """
    return {name: _load(name, config) for name in dict.fromkeys(config.trackers)}


def check(config: TelemetryConfig) -> Iterator[str]:
    """Yield the problems of the run's trackers, one line each, without creating any of them."""
    for name in dict.fromkeys(config.trackers):
        try:
            _load(name, config)
        except PluginError as error:
            yield from str(error).splitlines()


def require_package(name: str, remedy: str) -> str | None:
    """Return why a tracker's package cannot be imported; None if it is installed. Does not import it."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ValueError:  # a module in `sys.modules` without a spec
        found = False
    return None if found else f"telemetry.trackers={name} requires the package {name}: {remedy}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names.

    Example: `{"learner": {"updates": 2}}` is `{"learner.updates": 2}`.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _load(name: str, config: TelemetryConfig) -> Callable[[RunInfo], Tracker]:
    key = config.params_key(name)
    plugin = load(
        "telemetry.trackers",
        name,
        built_in=TRACKERS,
        arguments=("run",),
        params=config.params.get(key),
        params_key=f"telemetry.params.{key}",
    )
    target = plugin.target
    if inspect.isclass(target):
        for method in ("write", "close"):
            if not callable(getattr(target, method, None)):
                raise PluginError(f"{plugin.label}: the class has no method {method!r}; it must have write and close")
    if (problem := _problem(plugin)) is not None:
        raise TrackerUnavailable(problem)
    return plugin.bound()


def _problem(plugin: Plugin) -> str | None:
    ask = getattr(plugin.target, "problem", None)
    if ask is None:
        return None
    try:
        problem = ask(plugin.params)
    except Exception as error:
        return f"{plugin.label}: problem() raised {raised(error)}"
    return None if problem is None else str(problem)
