"""Checks that play episodes, for every protocol: deterministic, isolated, honest endings, anchors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import replace

from env_servers.clients.interface import RequestRejected, WrongAnswer
from env_servers.conformance.findings import Subject, Unfit
from env_servers.conformance.play import difference, transcript, turns
from env_servers.protocol import ResetRequest, StepResult

EXPERT_STEPS = 300
SHORT = 3


async def deterministic(subject: Subject) -> str:
    """The same task and actions give the same episode, also if other tasks are played in between."""
    client, plan = subject.client, subject.plan
    first = [await transcript(client, task, plan) for task in plan.tasks]
    for task, before in reversed(list(zip(plan.tasks, first, strict=True))):
        if found := difference(before, await transcript(client, task, plan)):
            raise Unfit(f"{_name(task)}, played twice with the same actions: {found}")
    actions = sum(len(seen) - 1 for seen in first)
    return f"{len(plan.tasks)} tasks, {actions} actions, played twice: equal episodes"


async def isolated(subject: Subject) -> str:
    """An episode is the same alone and beside other sessions, also on the same task."""
    client, plan = subject.client, subject.plan
    alone = [await transcript(client, task, plan) for task in plan.tasks]
    crowd = [(task, salt) for salt in ("", "other", "third") for task in plan.tasks]
    together = await asyncio.gather(*(transcript(subject.crowd, task, plan, salt) for task, salt in crowd))
    for task, before, beside in zip(plan.tasks, alone, together, strict=False):
        if found := difference(before, beside):
            raise Unfit(f"{_name(task)}, alone and beside {len(crowd) - 1} other sessions: {found}")
    sessions = {seen[0].session for seen in together}
    if len(sessions) != len(crowd):
        raise Unfit("two sessions got the same id")
    return f"{len(crowd)} concurrent sessions, three on each task: the same episodes as alone"


async def honest_endings(subject: Subject) -> str:
    """`terminated` and `truncated` differ, limits end episodes where they should, and nothing follows the end."""
    ended = 0
    for task in subject.plan.tasks:
        ended += await _short_play(subject, task)
    expert = await _expert_play(subject)
    if expert is None and not ended:
        return f"limits truncate; no episode of {SHORT} random actions terminated, and there is no expert to try"
    return "limits truncate, ends terminate, never both, and no step follows the end" + (expert or "")


async def anchors(subject: Subject) -> str:
    """The anchor is the observation or, on request, a reproducible digest of the state."""
    task = subject.plan.tasks[0]
    for seen in await transcript(subject.client, task, subject.plan):
        if seen.anchor != seen.observation:
            raise Unfit(f"{_name(task)}, step {seen.step}: the anchor is not the observation's text")
    if "state" not in subject.info.anchors:
        return "by observation"
    by_state = task.model_copy(update={"anchor": "state"})
    try:
        first = await transcript(subject.client, by_state, subject.plan)
    except RequestRejected as error:
        return f"by observation; by state: refused ({error})"
    if found := difference(first, await transcript(subject.client, by_state, subject.plan)):
        raise Unfit(f"{_name(task)}, anchors by state: {found}")
    return f"by observation, and by state: {len({seen.anchor for seen in first})} states in {len(first)} results"


async def _short_play(subject: Subject, task: ResetRequest) -> bool:
    """Play with and without a limit of `SHORT` steps; True if the task terminated before the limit."""
    plan = replace(subject.plan, steps=SHORT)
    free = (await transcript(subject.client, task, plan))[-1]
    seen: list[StepResult] = []
    async for result in turns(subject.client, task.model_copy(update={"max_steps": SHORT}), plan):
        seen.append(result)
        if result.done:
            await _nothing_follows(subject, task, result)
    _flags(task, seen)
    last = seen[-1]
    if (last.terminated, last.truncated, last.step) != (free.terminated, not free.terminated, free.step):
        raise Unfit(
            f"{_name(task)} with max_steps={SHORT}: step {last.step} has terminated={last.terminated} and "
            f"truncated={last.truncated}; without the limit, step {free.step} has terminated={free.terminated}"
        )
    return last.terminated


async def _expert_play(subject: Subject) -> str | None:
    """What the server's scripted expert achieved, in words; None if the server has none."""
    task = subject.plan.tasks[0].model_copy(update={"expert": True})
    try:
        seen = await _follow_expert(subject, task)
    except RequestRejected:
        return None
    if seen is None:
        return None
    _flags(task, seen)
    last = seen[-1]
    if not last.terminated:
        return f"; the expert did not finish {_name(task)} in {EXPERT_STEPS} steps"
    exact = await _follow_expert(subject, task.model_copy(update={"max_steps": last.step}))
    if exact is not None and (exact[-1].truncated or not exact[-1].terminated):
        raise Unfit(f"{_name(task)} terminated with the last step that max_steps allows, but is marked truncated")
    return f"; the expert finished {_name(task)} in {last.step} steps"


async def _follow_expert(subject: Subject, task: ResetRequest) -> list[StepResult] | None:
    seen = [await subject.client.reset(task)]
    try:
        while not seen[-1].done and len(seen) <= EXPERT_STEPS:
            action = seen[-1].expert
            if action is None:
                return None
            seen.append(await subject.client.step(seen[-1].session, seen[-1].step + 1, action))
    finally:
        await subject.client.close_session(seen[0].session)
    return seen


async def _nothing_follows(subject: Subject, task: ResetRequest, last: StepResult) -> None:
    try:
        await subject.client.step(last.session, last.step + 1, subject.plan.actions[0])
    except WrongAnswer:  # the step was taken
        pass
    except RequestRejected:
        return
    raise Unfit(f"{_name(task)}: step {last.step + 1} was taken although the episode ended with step {last.step}")


def _flags(task: ResetRequest, seen: Iterable[StepResult]) -> None:
    for result in seen:
        if result.terminated and result.truncated:
            raise Unfit(f"{_name(task)}, step {result.step}: both terminated and truncated are true")
        if not math.isfinite(result.reward):
            raise Unfit(f"{_name(task)}, step {result.step}: the reward is {result.reward}")
        if result.step == 0 and result.reward != 0:
            raise Unfit(f"{_name(task)}: reward after a reset must be 0, got {result.reward}")


def _name(task: ResetRequest) -> str:
    return f"{task.split}/{task.index}"
