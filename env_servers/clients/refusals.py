"""A refused action as a transition: the agent reads what was wrong, gets no reward, and the episode continues.

A server that refuses an action has not taken a step, but the episode has: the client counts the refused steps and
renumbers the others on their way to the server.

Invariants
- A refusal has `accepted=False` and reward 0, and counts towards `max_steps`.
- A repeated step, refused or taken, returns the same result again.

Example: of the actions a, b, c, d the server refuses b and d, with `max_steps` 4::

    episode's step   1         2         3         4
    action           a         b         c         d
    server's step    1         refused   2         refused
    result           taken     refusal   taken     refusal, truncated
    `_Play.refused`  0         1         1         2

Only the last step can be repeated: step 3, before step 4, goes to the server as its step 2 again; step 4 is answered
from `_Play.last`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from env_servers.clients.interface import ActionRefused, EnvironmentUnavailableError, RequestRejected, SessionLost
from env_servers.protocol import ResetRequest, StepResult

Take = Callable[[str, int, str], Awaitable[StepResult]]
"""Sends a step to the server: session, the server's number of the step, action. Raises ActionRefused."""


@dataclass(slots=True)
class _Play:
    """One episode.

    Attributes:
        request: the reset that opened it.
        last: the result of its last step.
        refused: steps so far that the server refused.
    """

    request: ResetRequest
    last: StepResult
    refused: int = 0


class Refusals:
    """The episodes of one client, as far as refused actions require."""

    def __init__(self) -> None:
        self._plays: dict[str, _Play] = {}

    def opened(self, request: ResetRequest, first: StepResult) -> StepResult:
        """Register a session; returns the reset's result unchanged."""
        self._plays[first.session] = _Play(request, first)
        return first

    def closed(self, session: str) -> None:
        """Forget a session."""
        self._plays.pop(session, None)

    async def step(self, session: str, step: int, action: str, take: Take) -> StepResult:
        """Take the episode's step number `step`.

        Raises:
            ActionRefused: the session was not opened here.
            RequestRejected: the episode is over.
            Exception: whatever else `take` raises.
        """
        play = self._plays.get(session)
        if play is None:
            return await take(session, step, action)
        if step == play.last.step and play.refused and not play.last.accepted:
            return play.last
        if play.refused and play.last.done and step == play.last.step + 1:
            raise RequestRejected(f"the episode ended with step {play.last.step}: reset to start another")
        try:
            taken = await take(session, step - play.refused, action)
        except ActionRefused as error:
            if step == play.last.step and not play.last.accepted:  # a concurrent repeat was refused meanwhile
                return play.last
            if step != play.last.step + 1:
                raise
            play.refused += 1
            play.last = _refusal(play, error)
            return play.last
        except (SessionLost, EnvironmentUnavailableError) as error:
            # The caller may never close it. One with refusals is kept while it may continue: only here are its numbers.
            if isinstance(error, SessionLost) or not play.refused:
                self.closed(session)
            raise
        play.last = _renumbered(taken, step, play.request.max_steps) if play.refused else taken
        return play.last


def _refusal(play: _Play, error: ActionRefused) -> StepResult:
    last, step = play.last, play.last.step + 1
    text = f"The action was not accepted: {error}"
    return last.model_copy(
        update={
            "step": step,
            "observation": text,
            "reward": 0.0,
            "truncated": step == play.request.max_steps,
            "anchor": text if play.request.anchor == "observation" else last.anchor,
            "accepted": False,
        }
    )


def _renumbered(taken: StepResult, step: int, max_steps: int | None) -> StepResult:
    truncated = taken.truncated or (step == max_steps and not taken.terminated)
    return taken.model_copy(update={"step": step, "truncated": truncated})
