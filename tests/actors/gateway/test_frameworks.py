"""LangGraph and the OpenAI Agents SDK, unmodified: the examples, plain and streamed, and agents of other shapes.

Each framework has a virtual environment of its own (`tests/agent_venvs.py`). The gateway, the harness and the
environment are real; a script is the policy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from actors.episode import EpisodeFailed
from services.schemas import Trajectory
from tests.actors.gateway.families import tokenizer, written
from tests.actors.gateway.programs import programs
from tests.agent_venvs import interpreter
from tests.processes import ROOT
from tests.tiers import long

pytestmark = [long, pytest.mark.timeout(2400)]

EXAMPLES = ROOT / "examples" / "agents"
EPISODES = 16
UP, DOWN = ("act", {"action": "up"}), ("act", {"action": "down"})


@dataclass(frozen=True)
class Framework:
    """One framework: the example's file, the pins of its packages, the modules to import once."""

    example: str
    requirements: str
    preload: tuple[str, ...]

    def python(self) -> str:
        return str(interpreter(EXAMPLES / self.requirements))


LANGGRAPH = Framework(
    "langgraph_react.py", "requirements-langgraph.txt", ("langchain.agents", "langchain_openai", "httpx")
)
AGENTS_SDK = Framework("agents_sdk.py", "requirements-agents-sdk.txt", ("agents", "httpx"))
BOTH = pytest.mark.parametrize("framework", [LANGGRAPH, AGENTS_SDK], ids=["langgraph", "agents-sdk"])


def says(*calls: tuple[str, dict[str, object]], content: str = "", family: str = "chatml") -> str:
    return written(family, "", content, calls)


def extended(played: list[Trajectory]) -> float:
    """Share of the later calls of the episodes whose prompts continue an earlier one."""
    later = [step.extends >= 0 for trajectory in played for step in trajectory.steps[1:]]
    return sum(later) / len(later)


@BOTH
@pytest.mark.parametrize("arguments", [[], ["--stream"]], ids=["plain", "streamed"])
async def test_an_example_plays_and_every_call_continues_the_one_before(
    tmp_path: Path, framework: Framework, arguments: list[str]
) -> None:
    command = [framework.python(), str(EXAMPLES / framework.example), *arguments]
    async with programs(tmp_path, command, lambda prompt: says(UP), preload=framework.preload) as agents:
        played = await agents.play(EPISODES)
    assert agents.codes() == {0}, agents.output()
    assert agents.output().strip() == ""
    assert [trajectory.facts["agent"]["cause"] for trajectory in played] == ["done"] * EPISODES
    assert all(trajectory.won and len(trajectory.steps) == 4 for trajectory in played)
    assert extended(played) == 1.0


def parallel(prompt: str) -> str:
    """Three calls in each answer, with a text before them."""
    return says(UP, DOWN, UP, content="Up, down and up.")


@BOTH
async def test_calls_of_one_answer_act_in_their_order(tmp_path: Path, framework: Framework) -> None:
    command = [framework.python(), str(EXAMPLES / framework.example)]
    async with programs(tmp_path, command, parallel) as agents:
        (trajectory,) = await agents.play(index=1)
    assert agents.codes() == {0}, agents.output()
    assert [step.action for step in trajectory.steps] == ["up\ndown\nup", "up\ndown\nup", "up"]
    assert [step.extends for step in trajectory.steps] == [-1, 0, 1]
    assert trajectory.won
    counts = [f"The count is {count}, the target is 3." for count in (1, 0, 1)]
    assert [line for line in trajectory.steps[1].observation.splitlines() if "count" in line] == counts


def mistaken(prompt: str) -> str:
    """A call without its argument, one of an unknown tool, then proper ones."""
    answers = prompt.count("<|im_start|>assistant\n") - 1
    return says([("act", {"wrong": 1}), ("fly", {"action": "up"}), UP][min(answers, 2)])


@BOTH
async def test_a_tool_that_answers_with_an_error_is_told_to_the_policy(tmp_path: Path, framework: Framework) -> None:
    """The error is read in the next prompt, in the same turn: nothing has happened in the environment."""
    command = [framework.python(), str(EXAMPLES / framework.example), "--stream"]
    async with programs(tmp_path, command, mistaken) as agents:
        (trajectory,) = await agents.play(index=0)
    assert agents.codes() == {0}, agents.output()
    assert [step.extends for step in trajectory.steps] == [-1, 0, 1, 2]
    assert [step.turn for step in trajectory.steps] == [0, 0, 0, 1]
    assert "rror" in trajectory.steps[1].observation
    assert "fly" in trajectory.steps[2].observation
    assert [step.valid for step in trajectory.steps] == [True, False, True, True]
    assert trajectory.won


def write(folder: Path, text: str) -> str:
    """A program in a file."""
    file = folder / "agent.py"
    file.write_text(dedent(text))
    return str(file)


SUB_AGENTS = """
    import os, httpx
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="policy", temperature=0)
    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    world = httpx.Client(base_url=os.environ["ANCHORAGE_URL"], headers=key, timeout=120)

    def look(thing: str) -> str:
        "Look at a thing."
        return f"You see {thing}."

    def scout(question: str) -> str:
        "Ask a scout."
        asked = {"messages": [{"role": "user", "content": question}]}
        return create_agent(model, [look], system_prompt="You are a scout.").invoke(asked)["messages"][-1].text

    def act(action: str) -> str:
        "Do one action."
        return world.post("/episode/step", json={"action": action}).json()["observation"]

    start = {"messages": [{"role": "user", "content": world.get("/episode").json()["state"]["observation"]}]}
    create_agent(model, [scout, act], system_prompt="You count.").invoke(start)
"""


