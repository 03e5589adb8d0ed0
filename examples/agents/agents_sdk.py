"""An agent of the OpenAI Agents SDK; it plays one episode. `--stream`: answers are streamed. docs/agents.md."""

import asyncio
import os
import sys
from typing import Any

import httpx
from agents import Agent, RunConfig, Runner, ToolExecutionConfig, function_tool, set_default_openai_api
from openai import BadRequestError

KEY = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
WORLD = httpx.AsyncClient(base_url=os.environ["ANCHORAGE_URL"], headers=KEY, timeout=120)
set_default_openai_api("chat_completions")  # before a RunConfig is made; URL and key are in the environment
SETTINGS = RunConfig(
    tracing_disabled=True,
    # One at a time: several calls of an answer act in the order in which they were written.
    tool_execution=ToolExecutionConfig(max_function_tool_concurrency=1),
    tool_not_found_behavior="return_error_to_model",
)


def told(state: dict[str, Any]) -> str:
    return f"{state['observation']}\nActions: {', '.join(state['admissible'] or [])}"


async def act(action: str) -> str:
    """Do one action."""
    reply = await WORLD.post("/episode/step", json={"action": action})
    return told(reply.json()) if reply.is_success else str(reply.json()["error"]["message"])


async def main() -> None:
    episode = (await WORLD.get("/episode")).json()
    task = f"Task: {episode['goal']}\n{told(episode['state'])}"
    agent = Agent(name="player", model="policy", tools=[function_tool(act)])
    try:
        if "--stream" in sys.argv:
            async for _ in Runner.run_streamed(agent, task, max_turns=None, run_config=SETTINGS).stream_events():
                pass
        else:
            await Runner.run(agent, task, max_turns=None, run_config=SETTINGS)
    except BadRequestError as error:
        if error.code != "episode_ended":  # so it is told that the environment has ended the episode
            raise


asyncio.run(main())
