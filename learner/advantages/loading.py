"""From `algorithm` to an estimator: built-in ones and plug-ins alike, with their parameters, checks and description.

Invariants
- What an estimator returns is checked each time: float64 [N] three times. So a wrong shape is an error of one line at
  the first update, and before that at the preflight (`check`), never a wrong gradient.
- `advantage.penalty: unscaled` is applied here, to every estimator alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import BaseModel

from learner.advantages.description import Description, description_of, unscaled_penalty
from learner.advantages.penalty import with_penalty
from learner.advantages.rows import Advantages, StepRows
from services.config.tree import AdvantageConfig, Config
from services.plugins import Plugin, PluginError, load

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "gigpo": "learner.advantages.gigpo:gigpo",
        "grpo": "learner.advantages.grpo:grpo",
        "rloo": "learner.advantages.rloo:rloo",
        "reinforce_pp": "learner.advantages.reinforce_pp:reinforce_pp",
        "dr_grpo": "learner.advantages.dr_grpo:dr_grpo",
        "dapo": "learner.advantages.dapo:dapo",
        "gspo": "learner.advantages.gspo:gspo",
        "hgpo": "learner.advantages.hgpo:hgpo",
        "graphgpo": "learner.advantages.graphgpo:graphgpo",
        "g2po": "learner.advantages.g2po:g2po",
    }
)
"""Names that `algorithm` may have instead of `module:name`."""


@dataclass(frozen=True, slots=True)
class LoadedEstimator:
    """An estimator with its own parameters filled in; called with rows and configuration as any other."""

    plugin: Plugin

    def __call__(self, rows: StepRows, config: AdvantageConfig) -> Advantages:
        """Advantages of every row, the penalty of invalid actions where the configuration wants it.

        Raises:
            PluginError: the estimator raises, or returns anything but three finite float64 arrays [N].
        """
        return with_penalty(self._estimate)(rows, config)

    def _estimate(self, rows: StepRows, config: AdvantageConfig) -> Advantages:
        found = self.plugin.call(rows, config)
        for problem in _form_problems(found, len(rows)):
            raise PluginError(f"{self.plugin.label}: {problem}")
        advantages: Advantages = found
        if self.plugin.reference not in BUILT_IN and np.isfinite(rows.reward).all():
            # Of finite rewards the plug-in alone made it: no group is at fault.
            for part in fields(advantages):
                if not np.isfinite(getattr(advantages, part.name)).all():
                    raise PluginError(f"{self.plugin.label}: {part.name} is not finite for {len(rows)} rows")
        return advantages

    @property
    def description(self) -> Description:
        """What it says of itself; see `learner.advantages.description`."""
        return description_of(self.plugin.target, self._has_step_level)

    @property
    def has_step_level(self) -> bool:
        """Whether it compares actions that were taken in the same state."""
        told = self.description
        return bool(told.step) if told.step_level is None else told.step_level

    def record(self, config: AdvantageConfig) -> dict[str, Any]:
        """The description with the run's settings, as JSON-able data.

        Raises:
            PluginError: a text of the description cannot be filled in.
        """
        params = self.plugin.params
        own = params.model_dump() if isinstance(params, BaseModel) else dict(params or {})
        try:
            record = self.description.record(config, own)
        except Exception as error:
            raise PluginError(f"{self.plugin.label}: its description: {type(error).__name__}: {error}") from error
        if penalty := unscaled_penalty(config):
            record["terms"].append({"term": "invalid action", "meaning": penalty})
        return {"algorithm": self.plugin.reference, "parameters": own, **record}

    def _has_step_level(self) -> bool:
        rows = synthetic_rows()
        return bool(np.any(self._estimate(rows, AdvantageConfig()).step != 0))


def load_estimator(
    algorithm: str, params: Mapping[str, object] | None = None, key: str = "algorithm"
) -> LoadedEstimator:
    """The estimator that `algorithm` names, with parameters of its own.

    Raises:
        PluginError: see `services.plugins.load`.

    Example: `load_estimator("gigpo")(rows, AdvantageConfig())`.
    """
    plugin = load(
        key,
        algorithm,
        built_in=BUILT_IN,
        arguments=("rows", "config"),
        params=params,
        params_key="advantage.params",
    )
    return LoadedEstimator(plugin)


def estimator_of(config: Config) -> LoadedEstimator:
    """The estimator of a run. Raises PluginError, see `services.plugins.load`."""
    return load_estimator(config.algorithm, config.advantage.params)


def check(config: Config) -> Iterator[str]:
    """What is wrong with the run's estimator, one line each: it is loaded and used on a small batch."""
    try:
        estimator = estimator_of(config)
        rows = synthetic_rows()
        columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
        before = {name: column.copy() for name, column in columns.items() if column is not None}
        found = estimator(rows, config.advantage)
        estimator.record(config.advantage)
    except PluginError as error:
        yield from str(error).splitlines()
        return
    label = estimator.plugin.label
    for name, values in before.items():
        if not np.array_equal(values, getattr(rows, name)):
            yield f"{label}: it changes rows.{name}; copy it first"
    for part in fields(found):
        values = getattr(found, part.name)
        shared = [name for name in before if np.shares_memory(values, getattr(rows, name))]
        if shared:
            yield f"{label}: {part.name} shares its memory with rows.{shared[0]}; return a copy"


def synthetic_rows() -> StepRows:
    """18 rows of 2 groups of 3 episodes: different lengths and rewards, states met twice, invalid steps.

    The first group has different scores, the second equal ones.
    """
    lengths = (2, 3, 4, 3, 3, 3)
    trajectory = np.repeat(np.arange(6), lengths)
    group = trajectory // 3
    step = np.concatenate([np.arange(length) for length in lengths])
    ends = np.cumsum(lengths) - 1
    reward = np.zeros(len(step))
    reward[ends] = [10.0, 0.0, 5.0, 1.0, 1.0, 1.0]
    step_group = group * 4 + step
    next_state = np.append(step_group[1:], -1)
    next_state[ends] = -1
    return StepRows(
        group=group,
        trajectory=trajectory,
        step=step,
        step_group=step_group,
        reward=reward,
        valid=(np.arange(len(step)) % 5) != 3,
        state=step_group.copy(),
        next_state=next_state,
    )


def _form_problems(found: object, rows: int) -> Iterator[str]:
    if not isinstance(found, Advantages):
        yield f"must return learner.advantages.Advantages, got {type(found).__name__}"
        return
    for part in fields(found):
        values = getattr(found, part.name)
        if not isinstance(values, np.ndarray):
            yield f"{part.name} must be a float64 array of {rows} rows, got {type(values).__name__}"
        elif values.shape != (rows,) or values.dtype != np.float64:
            yield f"{part.name} must be float64 [{rows}], got {values.dtype} {list(values.shape)}"


ESTIMATORS: Mapping[str, Callable[[StepRows, AdvantageConfig], Advantages]] = MappingProxyType(
    {name: load_estimator(name) for name in BUILT_IN}
)
"""The built-in estimators, loaded."""
