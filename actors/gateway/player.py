"""Lets an agent program play an actor's tickets: one attempt after another, each with a key of its own.

    leased -> prepared (bound: reset) -> started or offered -> playing -> closing -> stored, failed, returned, abandoned

Invariants
- Nothing of an attempt outlives `play`: its key is void, its session closed, its agent process ended or being ended.
- What the policy can cause is stored, what it cannot cause never is: an agent that crashes after its first answer
  gives a truncated episode; a lost session or engine gives none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors.engine.interface import Sampler
from actors.episode import BACKOFF, RESTARTS, EpisodeFailed, action_form
from actors.gateway.app import Gateway
from actors.gateway.calls import Policy
from actors.gateway.conversation import Conversation
from actors.gateway.errors import Refused, episode_ended, moved
from actors.gateway.listening import Listening
from actors.gateway.metrics import GatewayMetrics
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.gateway.service import Offer
from actors.gateway.session import Bound, Own, Session, StandIn
from actors.harness.command import AgentProcess, Launcher
from actors.players import TicketReturned, client_of
from env_servers.client import EnvironmentClient, RequestRejected, SessionLost
from env_servers.protocol import ActionForm, ResetRequest
from services.config.agent import AgentConfig
from services.config.masking import masked
from services.config.tree import Config
from services.schemas import Ticket, Trajectory

logger = logging.getLogger(__name__)

CLOSING_S = 10.0
"""How long the calls that had arrived before the end may still take."""
EXIT_S = 5.0
"""How long an agent may live on after the end of its episode, before it is ended."""
DRAIN_S = 0.2
"""For how long a request that an agent sent just before it exited may still arrive."""
MARGIN_S = 60.0
"""Beyond `rollout.episode_timeout_s`, at which an agent's episode is ended and stored."""
LONGEST_GOAL = 32 * 1024
HOW_TO_REWARD = 'post {"reward": 1.0} to $ANCHORAGE_URL/episode/end'


