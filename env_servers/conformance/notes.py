"""What a fit server lacks and what that costs: accepted actions, facts, repeating anchors."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from env_servers.clients.interface import RequestRejected
from env_servers.conformance.findings import Finding, Subject
from env_servers.conformance.play import transcript
from env_servers.protocol import AnchorKind, ResetRequest, StepResult

GROUP = 8
"""Episodes of a task that are compared, as in a training group."""
FEWEST_REPEATS = 0.02
"""Share of repeated states below which step groups are of no use."""

COSTS = {
    "won": "success is an episode that terminated with a last reward of at least env.won_at (by default above 0)",
    "goal": "prompts have no line for the task: the observation must state it",
    "task_type": "evaluations report one success rate for all tasks",
    "admissible actions": "every well-formed response counts as valid, and prompts cannot list the actions",
    "state digests": "env.anchor=state is not possible",
}
_NUMBERS = re.compile(r"\d+")
_LONG = 20


async def facts(subject: Subject) -> Finding:
    """Which facts the server gives, and what the missing ones cost."""
    plays = [await transcript(subject.client, task, subject.plan) for task in subject.plan.tasks]
    seen = [result for play in plays for result in play]
    told = {name for result in seen for name, value in result.facts.items() if value is not None}
    if any(result.admissible is not None for result in seen):
        told.add("admissible actions")
    if "state" in subject.info.anchors and await _digests(subject):
        told.add("state digests")
    missing = [f"no {name}: {cost}" for name, cost in COSTS.items() if name not in told]
    if missing:
        return Finding("facts", "note", "; ".join(missing))
    return Finding("facts", "ok", f"the server gives {', '.join(COSTS)}")


async def actions(subject: Subject) -> Finding:
    """How actions are sent, and whether the server accepted those of the check."""
    plays = [await transcript(subject.client, task, subject.plan) for task in subject.plan.tasks]
    taken = [result.accepted for play in plays for result in play[1:]]
    form, most = subject.info.action_form.replace("_", " "), subject.info.max_action_chars
    limit = "no known limit of length" if most is None else f"at most {most:,} characters"
    text = f"{sum(taken)} of {len(taken)} were accepted; sent {form}; {limit}"
    if any(taken) or not taken:
        return Finding("actions", "ok", text)
    return Finding("actions", "note", f"{text}: little was checked; give valid actions with --action")


async def repeats(subject: Subject) -> Finding:
    """Whether episodes of a task reach states with equal anchors, which form GiGPO's step groups.

    What counts are anchors that occur at different steps: at the same step, even a history or a step counter is equal
    for episodes that took the same actions so far.
    """
    kinds: list[AnchorKind] = ["observation"]
    if "state" in subject.info.anchors and await _digests(subject):
        kinds.append("state")
    told, useless, cause = [], [], ""
    for kind in kinds:
        groups = [await _group(subject, task.model_copy(update={"anchor": kind})) for task in subject.plan.tasks[:2]]
        steps, shared, again = map(sum, zip(*map(_counts, groups), strict=True))
        told.append(
            f"by {kind}: of {steps} steps, {shared} share their anchor with another, {again} with one at another step"
        )
        if steps and again < FEWEST_REPEATS * steps:
            useless.append(kind)
            cause = cause or _cause([play for plays in groups for play in plays])
    text = f"{'; '.join(told)} ({GROUP} episodes a task, first states not counted)"
    if "observation" not in useless:
        return Finding("repeats", "ok", text)
    way_out = "; env.anchor=state would help" if "state" in kinds and "state" not in useless else ""
    return Finding(
        "repeats", "note", f"{text}: anchors do not repeat, so GiGPO equals GRPO. Likely cause: {cause}{way_out}"
    )


async def _group(subject: Subject, task: ResetRequest) -> list[list[StepResult]]:
    return [await transcript(subject.client, task, subject.plan, f"member {number}") for number in range(GROUP)]


def _counts(plays: Sequence[Sequence[StepResult]]) -> tuple[int, int, int]:
    """Count the states in which an action is chosen, without the first, which all episodes of a task share.

    Returns:
        The number of states; of those whose anchor occurs more than once; of those whose anchor occurs at another step.

    Example, anchors of two episodes after the first state: A B C and B A D. Of 6 states, the four with A or B share
    their anchor, all of them at another step: (6, 4, 4).
    """
    met = [result for play in plays for result in play[1:] if not result.done and result.accepted]
    often = Counter(result.anchor for result in met)
    times: defaultdict[str, set[int]] = defaultdict(set)
    for result in met:
        times[result.anchor].add(result.step)
    return (
        len(met),
        sum(often[result.anchor] > 1 for result in met),
        sum(len(times[result.anchor]) > 1 for result in met),
    )


def _cause(plays: Sequence[Sequence[StepResult]]) -> str:
    """The likely reason why anchors do not repeat, judged by the texts."""
    without = [[result.model_copy(update={"anchor": _NUMBERS.sub("#", result.anchor)}) for result in p] for p in plays]
    pairs = [pair for play in plays for pair in itertools.pairwise(play)]
    grown = sum(len(one.anchor) >= _LONG and one.anchor in other.anchor for one, other in pairs)
    if pairs and grown > len(pairs) / 2:
        return "the observation holds the history; return the latest state only"
    steps, _, again = _counts(without)
    if again >= FEWEST_REPEATS * steps:
        return "the observation holds a number that changes with each step, such as a step counter or a time"
    return "the observation holds more than the state, or episodes of a task never reach the same state again"


async def _digests(subject: Subject) -> bool:
    """Whether the server offers anchors by state, whatever its info says."""
    request: ResetRequest = subject.plan.tasks[0].model_copy(update={"anchor": "state"})
    try:
        first = await subject.client.reset(request)
    except RequestRejected:
        return False
    await subject.client.close_session(first.session)
    return True
