"""A whole run whose episodes an agent program plays: `examples/agents/react.py` on the real parts, on the CPU.

The policy is random, so what it writes is nonsense; the environment rewards the length of an action, so that members of
a group differ. What is checked is what the learner was given: prompts that continue one another, turns, exact
log-probabilities. The agent is then one that makes a frozen call and two calls at once, with sampling of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest

from services.archive import read_trajectory
from services.control.group_index import GroupIndex
from services.schemas import Trajectory
from tests.actors.gateway.families import tokenizer
from tests.processes import ROOT, Command
from tests.tiers import long

pytestmark = pytest.mark.timeout(1800)

ENVIRONMENT = """
    from env_servers.environment import Environment, Observation

    class Guess(Environment):
        name = "guess"
        version = "1"

        @classmethod
        def splits(cls):
            return {"train": 1000, "test": 10}

        def reset(self, split, index, *, expert=False):
            self.left = 3
            return self.observe(0.0, f"Guess {index}.")

        def step(self, action):
            self.left -= 1
            return self.observe(float(len(action) % 2), "Guess again.")

        def observe(self, reward, text):
            return Observation(
                text=f"{text} {self.left} left.", reward=reward, terminated=self.left == 0, facts={"goal": "guess"}
            )
"""
RECIPE = """
    run: {{name: agents, dir: {runs}}}
    model: {{path: {model}, max_prompt_tokens: 900, max_response_tokens: 16}}
    env: {{name: guess, implementation: ./guess.py:Guess, split: train}}
    agent: {{command: [python, {script}], preload: [openai, httpx]}}
    rollout: {{episodes_in_flight: 8, kv_cache_mib: 64, episode_timeout_s: 300}}
    learner: {{updates: 3, groups_per_update: 2, group_size: 4, packing: auto, group_timeout_s: 900}}
    optimizer: {{lr: 1.0e-3}}
    checkpoint: {{every: 3}}
    evaluation: {{split: test, episodes: 4}}
"""
BRANCHING = """
    import asyncio, json, os
    import httpx
    from openai import AsyncOpenAI

    async def main():
        key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
        model = AsyncOpenAI()
        create = model.chat.completions.create
        async with httpx.AsyncClient(base_url=os.environ["ANCHORAGE_URL"], headers=key, timeout=120) as world:
            state = (await world.get("/episode")).json()["state"]
            while not state["done"]:
                told = [{"role": "user", "content": state["observation"]}]
                sampling = {"temperature": 0, "top_p": 0.5, "stop": ["e"]}
                first, second = await asyncio.gather(
                    create(model="policy", messages=told, **sampling), create(model="policy", messages=told)
                )
                await create(model="policy:frozen", messages=[{"role": "user", "content": "Summarise."}])
                action = first.choices[0].message.content + second.choices[0].message.content
                state = (await world.post("/episode/step", json={"action": action})).json()

    asyncio.run(main())
"""


def write_policy(folder: Path, seed: int = 1) -> Path:
    """A tiny random model with a chat template that takes tools."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    words = tokenizer("chatml")
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def recipe(tmp_path: Path, script: str) -> Path:
    (tmp_path / "guess.py").write_text(dedent(ENVIRONMENT))
    file = tmp_path / "agents.yaml"
    model = write_policy(tmp_path / "policy")
    file.write_text(dedent(RECIPE.format(runs=tmp_path / "runs", model=model, script=script)))
    return file


def trained(folder: Path) -> list[Trajectory]:
    """The trajectories of all groups that were trained on."""
    index = GroupIndex(folder)
    found = [index.find(summary.group) for summary, _ in index.rows()]
    return [read_trajectory(one[0], member) for one in found if one is not None for member in one[2].members]


def run(file: Path, tmp_path: Path) -> list[Trajectory]:
    """Train; returns the trajectories that were trained on."""
    with Command(["train", str(file)]) as command:
        code, _, err = command.finish(1500)
        command.wait_until_gone()
    assert code == 0, err
    folder = tmp_path / "runs" / "agents"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    return trained(folder)


@long
def test_an_unmodified_agent_is_trained(tmp_path: Path) -> None:
    trajectories = run(recipe(tmp_path, str(ROOT / "examples" / "agents" / "react.py")), tmp_path)
    assert len(trajectories) == 24
    for trajectory in trajectories:
        assert len(trajectory.steps) == 3
        assert [step.extends for step in trajectory.steps] == [-1, 0, 1]
        assert trajectory.steps[-1].terminated
        assert trajectory.facts["agent"]["cause"] == "done"
    assert len({trajectory.reward for trajectory in trajectories}) > 1


@long
def test_turns_of_several_calls_and_sampling_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "branching.py"
    script.write_text(dedent(BRANCHING))
    trajectories = run(recipe(tmp_path, str(script)), tmp_path)
    for trajectory in trajectories:
        assert [step.turn for step in trajectory.steps] == [0, 0, -1, 1, 1, -1, 2, 2, -1]
        assert [step.trained for step in trajectory.steps] == [True, True, False] * 3
        assert trajectory.facts["agent"]["imposed"] == ["temperature", "top_p"]
        assert {span.version for step in trajectory.steps for span in step.versions} <= {0, 1, 2, 3}