class AgentPlayer:
    """Lets an agent program play, through the gateway.

    Args:
        actor: name to record in trajectories.
        config: of the run.
        agent: its agents.
        environments: a client for each environment, by name.
        sampler: samples answers.
        tokenizer: of the policy.
        token: the run's agent token; None: there is none.
        stand_in: makes what answers an attempt's calls in the engine's place, and may ask the environment's expert.
            None: the engine answers.

    Raises:
        ModelUnavailable, HistoryUndecided, PluginError: the chat template or the reader cannot be used.
    """

    def __init__(
        self,
        actor: str,
        config: Config,
        agent: AgentConfig,
        environments: Mapping[str, EnvironmentClient],
        sampler: Sampler,
        tokenizer: Any,
        token: str | None = None,
        stand_in: Callable[[Bound], StandIn] | None = None,
    ) -> None:
        self._actor = actor
        self._config = config
        self._agent = agent
        self._stand_in = stand_in
        self._environments = environments
        self._forms: dict[str, ActionForm] = {}
        self._metrics = GatewayMetrics()
        self._renderer = Renderer(tokenizer, template_kwargs=agent.template_kwargs, history=agent.history)
        reader = AnswerReader(self._renderer, agent.reader_name)
        self._gateway = Gateway(Policy(self._renderer, reader, sampler, self._metrics), token)
        self._listening = Listening(self._gateway.app, agent.listen, agent.advertise)
        self._launcher = Launcher(agent) if agent.command is not None else None
        self._playing: set[Session] = set()
        self._untaken = 0
        self._failures = 0

    @property
    def limit_s(self) -> float:
        return self._config.rollout.episode_timeout_s + self._agent.offer_s + MARGIN_S

    async def start(self) -> None:
        """Listen. Raises GatewayUnavailable."""
        for line in self._renderer.facts.lines():
            logger.info("chat template: %s", line)
        if self._config.weights.update == "at_episode":
            logger.warning(
                "weights.update=at_episode with agents: one slow agent delays an update by up to "
                "rollout.episode_timeout_s=%g s",
                self._config.rollout.episode_timeout_s,
            )
        await self._listening.start()
        logger.info("gateway for agents at %s", self._listening.url)

    async def play(self, ticket: Ticket) -> Trajectory:
        restarts = 0
        deadline = time.monotonic() + self._config.rollout.episode_timeout_s
        while True:
            try:
                return await self._play_once(ticket, deadline)
            except (EpisodeFailed, RequestRejected):
                self._failures += 1
                raise
            except SessionLost as error:
                self._failures += 1
                restarts += 1
                if restarts > RESTARTS:
                    raise EpisodeFailed(f"the environment lost the session {restarts} times: {error}") from error
                logger.warning("ticket %s: session lost (%s), starting the agent again", ticket.id, error)
            await asyncio.sleep(BACKOFF.delay(restarts))

    def room(self, free: int) -> int:
        if self._launcher is not None:
            return free
        return max(0, min(free, self._gateway.offers.waiting - self._untaken))

    def status(self) -> dict[str, object]:
        return {
            "agents": {
                "gateway": self._listening.url if self._listening.started else None,
                "playing": len(self._playing),
                "waiting": self._gateway.offers.waiting,
                "processes": self._launcher.alive if self._launcher is not None else 0,
                "template": self._renderer.facts.lines(),
                **self._metrics.summary(),
            }
        }

    async def close(self) -> None:
        if self._launcher is not None:
            await self._launcher.close()
        await self._listening.stop()

    async def _play_once(self, ticket: Ticket, deadline: float) -> Trajectory:
        """One attempt, with a session and a key of its own. Raises SessionLost, and as `play`."""
        self._untaken += 1
        untaken = True
        session: Session | None = None
        process: AgentProcess | None = None
        try:
            session = await self._open(ticket)
            self._playing.add(session)
            key = self._gateway.keys.issue(session)
            if self._launcher is not None:
                process = await self._start_process(self._launcher, session, key)
            else:
                await self._wait_for_service(session, key)
            self._untaken, untaken = self._untaken - 1, False
            await self._wait(session, process, deadline)
            self._gateway.keys.void(key, _after(session))
            await self._gateway.calls.settle(session, CLOSING_S if session.cause == "done" else 0.0)
            return self._outcome(session, process)
        finally:
            self._untaken -= untaken
            if session is not None:
                await self._close(session, process, key)

    async def _close(self, session: Session, process: AgentProcess | None, key: str) -> None:
        """End what is left of an attempt, however it ended."""
        self._playing.discard(session)
        session.finish("abandoned")
        self._gateway.keys.void(key, moved())
        if process is not None and self._launcher is not None:
            self._launcher.end(process, EXIT_S if session.cause == "done" else 0.0)
            process.exited.add_done_callback(lambda exited: self._metrics.exits.labels(str(exited.result())).inc())
        self._metrics.orphaned.inc(session.orphaned)
        await self._gateway.calls.settle(session, 0.0)
        await session.close()

    async def _open(self, ticket: Ticket) -> Session:
        """Open an attempt. Raises SessionLost and the errors of the environment's client."""
        conversation = Conversation(self._renderer)
        if self._agent.environment == "own":
            return Own(ticket, self._config, self._agent, conversation)
        client, env = client_of(self._environments, ticket), self._config.environment(ticket.task.env)
        if env.name not in self._forms:
            self._forms[env.name] = await action_form(client, self._config, env.name)
        first = await client.reset(
            ResetRequest(
                split=ticket.task.split,
                index=ticket.task.index,
                anchor=env.anchor,
                max_steps=min(env.max_steps, ticket.max_steps or env.max_steps),
                expert=self._stand_in is not None,
            )
        )
        if first.done:
            await client.close_session(first.session)
            raise EpisodeFailed("the environment ended before the first action")
        form = self._forms[env.name]
        session = Bound(ticket, self._config, self._agent, conversation, client=client, first=first, form=form)
        session.stand_in = self._stand_in and self._stand_in(session)
        return session

    async def _start_process(self, launcher: Launcher, session: Session, key: str) -> AgentProcess:
        """Start the agent. Raises AgentUnavailable: none can be started here."""
        try:
            return await launcher.launch(variables(session, self._listening.url, key))
        except OSError as error:
            raise EpisodeFailed(f"cannot start an agent process: {error.strerror or error}") from error

    async def _wait_for_service(self, session: Session, key: str) -> None:
        """Offer the attempt until a service takes it. Raises TicketReturned."""
        told = session.describe()
        offer = Offer(
            {
                "episode": told["episode"],
                "base_url": f"{self._listening.url}/v1",
                "api_key": key,
                **{name: told[name] for name in ("task", "goal", "state", "ends_at")},
            }
        )
        offers = self._gateway.offers
        offers.offer(offer)
        try:
            async with asyncio.timeout(self._agent.offer_s):
                await offer.taken.wait()
        except TimeoutError:
            raise TicketReturned(f"no service took the episode within {self._agent.offer_s:g} s") from None
        finally:
            if not offer.taken.is_set():
                offers.withdraw(offer)
        session.touch()

    async def _wait(self, session: Session, process: AgentProcess | None, deadline: float) -> None:
        """Wait until the attempt has ended; end it where its agent exits, sends nothing, or takes too long."""
        ended = asyncio.ensure_future(session.ended.wait())
        events: set[asyncio.Future[Any]] = {ended} if process is None else {ended, process.exited}
        try:
            while not session.ended.is_set():
                if process is not None and process.exited.done():
                    await asyncio.wait([ended], timeout=DRAIN_S)
                    _exited(session, process.exited.result())
                    return
                left = min(deadline - time.monotonic(), self._agent.idle_s - session.idle_s)
                if left <= 0:
                    session.finish("timeout" if time.monotonic() >= deadline else "idle")
                    return
                await asyncio.wait(events, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()

    def _outcome(self, session: Session, process: AgentProcess | None) -> Trajectory:
        """The trajectory of an ended attempt. Raises what is to be done where there is none."""
        cause = session.cause
        if cause in ("lost", "engine"):
            self._metrics.episodes.labels("lost", cause).inc()
            assert session.error is not None
            raise session.error
        problem = self._problem(session)
        if problem is not None:
            self._metrics.episodes.labels("failed", str(cause)).inc()
            words = masked(process.last_words()) if process is not None else ""
            raise EpisodeFailed(f"{problem}; its last output: {words}" if words else problem)
        code = process.exited.result() if process is not None and process.exited.done() else None
        # The learner sums them up: each is told once, by the next episode that is stored here.
        trajectory = session.trajectory(self._actor, {"exit": code, "failures": self._failures})
        self._failures = 0
        self._metrics.episodes.labels("stored", str(cause)).inc()
        self._metrics.stored(trajectory.steps)
        return trajectory

    def _problem(self, session: Session) -> str | None:
        """Why an attempt has no trajectory, in one line."""
        limits = {
            "timeout": f"the agent took longer than {self._config.rollout.episode_timeout_s:g} s "
            "(rollout.episode_timeout_s)",
            "idle": f"the agent sent nothing for {self._agent.idle_s:g} s (agent.idle_s)",
            "max_calls": f"the agent made more than {self._agent.max_calls} calls (agent.max_calls)",
            "crash": f"the agent crashed{_exit_text(session)}",
        }
        cause = str(session.cause)
        if cause == "failed":
            return session.reason
        if not session.record.playable:
            what = limits.get(cause, f"the agent ended{_exit_text(session)}")
            return f"{what} before it had the answer of a call that is trained on"
        if cause in limits and self._agent.on_stop == "fail":
            return limits[cause]
        return None


def variables(session: Session, url: str, key: str) -> dict[str, str]:
    """Environment variables that tell an agent process of its episode."""
    return {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": key,
        "ANCHORAGE_URL": url,
        "ANCHORAGE_TASK": json.dumps(session.ticket.task.model_dump()),
        "ANCHORAGE_GOAL": (session.goal or "").replace("\0", "")[:LONGEST_GOAL],
    }


def _exited(session: Session, code: int | None) -> None:
    """End an attempt whose agent process has exited."""
    session.exit_code = code
    if code is None:
        session.finish("lost", error=SessionLost("the process that forks agents was killed"))
    elif not isinstance(session, Own):
        session.finish("crash" if code else "gave_up")
    elif code:
        session.finish("crash")
    elif session.rewarded:
        session.finish("exit")
    else:
        session.finish("failed", f"the agent exited without a reward: {HOW_TO_REWARD}")


def _exit_text(session: Session) -> str:
    return "" if session.exit_code is None else f" (exit code {session.exit_code})"


def _after(session: Session) -> Refused:
    """What requests get after an attempt has ended."""
    if session.cause == "lost":
        return Refused(401, "invalid_api_key", "the environment lost the session: this attempt is over, stop")
    return episode_ended()