def with_scouts(prompt: str) -> str:
    if "You are a scout" in prompt:
        return "It is fine." if "You see" in prompt else says(("look", {"thing": "a desk"}))
    last = prompt.rpartition("<|im_start|>user")[2]
    if "It is fine" in last:
        return says(UP)
    return says(("scout", {"question": "Left?"}), ("scout", {"question": "Right?"}))


async def test_sub_agents_at_once_are_calls_of_their_callers_turn(tmp_path: Path) -> None:
    command = [LANGGRAPH.python(), write(tmp_path, SUB_AGENTS)]
    async with programs(tmp_path, command, with_scouts) as agents:
        (trajectory,) = await agents.play(index=0)
    steps = trajectory.steps
    assert trajectory.won, agents.output()
    assert [step.turn for step in steps] == [0] * 6 + [1] * 6
    # Of each turn: the caller, two scouts that begin, two that have looked, the caller with their answers.
    assert sum(step.extends < 0 for step in steps) == 1 + 2 + 2
    assert (steps[5].extends, steps[6].extends, steps[11].extends) == (0, 5, 6)
    assert trajectory.facts["agent"]["imposed"] == ["temperature"]


SUMMARY = """
    import os, httpx
    from langchain.agents import create_agent
    from langchain.agents.middleware import SummarizationMiddleware
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    world = httpx.Client(base_url=os.environ["ANCHORAGE_URL"], headers=key, timeout=120)

    def act(action: str) -> str:
        "Do one action."
        return world.post("/episode/step", json={"action": action}).json()["observation"]

    try:
        ChatOpenAI(model="policy").invoke("word " * 3000)
    except ContextOverflowError:
        print("it is too long")
    frozen = ChatOpenAI(model="policy:frozen")
    summaries = SummarizationMiddleware(frozen, trigger=("messages", 6), keep=("messages", 2))
    agent = create_agent(ChatOpenAI(model="policy"), [act], middleware=[summaries])
    agent.invoke({"messages": [{"role": "user", "content": "Count."}]})
"""


def with_summaries(prompt: str) -> str:
    return says(UP) if "# Tools" in prompt else "You counted."


async def test_a_summary_begins_a_new_conversation_and_is_not_trained_on(tmp_path: Path) -> None:
    """LangChain knows a prompt that is too long by the text of the refusal: `openai` puts no code into it."""
    command = [LANGGRAPH.python(), write(tmp_path, SUMMARY)]
    async with programs(tmp_path, command, with_summaries) as agents:
        (trajectory,) = await agents.play(index=4)
    assert trajectory.won, agents.output()
    assert "it is too long" in agents.output()
    steps = trajectory.steps
    assert [step.trained for step in steps] == [True] * 3 + [False] + [True] * 2 + [False] + [True]
    assert [step.extends for step in steps] == [-1, 0, 1, -1, -1, 4, -1, -1]
    assert [step.turn for step in steps] == [0, 1, 2, -1, 3, 4, -1, 5]


HAND_OFFS = """
    import asyncio, os, httpx
    from agents import Agent, Runner, function_tool, set_default_openai_api, set_tracing_disabled

    set_default_openai_api("chat_completions")
    set_tracing_disabled(True)
    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    world = httpx.AsyncClient(base_url=os.environ["ANCHORAGE_URL"], headers=key, timeout=120)

    async def act(action: str) -> str:
        "Do one action."
        return (await world.post("/episode/step", json={"action": action})).json()["observation"]

    second = Agent(name="second", model="policy", instructions="You are the second.", tools=[function_tool(act)])
    first = Agent(name="first", model="policy", instructions="You are the first.", handoffs=[second])
    second.handoffs = [first]
    asyncio.run(Runner.run(first, "Count.", max_turns=None))
"""


def handing(prompt: str) -> str:
    if "You are the first" in prompt:
        return says(("transfer_to_second", {}), family="mistral")
    last = prompt.rpartition("[TOOL_RESULTS]")[2]
    return says(("transfer_to_first", {}) if "count" in last else UP, family="mistral")


async def test_agents_that_hand_over_and_a_policy_that_repeats_an_id(tmp_path: Path) -> None:
    """The policy gives all its calls one id. The SDK would never execute the second call with it."""
    command = [AGENTS_SDK.python(), write(tmp_path, HAND_OFFS)]
    async with programs(tmp_path, command, handing, family="mistral") as agents:
        (trajectory,) = await agents.play(index=1)
    assert trajectory.won, agents.output()
    steps = trajectory.steps
    assert [step.action for step in steps if step.reward] == ["up"]
    # Each agent has instructions of its own, so its first prompt is new; later ones continue its own calls.
    assert [step.extends for step in steps] == [-1, -1, 1, 0, 2, 4, 3, 5]
    last = tokenizer("mistral").decode(agents.sampler.prompts[-1])
    # Of seven results four belong to calls of its own; of the other agent's calls it knows the client's ids.
    assert (last.count("[TOOL_RESULTS]"), last.count('"call_id": "call00000"')) == (7, 4)


async def test_a_program_that_connects_elsewhere_is_noticed(tmp_path: Path) -> None:
    """As a framework would that sends traces: the tests above would fail."""
    program = write(tmp_path, "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)")
    async with programs(tmp_path, [sys.executable, program], with_summaries) as agents:
        with pytest.raises(EpisodeFailed, match=r"the agent connects to 192\.0\.2\.1"):
            await agents.play()


def test_without_a_package_index_the_tests_are_skipped(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a-package-that-no-index-has==1.0\n")
    with pytest.raises(pytest.skip.Exception, match="give pip a package index"):
        interpreter(requirements, "--no-index", kept=tmp_path / "kept")
