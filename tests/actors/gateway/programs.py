"""Agent programs that play the counting environment: the real harness and gateway; a script says what the policy does.

A program is run by `GUARD`, which ends it where it connects to anything but the gateway: telemetry of a framework would
be noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.engine.interface import Sample
from actors.gateway.player import AgentPlayer
from actors.harness.command import AgentProcess
from env_servers.clients.local import LocalClient
from services.schemas import Trajectory, VersionSpan
from tests.actors.gateway.families import stop, tokenizer
from tests.actors.gateway.scene import TOKEN, Telling, agent_config, ticket_of
from tests.env_servers.counting import Counting

AT_ONCE = 4
GUARD = """
import os, runpy, sys

def watch(event, arguments):
    place = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.connect": 1, "socket.sendto": 1}.get(event)
    if place is None:
        return
    host = arguments[place][0] if isinstance(arguments[place], tuple) else arguments[place]
    if host not in ("127.0.0.1", b"127.0.0.1"):
        os.write(2, f"the agent connects to {host}\\n".encode())
        os._exit(99)

sys.addaudithook(watch)
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Scripted(Telling):
    """A sampler whose answers are those of a script, a function of the prompt's text."""

    script: Callable[[str], str] = lambda prompt: ""
    family: str = "chatml"

    async def generate(self, prompt_ids: Sequence[int], **settings: Any) -> Sample:
        self.told.append(self.script(tokenizer(self.family).decode(list(prompt_ids), skip_special_tokens=False)))
        return await super().generate(prompt_ids, **settings)

    def _sample(self, number: int, text: str, max_tokens: int, stops: Sequence[str]) -> Sample:
        words = tokenizer(self.family)
        ids = [*words.encode(text, add_special_tokens=False), words.convert_tokens_to_ids(stop(self.family, True))]
        self.answers[number] = ids
        return Sample(ids, [-0.5] * len(ids), (VersionSpan(self.version, len(ids)),), text, True, None)


@dataclass
class Programs:
    """Plays episodes of one program.

    Attributes:
        ended: the processes of the episodes so far.
    """

    player: AgentPlayer
    sampler: Scripted
    ended: list[AgentProcess] = field(default_factory=list)

    async def play(self, episodes: int = 1, *, index: int = 2) -> list[Trajectory]:
        """Play episodes in which one counts to `index + 2`; returns when their processes have exited."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(member: int) -> Trajectory:
            async with room:
                return await self.player.play(ticket_of(member, index))

        played = await asyncio.gather(*map(one, range(episodes)))
        await asyncio.wait([process.exited for process in self.ended], timeout=120)
        return played

    def output(self) -> str:
        """What the programs wrote."""
        return "\n".join(process.output() for process in self.ended)

    def codes(self) -> set[int | None]:
        """Exit codes of the programs."""
        return {process.exited.result() for process in self.ended}


@asynccontextmanager
async def programs(
    folder: Path,
    command: Sequence[str],
    script: Callable[[str], str],
    *,
    family: str = "chatml",
    **agent: Any,
) -> AsyncIterator[Programs]:
    """A player of one program.

    Args:
        folder: for files.
        command: interpreter, program, arguments.
        script: what the policy answers to a prompt's text.
        family: of the chat template.
        agent: further keys of the section `agent`.
    """
    guard = folder / "guard.py"
    guard.write_text(GUARD)
    python, *program = command
    settings = agent_config(folder, command=[python, str(guard), *program], **agent)
    sampler, client = Scripted(script=script, family=family), LocalClient(Counting)
    environments = {"counting": client}
    player = AgentPlayer("actor-1", settings.config, settings.agent, environments, sampler, tokenizer(family), TOKEN)
    made = Programs(player, sampler)
    launcher = player._launcher
    assert launcher is not None
    launch = launcher.launch

    async def noted(variables: Any) -> AgentProcess:
        process = await launch(variables)
        made.ended.append(process)
        return process

    launcher.launch = noted  # type: ignore[method-assign]
    await player.start()
    try:
        yield made
    finally:
        await player.close()
        await client.close()
