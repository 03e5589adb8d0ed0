"""Train LLM agents with GiGPO and its relatives: the Python API of Anchorage.

    import anchorage

    config = anchorage.load_config("demo", "learner.updates=20", "run.name=first")
    run = anchorage.train(config, on_progress=lambda progress: print(progress.text))
    run.group(12).steps.to_pandas()

Described page by page in docs/python-api.md. Names are imported at their first use: `import anchorage` takes
milliseconds, and neither torch nor Ray nor vLLM is imported before a run starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorage.api import Evaluations as Evaluations
    from anchorage.api import demo as demo
    from anchorage.api import evaluate as evaluate
    from anchorage.api import load_config as load_config
    from anchorage.api import read_episodes as read_episodes
    from anchorage.api import register as register
    from anchorage.api import train as train
    from anchorage.api_models.settings import ApiOptions as ApiOptions
    from anchorage.api_models.settings import Price as Price
    from anchorage.rows import FramesUnavailable as FramesUnavailable
    from anchorage.rows import Rows as Rows
    from anchorage.runs.demo import DemoResult as DemoResult
    from anchorage.runs.episodes import EpisodesUnavailable as EpisodesUnavailable
    from anchorage.runs.progress import Progress as Progress
    from anchorage.runs.run import Group as Group
    from anchorage.runs.run import NoSuchGroup as NoSuchGroup
    from anchorage.runs.run import Run as Run
    from env_servers.environment import Environment as Environment
    from env_servers.environment import Observation as Observation
    from learner.advantages import ESTIMATORS as estimators
    from learner.evaluation import EvaluationResult as EvaluationResult
    from services.config.load import ConfigError as ConfigError
    from services.config.tree import Config as Config
    from services.errors import AnchorageError as AnchorageError

__version__ = "0.1.0"

_SOURCES = {
    "AnchorageError": "services.errors",
    "ApiOptions": "anchorage.api_models.settings",
    "Config": "services.config.tree",
    "ConfigError": "services.config.load",
    "DemoResult": "anchorage.runs.demo",
    "Environment": "env_servers.environment",
    "EpisodesUnavailable": "anchorage.runs.episodes",
    "EvaluationResult": "learner.evaluation",
    "Evaluations": "anchorage.api",
    "FramesUnavailable": "anchorage.rows",
    "Group": "anchorage.runs.run",
    "NoSuchGroup": "anchorage.runs.run",
    "Observation": "env_servers.environment",
    "Price": "anchorage.api_models.settings",
    "Progress": "anchorage.runs.progress",
    "Rows": "anchorage.rows",
    "Run": "anchorage.runs.run",
    "demo": "anchorage.api",
    "estimators": "learner.advantages:ESTIMATORS",
    "evaluate": "anchorage.api",
    "load_config": "anchorage.api",
    "read_episodes": "anchorage.api",
    "register": "anchorage.api",
    "train": "anchorage.api",
}
"""Name -> where it is defined: a module, or `module:name` where it has another name there."""

__all__ = [
    "AnchorageError",
    "ApiOptions",
    "Config",
    "ConfigError",
    "DemoResult",
    "Environment",
    "EpisodesUnavailable",
    "EvaluationResult",
    "Evaluations",
    "FramesUnavailable",
    "Group",
    "NoSuchGroup",
    "Observation",
    "Price",
    "Progress",
    "Rows",
    "Run",
    "__version__",
    "demo",
    "estimators",
    "evaluate",
    "load_config",
    "read_episodes",
    "register",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module 'anchorage' has no attribute {name!r}")
    module, _, original = _SOURCES[name].partition(":")
    value: object = getattr(import_module(module), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
