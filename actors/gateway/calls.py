"""One model call from request to answer: prompt, sample, reading; and requests that are retries of it.

Invariants
- A prompt's ids are what the engine gets and what is recorded; an answer is what it sampled.
- A retry (`x-stainless-retry-count`, or an idempotency key that was seen) of a call that runs joins it, of one that is
  answered gets the same bytes. Another request is a new sample, even with an equal body, unless the client of the
  first one has left while it ran.
- A call whose clients have all left runs on for `agent.linger_s`, then it is dropped from the engine.
- The seed of a call depends on the ticket, on its prompt and on how often that prompt was asked: concurrent calls
  sample the same in whatever order they arrive.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.engine.interface import EngineFailed, Sample, Sampler
from actors.episode import EpisodeFailed, check_sampled
from actors.gateway.conversation import Prompt
from actors.gateway.errors import Refused
from actors.gateway.messages import Message
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.read import AnswerReader, Reading
from actors.gateway.record import Call
from actors.gateway.render import Renderer, TemplateRefused
from actors.gateway.session import Session
from actors.gateway.wire import Answer, Request, Rules

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What calls need of the actor.

    Attributes:
        renderer: of prompts.
        reader: of answers.
        sampler: samples answers.
        metrics: counts calls.
    """

    renderer: Renderer
    reader: AnswerReader
    sampler: Sampler
    metrics: GatewayMetrics

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(self.renderer.tokenizer)


class Pending:
    """A call that runs or has run.

    Args:
        call: of the episode's record.
        request: that it answers.
        task: samples the answer.
        linger_s: how long it runs on without a client.

    Attributes:
        id: of the call, unique in the run.
        created: Unix seconds.
        body: bytes of the plain response, so that a repeated one is identical; empty before the first.
    """

    def __init__(self, id: str, call: Call, request: Request, task: asyncio.Task[Answer], linger_s: float) -> None:
        self.id = id
        self.created = int(time.time())
        self.call = call
        self.request = request
        self.body = b""
        self._task = task
        self._linger_s = linger_s
        self._clients = 0
        self._leaving: asyncio.TimerHandle | None = None

    @property
    def done(self) -> bool:
        """Whether there is an answer, or will never be."""
        return self._task.done()

    @property
    def failed(self) -> bool:
        """Whether there will never be an answer."""
        return self._task.done() and (self._task.cancelled() or self._task.exception() is not None)

    @property
    def abandoned(self) -> bool:
        """Whether it runs without a client."""
        return not self._clients and not self._task.done()

    async def answer(self, gone: asyncio.Event) -> Answer | None:
        """Wait for the answer as one of its clients; None if the client leaves before.

        Raises:
            Refused: there is no answer.
        """
        self.join()
        leaving = asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait([self._task, leaving], return_when=asyncio.FIRST_COMPLETED)
            return self._result() if self._task.done() else None
        finally:
            leaving.cancel()
            self.leave()

    def join(self) -> None:
        """Count a client."""
        self._clients += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def leave(self) -> None:
        """Count a client that has left; after the last one the call is dropped in a while."""
        self._clients -= 1
        if self.abandoned:
            self._leaving = asyncio.get_running_loop().call_later(self._linger_s, self.drop)

    def drop(self) -> None:
        """Drop the call from the engine, unless it has an answer."""
        self._task.cancel()

    async def settled(self) -> None:
        """Wait until there is an answer, or never will be. Raises nothing."""
        await asyncio.wait([self._task])

    def _result(self) -> Answer:
        try:
            return self._task.result()
        except asyncio.CancelledError:
            raise Refused(503, "call_dropped", "the call was dropped: retry") from None


@dataclass(slots=True)
class _OfSession:
    """The calls of one attempt: the newest for each body and idempotency key."""

    by_body: dict[bytes, Pending] = field(default_factory=dict)
    by_key: dict[str, tuple[bytes, Pending]] = field(default_factory=dict)
    all: list[Pending] = field(default_factory=list)


