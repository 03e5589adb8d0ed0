"""Check the training signal of each update: is there one, and does it come from the policy that is trained?

Invariants
- Judged from the figures that every update reports, and a small state: nothing here reads text or weights.
- Each warning is given once in a run, also across resumptions, with its likely cause.
- The gap is measured on tokens that the learner's current version sampled: on them sampler and learner should agree,
  whatever the staleness. If updates have no such tokens for a while, all tokens are judged instead, whose gap includes
  the effect of the updates since. So every run is watched.

Example: learner.max_logprob_gap=0.5. Fresh tokens are missing from update 4 on, so from update 8 on (STALE_UPDATES=5)
the gap of all tokens counts; three updates in a row above the limit (GAP_UPDATES=3) end the run in update 10.

    update     1     2     3     4    5    6    7    8    9    10
    fresh gap  0.01  0.01  0.01  -    -    -    -    -    -    -
    all tokens 0.01  0.02  0.02  0.6  0.6  0.7  0.7  0.8  0.8  0.9
    judged     0.01  0.01  0.01  -    -    -    -    0.8  0.8  0.9 -> RunStalled
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from learner.advantages import StepRows, estimator_of
from learner.dynamic_sampling import has_equal_rewards
from services.config.tree import Config
from services.errors import RunStalled
from services.schemas import Trajectory
from services.turns import turns_of

GAP_WARNING = 0.05
"""Nats, of the mean |log π − log μ|. Equal weights differ by about 1e-5 in float32, 0.01 in bfloat16."""
GAP_UPDATES = 3
"""Updates in a row above `learner.max_logprob_gap` that end the run: a single one may be an odd batch."""
STALE_UPDATES = 5
"""Updates in a row without tokens of the current version after which the gap of all tokens is judged."""
EQUAL_UPDATES = 5
ANCHOR_UPDATES = 3
SELDOM = 0.05
"""Share of turns below which it counts as seldom that their state occurs twice."""
MOST = 0.5
"""Share of responses above which most of them count as cut."""

GAP, INVALID, EQUAL, CUT, ANCHORS = "logprob_gap", "no_valid_action", "equal_rewards", "cut_responses", "lone_anchors"


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one update that are judged.

    Attributes:
        steps: number of turns played: steps of the environment.
        valid: number of turns whose action was valid.
        cut: number of responses that ended at the sampling limit.
        equal_groups: whether in every group all episodes have the same reward.
        repeated_anchors: number of the `counted` turns whose state another turn of the group was taken in.
        counted: number of turns, without the first ones of episodes that begin in the same state: that they share it
            says nothing of the others.
        gap: mean |log π − log μ| in nats over tokens of the current version; None without such tokens.
        stale_gap: the same over the tokens of all versions; None if unknown.
        responses: number of responses trained on; None: one a turn.
    """

    steps: int
    valid: int
    cut: int
    equal_groups: bool
    repeated_anchors: int
    counted: int
    gap: float | None = None
    stale_gap: float | None = None
    responses: int | None = None

    @property
    def responses_seen(self) -> int:
        """Number of responses that `cut` is of."""
        return self.steps if self.responses is None else self.responses


def figures(groups: Iterable[Sequence[Trajectory]], table: StepRows, loss: Mapping[str, float]) -> Figures:
    """Collect the figures of an update from its groups, the table of their turns, and its loss metrics."""
    played = list(groups)
    episodes = [trajectory for group in played for trajectory in group]
    turns = [turns_of(trajectory.steps) for trajectory in episodes]
    finished = [step.finished for trajectory in episodes for step in trajectory.steps if step.trained]
    is_repeated = np.bincount(table.step_group)[table.step_group] > 1
    counted = (table.step > 0) | ~is_repeated
    return Figures(
        steps=sum(map(len, turns)),
        valid=sum(sum(own.valid) for own in turns),
        cut=len(finished) - sum(finished),
        responses=len(finished),
        equal_groups=all(has_equal_rewards(group) for group in played),
        repeated_anchors=int((counted & is_repeated).sum()),
        counted=int(counted.sum()),
        gap=loss.get("fresh_gap"),
        stale_gap=loss.get("logprob_gap"),
    )


