"""What an estimator says of itself: title, formulas, what their terms mean, whether it has a step level.

The dashboard explains a run's advantages from this alone: it knows no algorithm by name. A description is optional. An
estimator without one is called by its name, explained by the beginning of its docstring, and has a step level where its
step values are not all 0 on a small batch.

Invariants
- What is written (`record`) is plain data with the run's own settings filled in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.config.tree import AdvantageConfig

ATTRIBUTE = "description"
"""Of an estimator: holds its `Description`."""

Text = str | Callable[[AdvantageConfig], str]
"""A text in which `{name}` stands for a field of the configuration's `advantage` section or a parameter of the
estimator's own, or a function that makes it; "" leaves the term out."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Description:
    """What `describe` was given; see there."""

    title: str
    paper: str = ""
    episode: Mapping[str, str] = field(default_factory=dict)
    step: Mapping[str, str] = field(default_factory=dict)
    total: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, Text] = field(default_factory=dict)
    step_level: bool | None = None

    def record(self, config: AdvantageConfig, params: Mapping[str, object]) -> dict[str, Any]:
        """The description as JSON-able data, for the configuration and the estimator's own parameters.

        Raises:
            KeyError, ValueError, TypeError: a placeholder in a term names no field, or formats it wrongly.
        """
        values = {**config.model_dump(exclude={"params"}), **params}
        texts = {
            name: text.format_map(values) if isinstance(text, str) else text(config)
            for name, text in self.terms.items()
        }
        levels = {"episode": self.episode, "step": self.step, "total": self.total}
        return {
            "title": self.title,
            "paper": self.paper,
            "step_level": bool(self.step) if self.step_level is None else self.step_level,
            "formulas": [
                {"level": level, "formula": formula, "meaning": meaning}
                for level, formulas in levels.items()
                for formula, meaning in formulas.items()
            ],
            "terms": [{"term": name, "meaning": text} for name, text in texts.items() if text],
        }


def describe(
    title: str,
    *,
    paper: str = "",
    episode: Mapping[str, str] | None = None,
    step: Mapping[str, str] | None = None,
    total: Mapping[str, str] | None = None,
    terms: Mapping[str, Text] | None = None,
    step_level: bool | None = None,
) -> Callable[[F], F]:
    """Describe the estimator that this decorates.

    Args:
        title: its name, as people write it.
        paper: where it comes from.
        episode / step / total: formulas of the three advantages and what each means; `_` begins a subscript.
        terms: what a term of the formulas means, see `Text`.
        step_level: whether actions taken in the same state are compared; None: where `step` has formulas.

    Example:
        @describe("Half", episode={"A_E = α (score − mean)": "over the group's episodes"}, terms={"α": "{alpha:g}"})
        def half(rows, config, params): ...
    """

    def mark(estimator: F) -> F:
        setattr(
            estimator,
            ATTRIBUTE,
            Description(title, paper, episode or {}, step or {}, total or {}, terms or {}, step_level),
        )
        return estimator

    return mark


def description_of(estimator: Callable[..., Any], step_level: Callable[[], bool]) -> Description:
    """The estimator's own description, or what can be said without one; `step_level` then finds out about that."""
    own = getattr(estimator, ATTRIBUTE, None)
    if isinstance(own, Description):
        return own
    title = getattr(estimator, "__name__", type(estimator).__name__)
    summary = (inspect.getdoc(estimator) or "").partition("\n\n")[0]
    terms: dict[str, Text] = {title: lambda config: " ".join(summary.split())}
    return Description(title, terms=terms if summary else {}, step_level=step_level())


def counted(config: AdvantageConfig) -> str:
    """Of the built-in estimators: what the mean of scores is taken over."""
    if config.episode_statistics == "trajectories":
        return "over the episodes, each counted once"
    return "over the steps of all episodes, so longer ones count more"


def divisor(config: AdvantageConfig) -> str:
    """Of the built-in estimators: F."""
    return "the standard deviation" if config.normalisation == "std" else "1 (only centred)"


def scaled_penalty(config: AdvantageConfig) -> str:
    """Of the built-in estimators: what an invalid action costs where that is part of what is normalised."""
    if config.penalty == "unscaled" or config.invalid_action_penalty == 0:
        return ""
    return f"{config.invalid_action_penalty:g} less score and return of the invalid step, before they are normalised"


def unscaled_penalty(config: AdvantageConfig) -> str:
    """Of every estimator: what an invalid action costs where that is subtracted afterwards."""
    if config.penalty == "scaled" or config.invalid_action_penalty == 0:
        return ""
    return f"{config.invalid_action_penalty:g} less advantage of the invalid step, after normalisation"


SCORES: Mapping[str, Text] = {
    "score": "sum of the episode's rewards, the same for each of its steps",
    "mean": counted,
    "F": divisor,
    "invalid action": scaled_penalty,
}
"""Terms of the built-in estimators that compare the scores of a group's episodes."""
GROUP_SCORES: Mapping[str, str] = {"A_E = (score − mean) / F": "over the group's episodes"}
"""Episode level of GRPO and of those that share it."""
RETURNS: Mapping[str, Text] = {"r_t": "reward of the step", "γ": "{gamma:g}, so sooner is worth more"}
"""Terms of step returns."""