class Calls:
    """The model calls of all episodes of an actor.

    Args:
        policy: what calls need of the actor.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._sessions: weakref.WeakKeyDictionary[Session, _OfSession] = weakref.WeakKeyDictionary()
        self._logged: set[str] = set()

    def find(self, session: Session, digest: bytes, headers: Mapping[str, str]) -> Pending | None:
        """The call that a request is a retry of; None: it is a new one."""
        calls = self._sessions.setdefault(session, _OfSession())
        key = headers.get("idempotency-key", "")
        known = calls.by_key.get(key)
        found = calls.by_body.get(digest)
        if known is not None and known[0] == digest:
            found = known[1]
        elif not _is_retry(headers) and (found is None or not found.abandoned):
            return None
        if found is None or found.failed:
            return None
        self.policy.metrics.retries.labels("replayed" if found.done else "joined").inc()
        return found

    def begin(self, session: Session, request: Request, digest: bytes, headers: Mapping[str, str]) -> Pending:
        """Begin a call.

        Raises:
            Refused: the episode has ended, has too many calls, or the prompt cannot be rendered or is too long.
        """
        session.admit()
        began = time.perf_counter()
        prompt = self._prompt(session, request)
        self.policy.metrics.seconds.labels("render").observe(time.perf_counter() - began)
        limit = session.config.model.max_prompt_tokens
        if len(prompt.ids) > limit:
            session.too_long = True
            raise Refused(
                400,
                "context_length_exceeded",
                # Agents that shorten their history look for one of these phrases: SDKs show them no code.
                f"prompt is too long: {len(prompt.ids)} tokens > {limit} maximum (model.max_prompt_tokens); the "
                f"maximum context length is {limit} tokens: shorten the conversation",
                param="messages",
            )
        state, anchor = session.place(request)
        call = Call(len(session.record.calls), state, anchor, request.trained, prompt)
        session.record.calls.append(call)
        session.record.deliver(prompt.extends)
        self._count(session, request, prompt)
        id = f"{session.ticket.id.replace('/', '-')}-{call.number}"
        session.running.add(call.number)
        self.policy.metrics.in_flight.inc()
        created = int(time.time())
        task = asyncio.create_task(self._answer(session, call, request, id, created))
        task.add_done_callback(lambda task: self._ended(session, call, task))
        pending = Pending(id, call, request, task, session.agent.linger_s)
        pending.created = created
        calls = self._sessions.setdefault(session, _OfSession())
        calls.all.append(pending)
        calls.by_body[digest] = pending
        if key := headers.get("idempotency-key"):
            calls.by_key[key] = digest, pending
        return pending

    def count_tokens(self, session: Session, request: Request) -> int:
        """Number of tokens that the prompt of a request would have. Raises Refused."""
        return len(self._prompt(session, request).ids)

    async def settle(self, session: Session, limit_s: float) -> None:
        """Wait for the calls of an ended attempt that have a client; drop the others, and all after `limit_s`."""
        calls = self._sessions.pop(session, None)
        if calls is None:
            return
        running = [pending for pending in calls.all if not pending.done]
        for pending in running:
            if pending.abandoned or not limit_s:
                pending.drop()
        if running:
            waits = [asyncio.ensure_future(pending.settled()) for pending in running]
            _, late = await asyncio.wait(waits, timeout=limit_s or None)
            for pending in running:
                pending.drop()
            if late:
                await asyncio.wait(late)

    def _prompt(self, session: Session, request: Request) -> Prompt:
        if request.prompt is not None:
            return _completion_prompt(session, self.policy.renderer, request.prompt)
        try:
            return session.conversation.ask(request.messages, request.tools)
        except TemplateRefused as error:
            raise Refused(400, "template_refused", str(error), param="messages") from None

    def _count(self, session: Session, request: Request, prompt: Prompt) -> None:
        metrics = self.policy.metrics
        metrics.prompt_tokens.inc(len(prompt.ids))
        metrics.unknown.inc(request.unknown)
        if prompt.special:
            metrics.special.inc(prompt.special)
        if prompt.broken:
            metrics.broken.labels(prompt.broken).inc()
        for name in request.imposed:
            session.imposed.add(name)
            metrics.imposed.labels(name).inc()
            if name not in self._logged:
                self._logged.add(name)
                logger.info("agents ask for %s: the run's value is used (agent.sampling, agent.constraints)", name)

    async def _answer(self, session: Session, call: Call, request: Request, id: str, created: int) -> Answer:
        """Sample and read the answer of a call."""
        prompt, policy = call.prompt, self.policy
        began = time.perf_counter()
        sample = await self._sample(session, prompt, request)
        sampled = time.perf_counter()
        policy.metrics.seconds.labels("sample").observe(sampled - began)
        stop = sample.stopped_by if isinstance(sample.stopped_by, str) else None
        reading = policy.reader.read(
            prompt.begun,
            sample.token_ids,
            finished=sample.finished,
            tools=request.tools,
            parallel=request.parallel,
            stop=stop,
        )
        call.sample, call.reading = sample, reading
        if request.prompt is None:
            session.conversation.answered(call.number, prompt, sample.token_ids, reading)
        policy.metrics.seconds.labels("read").observe(time.perf_counter() - sampled)
        extends = prompt.extends >= 0
        follows = extends or any(message.role == "assistant" for message in request.messages)
        policy.metrics.answered(extends=extends, follows=follows, readable=not reading.unreadable)
        session.counts.update(follows=follows, extended=extends, unreadable=bool(reading.unreadable))
        return self._made(id, created, call, request, sample, reading)

    async def _sample(self, session: Session, prompt: Prompt, request: Request) -> Sample:
        ids = prompt.ids.tolist()
        digest = prompt_digest(prompt)
        session.asked[digest] += 1
        seed = call_seed(session.ticket.seed, digest, session.asked[digest])

        async def sampled() -> Sample:
            return await self.policy.sampler.generate(
                ids,
                temperature=session.ticket.temperature,
                max_tokens=request.max_tokens,
                seed=seed,
                stop=request.stop,
            )

        try:
            stand_in = session.stand_in
            sample = await (sampled() if stand_in is None else stand_in.answer(prompt, sampled))
            check_sampled(sample)
        except EngineFailed as error:
            session.finish("engine", error=error)
            raise Refused(503, "engine_failed", "the inference engine stopped working", retry_after_s=5) from None
        except EpisodeFailed as error:
            session.finish("failed", str(error))
            raise Refused(503, "engine_failed", str(error)) from None
        except ValueError as error:
            raise Refused(400, "invalid_value", str(error)) from None
        return sample

    def _made(self, id: str, created: int, call: Call, request: Request, sample: Sample, reading: Reading) -> Answer:
        tokens: tuple[str, ...] = ()
        if request.logprobs:
            decode = self.policy.renderer.tokenizer.decode
            tokens = tuple(decode([token], skip_special_tokens=False) for token in sample.token_ids)
        return Answer(
            id=id,
            created=created,
            model=request.model,
            message=reading.message,
            text=reading.text,
            finish_reason=reading.finish_reason,
            prompt_tokens=len(call.prompt.ids),
            tokens=tokens,
            logprobs=tuple(sample.logprobs) if request.logprobs else (),
            completion_tokens=len(sample.token_ids),
            stopped_by=sample.stopped_by if isinstance(sample.stopped_by, str) else None,
        )

    def _ended(self, session: Session, call: Call, task: asyncio.Task[Answer]) -> None:
        session.running.discard(call.number)
        session.touch()
        self.policy.metrics.in_flight.dec()
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, Refused):
            logger.error("ticket %s: call %d failed", session.ticket.id, call.number, exc_info=error)
            session.finish("failed", f"{type(error).__name__}: {error}")


def rules_of(session: Session) -> Rules:
    """What the run imposes on an episode's requests."""
    return Rules(
        temperature=session.ticket.temperature,
        max_response_tokens=session.config.model.max_response_tokens,
        sampling=session.agent.sampling,
        constraints=session.agent.constraints,
    )


