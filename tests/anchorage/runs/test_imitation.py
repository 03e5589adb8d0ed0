"""A warm start on the conversations of an agent program: real agent processes, the real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.engine.interface import Sample
from actors.gateway.player import AgentPlayer
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.imitation import ActionWriter
from actors.prompts import load_tokenizer
from actors.scripted import Example
from anchorage.checks.agent import agent_problems
from anchorage.runs import imitation, warmstart
from anchorage.runs.imitation import agent_rows
from env_servers.alfworld.environment import AlfWorld
from env_servers.clients.local import LocalClient
from learner.warmstart import train_tokenizer
from services.config import Config, load_config
from services.config.tree import WarmstartPhase
from services.errors import PreflightFailed
from services.schemas import Task, Ticket, Trajectory, VersionSpan
from tests.actors.gateway.scene import ACT

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "examples" / "agents" / "starter.yaml"
PHASE = WarmstartPhase(expert_share=1.0, noise=(0.0, 0.0))
SHAPE = [f"warmstart.{key}={value}" for key, value in {"hidden_size": 64, "intermediate_size": 32, "layers": 1}.items()]
SHAPE += ["warmstart.heads=2", "warmstart.kv_heads=2", "warmstart.batch_tokens=2000"]
Calls = dict[tuple[int, ...], list[int]]


def recipe(*overrides: str) -> Config:
    return load_config(RECIPE, [*SHAPE, *overrides])


def chat_tokenizer() -> Any:
    return train_tokenizer(["go to desk 1, take pen 2 from desk 1"] * 60, 400, chat=True)


def calls_of(row: Example) -> Calls:
    """The answers in a row, by their prompts."""
    calls: Calls = {}
    begins = [place for place, (a, b) in enumerate(itertools.pairwise(row.targets)) if b and not a]
    for place in begins:
        end = next((n for n in range(place + 1, len(row.targets)) if not row.targets[n]), len(row.targets))
        calls[tuple(row.tokens[: place + 1])] = row.tokens[place + 1 : end]
    return calls


@dataclass
class Repeats:
    """Answers each prompt as a scripted player has answered it."""

    answers: Mapping[tuple[int, ...], list[int]]

    async def generate(
        self, prompt_ids: Sequence[int], *, temperature: float, max_tokens: int, seed: int, stop: Sequence[str] = ()
    ) -> Sample:
        ids = self.answers[tuple(prompt_ids)]
        return Sample(ids, [-0.1] * len(ids), (VersionSpan(0, len(ids)),), "", True)


def test_the_rows_are_those_that_a_run_records_of_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "AT_ONCE", 2)
    config, tokenizer = recipe("model.max_prompt_tokens=8000"), chat_tokenizer()
    assert config.agent is not None
    tasks = [Task(env="alfworld", split="train", index=index) for index in (0, 3)]
    begun = ((task, random.Random(number)) for number, task in enumerate(itertools.cycle(tasks)))
    with contextlib.closing(agent_rows(config, config.agent, PHASE, begun, tokenizer)) as episodes:
        rows = [*itertools.islice(episodes, len(tasks))]
    # The expert's answers are all intended, so that what was labelled is what was written.
    answers: Calls = {}
    for (row,) in rows:
        answers |= calls_of(row)

    async def played() -> list[Trajectory]:
        assert config.agent is not None
        environments = {"alfworld": LocalClient(AlfWorld)}
        player = AgentPlayer("actor", config, config.agent, environments, Repeats(answers), tokenizer)
        await player.start()
        try:
            tickets = [Ticket(group=n, member=0, group_size=1, task=task, seed=1) for n, task in enumerate(tasks)]
            return await asyncio.gather(*(player.play(ticket) for ticket in tickets))
        finally:
            await player.close()

    for trajectory, (row,) in zip(asyncio.run(played()), rows, strict=True):
        assert '"cause": "done"' in json.dumps(trajectory.facts["agent"])
        recorded = {tuple(step.prompt_ids.tolist()): step.response_ids.tolist() for step in trajectory.steps}
        assert recorded == calls_of(row)
        assert all(step.valid for step in trajectory.steps)


def test_an_agent_whose_episodes_fail_ends_the_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitation, "AT_ONCE", 4)
    monkeypatch.setattr(imitation, "MOST_FAILURES", 3)
    script = tmp_path / "agent.py"
    script.write_text("raise SystemExit('no browser here')")
    config = recipe(f"agent.command=[python, {script}]", "agent.preload=[]")
    assert config.agent is not None
    begun = ((Task(env="alfworld", split="train", index=number), random.Random(number)) for number in itertools.count())
    with (
        contextlib.closing(agent_rows(config, config.agent, PHASE, begun, chat_tokenizer())) as episodes,
        pytest.raises(imitation.AgentPlaysNothing, match=r"4 episodes in a row failed.*no browser here"),
    ):
        next(episodes)


def test_what_cannot_play_against_a_scripted_player_is_refused(tmp_path: Path) -> None:
    config = recipe("agent.environment=own", "agent.command=null", "agent.preload=[]", "agent.service=true")
    with pytest.raises(PreflightFailed) as raised:
        warmstart.make_starter(config, tmp_path / "out", lambda tokens, loss: None)
    assert "requires agent.command" in str(raised.value)
    assert "requires agent.environment=bound" in str(raised.value)


def test_a_policy_is_made_that_its_agent_can_be_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmstart, "_TOKENIZER_AGENT_EPISODES", 12)
    monkeypatch.setattr(warmstart, "_TOKENIZER_EPISODES", 60)
    monkeypatch.setattr(imitation, "AT_ONCE", 4)
    phases = "[{tokens: 12000, episodes: 4, renumbered: 0.5}, {tokens: 4000, episodes: 4, own_play: 0.5}]"
    config = recipe(f"warmstart.phases={phases}")
    told: list[int] = []
    warmstart.make_starter(config, tmp_path / "made", lambda tokens, loss: told.append(tokens))
    assert told[-1] >= 16_000  # more than four episodes have: they are used again
    record = json.loads((tmp_path / "made" / "warmstart.json").read_text())
    assert [phase["phase"] for phase in record["phases"]] == [1, 2]

    assert config.agent is not None
    assert [*agent_problems(config.agent, [tmp_path / "made"])] == []
    renderer = Renderer(load_tokenizer(tmp_path / "made"))
    ids = ActionWriter(renderer).ids("go to drawer 1", json.dumps([ACT]))
    assert len(ids) <= 8
    reading = AnswerReader(renderer).read("", list(ids), finished=True, tools=[ACT])
    assert reading.valid
    assert reading.message.tool_calls[0].parsed() == {"action": "go to drawer 1"}
