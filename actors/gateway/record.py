"""What happened in an episode, and the trajectory that it becomes: calls, transitions, turns, anchors.

Invariants
- Only a call whose answer was delivered becomes a step: it was written to a connection to its end, or a later prompt
  contains it.
- A turn is what was asked in one state; all its calls have the anchor of its first one. Its last call carries the
  rewards of the transitions until the next turn begins, and the end of the episode.
- The rewards of the steps add up to those of the transitions.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import orjson

from actors.engine.interface import Sample
from actors.gateway.conversation import Prompt
from actors.gateway.messages import Message, Tool
from actors.gateway.read import Reading
from services.schemas import Step

OBSERVATION_CHARS = 4096


@dataclass(slots=True)
class Call:
    """One model call.

    Attributes:
        number: of the call in its episode, from 0.
        state: number of the state in which it arrived; calls with the same one are a turn.
        anchor: key of that state.
        trained: whether its answer is trained on.
        prompt: what the engine reads.
        sample: what the engine sampled; None before.
        reading: the answer as the client gets it; None before.
        delivered: whether the client has it.
    """

    number: int
    state: int
    anchor: str
    trained: bool
    prompt: Prompt
    sample: Sample | None = None
    reading: Reading | None = None
    delivered: bool = False


@dataclass(frozen=True, slots=True)
class Transition:
    """One transition of the environment.

    Attributes:
        state: number of the state that it left.
        action: what was sent to the environment; empty where the agent's own world does not say.
        reward: of the transition.
        valid: whether the action was accepted, and admissible where that is asked for.
        terminated, truncated: as for a step.
    """

    state: int
    action: str
    reward: float
    valid: bool = True
    terminated: bool = False
    truncated: bool = False


@dataclass(slots=True)
class Record:
    """Calls and transitions of one attempt, in the order in which they arrived."""

    calls: list[Call] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)

    def deliver(self, number: int) -> None:
        """Note that a client has the answer of a call, and so those that its prompt contains."""
        while number >= 0 and not self.calls[number].delivered:
            self.calls[number].delivered = True
            number = self.calls[number].prompt.extends

    @property
    def kept(self) -> list[Call]:
        """The calls that become steps."""
        return [call for call in self.calls if call.delivered and call.sample is not None and call.sample.token_ids]

    @property
    def playable(self) -> bool:
        """Whether a delivered call is trained on: without one there is nothing to store."""
        return any(call.trained for call in self.kept)

    def steps(self, *, cut: bool = False) -> tuple[Step, ...]:
        """The steps of the trajectory.

        Args:
            cut: the agent stopped before the episode's end: the last turn is truncated.

        Example: calls a and b are made in state 0, c (frozen) and d in state 2; transitions 0→1 (reward 1), 1→2
        (reward 2) and 2→end (reward 4). The second transition has no call: it belongs to the turn before.

            step     a    b    c     d
            turn     0    0    -1    1
            reward   0    3    0     4
        """
        kept = self.kept
        states = sorted({call.state for call in kept if call.trained})
        numbers = {call.number: place for place, call in enumerate(kept)}
        last = {call.state: call.number for call in kept if call.trained}
        first = {call.state: call.anchor for call in reversed(kept) if call.trained}
        moves = self._moves(states)
        steps = []
        for call in kept:
            step = _step(call, numbers, moves.get(call.state, ()))
            if not call.trained:
                steps.append(replace(step, turn=-1, trained=False))
                continue
            step = replace(step, turn=states.index(call.state), anchor=first[call.state])
            if last[call.state] == call.number:
                step = _carrying(step, moves.get(call.state, ()), cut=cut and call.state == states[-1])
            steps.append(step)
        return tuple(steps)

    def _moves(self, states: Sequence[int]) -> dict[int, list[Transition]]:
        """The transitions that belong to each turn, by the number of its state."""
        moves: dict[int, list[Transition]] = {}
        for move in self.transitions if states else ():
            turn = states[max(0, bisect_right(states, move.state) - 1)]
            moves.setdefault(turn, []).append(move)
        return moves


def _step(call: Call, numbers: dict[int, int], moves: Sequence[Transition]) -> Step:
    assert call.sample is not None
    assert call.reading is not None
    sample, reading = call.sample, call.reading
    # What was done before the episode's first call belongs to its turn, and is not the policy's.
    acted = [move.action for move in moves if move.state >= call.state and move.action]
    return Step(
        prompt_ids=call.prompt.ids,
        response_ids=np.asarray(sample.token_ids, dtype=np.int32),
        logprobs=np.asarray(sample.logprobs, dtype=np.float32),
        versions=sample.versions,
        anchor=call.anchor,
        observation=observed(call.prompt.new),
        prompt=call.prompt.text,
        response=sample.text,
        action="\n".join(acted) if acted else said(reading.message),
        reward=0.0,
        valid=reading.valid,
        finished=sample.finished,
        extends=numbers.get(call.prompt.extends, -1),
        tool_calls=called(reading.message),
    )


def _carrying(step: Step, moves: Sequence[Transition], *, cut: bool) -> Step:
    """The last step of a turn, with what became of it."""
    return replace(
        step,
        reward=float(sum(move.reward for move in moves)),
        valid=step.valid and all(move.valid for move in moves),
        terminated=any(move.terminated for move in moves),
        truncated=cut or any(move.truncated for move in moves),
    )


def observed(messages: Sequence[Message]) -> str:
    """The text of the messages that are not answers, at most `OBSERVATION_CHARS` of it."""
    text = "\n".join(message.content for message in messages if message.role != "assistant")
    return text[-OBSERVATION_CHARS:]


def said(answer: Message) -> str:
    """What an answer does, as text: its tool calls as JSON, else its content."""
    return called(answer) or answer.content


def called(answer: Message) -> str:
    """The tool calls of an answer as JSON; empty without one."""
    if not answer.tool_calls:
        return ""
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    return orjson.dumps(calls).decode()


def digest_of(messages: Sequence[Message], tools: Sequence[Tool], *, whole: bool) -> str:
    """The default anchor of a state of an agent's own world, made of what the policy was told.

    Args:
        messages: the conversation.
        tools: that may be called.
        whole: of all messages that are not answers; otherwise of those since the last answer, and system prompts.

    White space is normalised. The system prompt and the tools keep a sub-agent's states apart from its parent's.
    """
    names = sorted(str(function.get("name")) for function in _functions(tools))
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    since = 0 if whole or not answers else answers[-1] + 1
    told = [
        [message.role, " ".join(message.content.split())]
        for place, message in enumerate(messages)
        if message.role == "system" or (place >= since and message.role != "assistant")
    ]
    return hashlib.blake2b(orjson.dumps([names, told]), digest_size=16).hexdigest()


def _functions(tools: Sequence[Tool]) -> Iterator[dict[str, object]]:
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict):
            yield function