def call_seed(seed: int, prompt: bytes, times: int) -> int:
    """Sampling seed of a call, in [0, 2^63).

    Args:
        seed: the ticket's.
        prompt: digest of the prompt's ids.
        times: how often it was asked in this attempt, from 1.
    """
    digest = hashlib.blake2b(f"{seed}/{times}/".encode() + prompt, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompt_digest(prompt: Prompt) -> bytes:
    """What makes a prompt the same as another one."""
    return hashlib.blake2b(prompt.ids.tobytes(), digest_size=16).digest()


def body_digest(path: str, body: bytes) -> bytes:
    """What makes a request the same as another one."""
    return hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).digest()


def _is_retry(headers: Mapping[str, str]) -> bool:
    count = headers.get("x-stainless-retry-count", "0")
    return count.isdecimal() and int(count) >= 1


def _completion_prompt(session: Session, renderer: Renderer, prompt: str | tuple[int, ...]) -> Prompt:
    """The prompt of a completion. Where it begins with an earlier prompt and answer, these are not encoded again.

    The agent has rendered it, so what looks like a control token in it is one.
    """
    tokens, extends, tail = renderer.tokens, -1, prompt
    ids: np.ndarray[Any, np.dtype[np.int32]] = np.empty(0, np.int32)
    for call in session.record.calls:
        if call.sample is None or call.reading is None or not isinstance(call.prompt, CompletionPrompt):
            continue
        before = np.concatenate([call.prompt.ids, np.asarray(call.sample.token_ids, np.int32)[: call.reading.kept]])
        if len(before) <= len(ids):
            continue
        if isinstance(prompt, tuple):
            if len(prompt) < len(before) or not np.array_equal(before, np.asarray(prompt[: len(before)], np.int32)):
                continue
            tail = prompt[len(before) :]
        else:
            told = call.prompt.whole if isinstance(call.prompt.whole, str) else None
            if told is None or not prompt.startswith(told + call.reading.text):
                continue
            tail = call.reading.leftover + prompt[len(told) + len(call.reading.text) :]
        ids, extends = before, call.number
    if isinstance(tail, tuple):
        added = np.asarray(tail, np.int32)
    else:
        encoded = tokens.encode(tail)
        added = np.asarray(encoded if extends >= 0 else tokens.begin(encoded), np.int32)
    text = tail if isinstance(tail, str) else renderer.tokenizer.decode(list(tail), skip_special_tokens=False)
    return CompletionPrompt(
        ids=np.concatenate([ids, added]),
        extends=extends,
        new=(Message("user", text),),
        text=text,
        begun="",
        broken="",
        special=0,
        tools="",
        messages=(),
        states=(),
        whole=prompt,
    )


@dataclass(frozen=True, slots=True)
class CompletionPrompt(Prompt):
    """Prompt of a completion. `whole`: as the agent gave it."""

    whole: str | tuple[int, ...]
