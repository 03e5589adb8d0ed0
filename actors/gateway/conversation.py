"""The calls of one episode: recognise the policy's own answers in a conversation, and put their sampled ids in place.

Clients send the whole conversation with each call, and rewrite the policy's answers in it: thoughts are dropped, ids of
tool calls renumbered, arguments reformatted. So answers are recognised by fingerprints: `h` after each message is a
hash of all messages so far. A conversation extends the call with the same tools whose `h` is found deepest in it.

Example: call 0 asks [s, u] and is answered a; call 1 asks [s, u, a', t], where a' has the identity of a.

    call 0  prompt  ids of the whole conversation              h after s, u and a is remembered for call 0
    call 1  h after s, u and a' is call 0's:
            prompt  prompt of call 0 + sampled ids of a + ids of what follows the answer (`Renderer.tail`)

Any call can be extended, any number of times: forks, sub-agents and parents that resume need nothing else.

Invariants
- Sampled ids are never encoded again where an answer is recognised (`Renderer.splices`).
- Results of tools have the ids that the policy wrote, whatever ids its client has (`wire.tool_call_id`).
- A prompt is never refused because it continues nothing: it is rendered as new, and `broken` says why.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from actors.gateway.messages import Message, Tool, identity, joined
from actors.gateway.render import Rendered, Renderer, TemplateRefused

if TYPE_CHECKING:
    from actors.gateway.read import Reading

Broken = Literal["", "edited", "tools", "template", "compacted"]
"""Why a prompt does not continue an earlier one: an earlier message was changed, other tools, the chat template rewrote
an answer, messages were left out. Empty: it does, or nothing was to be continued."""


_START = b""
"""State before the first message."""


def fingerprints(messages: Sequence[Message]) -> tuple[bytes, ...]:
    """States of a conversation: after each message a hash of all messages so far, by their identities.

    Adjacent assistant messages count as one: after each of them the state is that of what was joined so far.

    Example: of [u, a, b] with two assistant messages, the states are those of [u], [u, a] and [u, a+b].
    """
    states: list[bytes] = []
    base, answers = _START, list[Message]()
    for message in messages:
        if message.role == "assistant":
            answers.append(message)
            states.append(_mixed(base, joined(answers)))
            continue
        base, answers = _mixed(states[-1] if states else _START, message), []
        states.append(base)
    return tuple(states)


def _mixed(state: bytes, message: Message) -> bytes:
    return hashlib.blake2b(state + identity(message), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one call.

    Attributes:
        ids: int32, what the engine gets.
        extends: number of the call whose prompt and answer it begins with; -1 if there is none.
        new: messages since the latest call that was recognised; all of them if none was.
        text: what the prompt adds to the call that it extends; the whole prompt if there is none.
        begun: what the chat template has begun of the answer.
        broken: see `Broken`.
        special: number of control tokens in what is rendered that were made ordinary text.
        tools: JSON text of the tools; empty if there are none.
        messages: the conversation.
        states: its fingerprints.
    """

    ids: NDArray[np.int32]
    extends: int
    new: tuple[Message, ...]
    text: str
    begun: str
    broken: Broken
    special: int
    tools: str
    messages: tuple[Message, ...]
    states: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """An answered call, as later prompts need it; see `Conversation.answered`. `kept_ids`: what they repeat."""

    number: int
    prompt: Prompt
    kept_ids: NDArray[np.int32]
    reading: Reading

    def begins(self, ids: NDArray[np.int32]) -> bool:
        """Whether a prompt begins with this call's prompt and answer."""
        before = len(self.prompt.ids)
        end = before + len(self.kept_ids)
        return np.array_equal(ids[:before], self.prompt.ids) and np.array_equal(ids[before:end], self.kept_ids)


