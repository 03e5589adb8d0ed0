"""Where a run's metrics go besides `metrics.jsonl`: one file for each service, plug-ins by the same door.

A tracker is a class (or a function that makes an object): `(run: RunInfo) -> Tracker`, which may take parameters of its
own as `params`. It is made, used and closed in one thread of its own (`background.py`). It may have a static method
`problem(params) -> str | None` that says, without a network and within milliseconds, why it could not work.

Invariants
- A tracker that fails, hangs or is slow never stops or slows a run: see `background.py`.
- What is sent is the run's metrics and its settings without addresses, folders and credentials; no code, no console, no
  machine statistics.
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
"""Names that an entry of `telemetry.trackers` may have instead of `module:name`."""


class TrackerUnavailable(PluginError):
    """A tracker's package is missing, or what it needs to begin."""


class Tracker(Protocol):
    """Takes records until it is closed. Both methods may raise and may take their time."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The metrics of one update; NaN and infinities are among them. A resumed run writes later steps again."""

    def close(self) -> None:
        """Finish; called once."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that is tracked.

    Attributes:
        folder: of the run; its name is the run's.
        resume_step: a resumed run's last step that is kept: later ones are done again. None: a new run.
        settings: the configuration as plain data, without addresses, folders and credentials.
    """

    folder: Path
    resume_step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name


def load_trackers(config: TelemetryConfig) -> dict[str, Callable[[RunInfo], Tracker]]:
    """What makes each of the run's trackers, by its name in the configuration.

    Raises:
        PluginError: see `services.plugins.load`.
        TrackerUnavailable: a package is missing, or what a tracker says of itself.
    """
    return {name: _load(name, config) for name in dict.fromkeys(config.trackers)}


def check(config: TelemetryConfig) -> Iterator[str]:
    """What is wrong with the run's trackers, one line each; none of them is made."""
    for name in dict.fromkeys(config.trackers):
        try:
            _load(name, config)
        except PluginError as error:
            yield from str(error).splitlines()


def require_package(name: str, remedy: str) -> str | None:
    """Why a tracker's package cannot be imported; None where it is installed."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was set to None
        found = False
    return None if found else f"telemetry.trackers={name} needs the package {name}: {remedy}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names.

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
                raise PluginError(f"{plugin.label}: the class has no method {method!r}: it needs write and close")
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