@dataclass(slots=True)
class Signal:
    """Judges the updates of a run, one after the other.

    Attributes:
        given: names of warnings that were given already.
        equal: updates in a row in which all groups had equal rewards.
        lone: updates in a row in which anchors were seldom repeated.
        wide: updates in a row above the largest allowed gap.
        stale: updates in a row without a token of the current version.
    """

    given: set[str] = field(default_factory=set)
    equal: int = 0
    lone: int = 0
    wide: int = 0
    stale: int = 0

    def judge(self, update: int, seen: Figures, config: Config) -> dict[str, str]:
        """Return the new warnings after an update, by name.

        Args:
            update: number of the update.
            seen: its figures.
            config: of the run.

        Raises:
            RunStalled: sampler and learner are too far apart, see `learner.max_logprob_gap`.
        """
        self.equal = self.equal + 1 if seen.equal_groups else 0
        self.lone = self.lone + 1 if seen.repeated_anchors < SELDOM * seen.counted else 0
        self.stale = self.stale + 1 if seen.gap is None else 0
        if self.stale >= STALE_UPDATES:
            seen = replace(seen, gap=seen.stale_gap)
        self._judge_gap(update, seen.gap, config.learner.max_logprob_gap)
        due = {
            GAP: seen.gap is not None and seen.gap > GAP_WARNING,
            INVALID: seen.valid == 0,
            EQUAL: self.equal >= EQUAL_UPDATES,
            CUT: seen.cut > MOST * seen.responses_seen,
            ANCHORS: self.lone >= ANCHOR_UPDATES and estimator_of(config).has_step_level,
        }
        names = [name for name, is_due in due.items() if is_due and name not in self.given]
        new = {name: f"update {update}: {TEXTS[name](seen, config)}{self._tokens(name)}" for name in names}
        self.given |= new.keys()
        return new

    def _judge_gap(self, update: int, gap: float | None, limit: float | None) -> None:
        if gap is None or limit is None:
            return
        self.wide = self.wide + 1 if gap > limit else 0
        if self.wide >= GAP_UPDATES:
            raise RunStalled(
                f"update {update}: sampler and learner are {gap:.3g} nats apart (mean |log π − log μ|), more than "
                f"learner.max_logprob_gap={limit:g}, in {GAP_UPDATES} updates in a row: the engine does not sample the "
                f"policy that is trained; run `anchorage model check` on the model{self._tokens(GAP)}"
            )

    def _tokens(self, name: str) -> str:
        """Note on the tokens that were judged, if they were not those of the current version."""
        if name != GAP or self.stale < STALE_UPDATES:
            return ""
        return (
            f" (the last {self.stale} updates had no token of the version they updated: the gap is that of older "
            "tokens, and includes the effect of the updates since; learner.max_staleness=0 separates the two)"
        )


def _gap(seen: Figures, config: Config) -> str:
    return (
        f"sampler and learner are {seen.gap or 0.0:.3g} nats apart (mean |log π − log μ|), "
        f"more than {GAP_WARNING:g}: different kernels, low precision (model.dtype={config.model.dtype}), or an "
        "engine without the learner's weights; see `anchorage model check`"
    )


def _invalid(seen: Figures, config: Config) -> str:
    rules = config.prompt
    return (
        f"none of the {seen.steps} actions was valid: does the model know the format of prompt.template="
        f"{rules.template}, and is prompt.validity={rules.validity} what this environment needs?"
    )


def _equal(seen: Figures, config: Config) -> str:
    return (
        f"in the last {EQUAL_UPDATES} updates all episodes of each group had the same reward, so there was nothing to "
        "learn from: are the tasks too hard or too easy for the model, or does the environment give no reward?"
    )


def _cut(seen: Figures, config: Config) -> str:
    return (
        f"{seen.cut} of {seen.responses_seen} responses were cut by model.max_response_tokens="
        f"{config.model.max_response_tokens}: raise it, or ask for shorter responses"
    )


def _lone_anchors(seen: Figures, config: Config) -> str:
    effects = {
        "gigpo": "GiGPO is reduced to GRPO",
        "hgpo": "HGPO has nothing to compare",
        "graphgpo": "GraphGPO is reduced to GRPO",
        "g2po": "G2PO compares no actions within a state",
    }
    effect = effects.get(config.algorithm, f"the step level of {config.algorithm} has nothing to compare")
    return (
        f"{effect}: in the last {ANCHOR_UPDATES} updates a state after the first seldom occurred twice within a group "
        f"({seen.repeated_anchors} of {seen.counted} turns). {_anchor_advice(config)}"
    )


def _anchor_advice(config: Config) -> str:
    if config.agent is None or config.agent.environment == "bound":
        return "Does the observation contain a step counter or the history? See env.anchor and advantage.similarity"
    return (
        f"Is what the agent is told unique to each episode? Send an anchor with /episode/observe or the header "
        f"X-Anchorage-Anchor, or see agent.anchor={config.agent.anchor} and advantage.similarity"
    )


TEXTS: Mapping[str, Callable[[Figures, Config], str]] = MappingProxyType(
    {GAP: _gap, INVALID: _invalid, EQUAL: _equal, CUT: _cut, ANCHORS: _lone_anchors}
)