class Conversation:
    """The calls of one episode."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._calls: dict[tuple[str, bytes], _Call] = {}
        """By tools, and by the state after the answer."""
        self._seen: dict[bytes, int] = {}
        """States that were met, with their numbers of messages."""

    def ask(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """The prompt for a conversation, which may end with any message.

        Args:
            messages: at least one.
            tools: as the request declares them.

        Raises:
            TemplateRefused: the chat template cannot write the conversation.
        """
        asked = _Asked(tuple(messages), json.dumps(list(tools)) if tools else "", fingerprints(messages))
        depth, call = self._deepest(asked)
        if call is not None and self._renderer.splices:
            try:
                return self._continued(asked, depth, call)
            except TemplateRefused:  # what a stub cannot show, the whole conversation may
                pass
        return self._whole(asked, depth, call)

    def answered(
        self, number: int, prompt: Prompt, response_ids: Sequence[int] | NDArray[np.int32], reading: Reading
    ) -> None:
        """Remember an answer, so that later conversations can extend it.

        Args:
            number: of the call, for `Prompt.extends`.
            prompt: of the call.
            response_ids: what was sampled.
            reading: the answer, as the client gets it.
        """
        adjacent = prompt.messages[len(prompt.messages) - _trailing_answers(prompt.messages) :]
        base = prompt.states[-1 - len(adjacent)] if len(prompt.states) > len(adjacent) else _START
        state = _mixed(base, joined([*adjacent, reading.message]))
        kept = np.asarray(response_ids, dtype=np.int32)[: reading.kept]
        self._calls[prompt.tools, state] = _Call(number, prompt, kept, reading)
        self._seen.update({state: count for count, state in enumerate((*prompt.states, state), 1)})

    def _deepest(self, asked: _Asked) -> tuple[int, _Call | None]:
        """How many messages the latest call covers that the conversation contains, and that call."""
        for depth in range(len(asked.states), 0, -1):
            call = self._calls.get((asked.tools, asked.states[depth - 1]))
            if call is not None:
                return depth, call
        return 0, None

    def _continued(self, asked: _Asked, depth: int, call: _Call) -> Prompt:
        """The prompt of a call, its sampled answer, and what follows it."""
        renderer, leftover = self._renderer, call.reading.leftover
        new = _with_written_ids(asked.messages[:depth], call.reading.message, asked.messages[depth:])
        tail = renderer.tail(_opening(call.prompt.messages), call.reading.message, new, asked.tools)
        text = renderer.tokens.escape(leftover) + tail.text
        added = np.asarray(renderer.encode(text), dtype=np.int32)
        ids = np.concatenate([call.prompt.ids, call.kept_ids, added])
        edited = any(message.role == "assistant" for message in new)
        return self._prompt(asked, ids, call.number, new, tail, "edited" if edited else "")

    def _whole(self, asked: _Asked, depth: int, call: _Call | None) -> Prompt:
        """The prompt of the whole conversation. It extends a call if it happens to begin with its tokens."""
        rendered = self._renderer.whole(asked.messages, asked.tools)
        ids = np.asarray(self._renderer.encode_whole(rendered.text), dtype=np.int32)
        if call is not None and call.begins(ids):
            return self._prompt(asked, ids, call.number, asked.messages[depth:], rendered, "")
        broken = self._why_broken(asked) if call is None else "template"
        return self._prompt(asked, ids, -1, asked.messages[depth:], rendered, broken)

    def _why_broken(self, asked: _Asked) -> Broken:
        """Why no call is found in a conversation.

        Conversations without answers begin something new: an episode, a sub-agent, a summary that replaces all.
        """
        answers = [number for number, message in enumerate(asked.messages) if message.role == "assistant"]
        if not self._calls or not answers:
            return ""
        if any(asked.states[number] in self._seen for number in answers):
            return "tools"
        first = next(number for number, state in enumerate(asked.states) if state not in self._seen)
        longest = max(self._seen.values())
        is_shorter = len(asked.messages) <= longest and asked.messages[first].role != "assistant"
        return "compacted" if is_shorter else "edited"

    def _prompt(
        self,
        asked: _Asked,
        ids: NDArray[np.int32],
        extends: int,
        new: tuple[Message, ...],
        rendered: Rendered,
        broken: Broken,
    ) -> Prompt:
        tokens = self._renderer.tokens
        return Prompt(
            ids=ids,
            extends=extends,
            new=new,
            text=tokens.unescape(rendered.text),
            begun=rendered.begun,
            broken=broken,
            special=tokens.escapes(rendered.text),
            tools=asked.tools,
            messages=asked.messages,
            states=asked.states,
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation as it comes in: messages, JSON text of the tools, fingerprints."""

    messages: tuple[Message, ...]
    tools: str
    states: tuple[bytes, ...]


def _opening(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages up to the first one of the user; all if there is none."""
    first = next((number for number, message in enumerate(messages, 1) if message.role == "user"), len(messages))
    return messages[:first]


def _with_written_ids(before: Sequence[Message], answer: Message, new: Sequence[Message]) -> tuple[Message, ...]:
    """What follows an answer, with the ids of its calls as the policy wrote them, where it wrote any.

    Args:
        before: the conversation as its client sends it, up to the answer.
        answer: as it was sampled; the client has other ids for its calls.
        new: the messages after it.
    """
    answers = before[len(before) - _trailing_answers(before) :]
    theirs = [call for message in answers for call in message.tool_calls][-len(answer.tool_calls) :]
    pairs = zip(theirs, answer.tool_calls, strict=False)
    written = {their.id: call.id for their, call in pairs if their.id and call.id}
    if not written:
        return tuple(new)
    results = [*itertools.takewhile(lambda message: message.role == "tool", new)]
    renamed = [replace(one, tool_call_id=written.get(one.tool_call_id, one.tool_call_id)) for one in results]
    return (*renamed, *new[len(results) :])


def _trailing_answers(messages: Sequence[Message]) -> int:
    return next((n for n, message in enumerate(reversed(messages)) if message.role != "assistant"), len(messages))
