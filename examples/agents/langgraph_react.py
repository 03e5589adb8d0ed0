"""A ReAct agent of LangGraph with one tool; it plays one episode. `--stream`: answers are streamed. docs/agents.md."""

import os
import sys
from typing import Any

import httpx
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from openai import BadRequestError

KEY = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
WORLD = httpx.Client(base_url=os.environ["ANCHORAGE_URL"], headers=KEY, timeout=120)


def told(state: dict[str, Any]) -> str:
    return f"{state['observation']}\nActions: {', '.join(state['admissible'] or [])}"


def act(action: str) -> str:
    """Do one action."""
    reply = WORLD.post("/episode/step", json={"action": action})
    return told(reply.json()) if reply.is_success else str(reply.json()["error"]["message"])


def main() -> None:
    episode = WORLD.get("/episode").json()
    model = ChatOpenAI(model="policy", streaming="--stream" in sys.argv)  # URL and key are in the environment
    agent = create_agent(model, [act])
    task = {"role": "user", "content": f"Task: {episode['goal']}\n{told(episode['state'])}"}
    try:
        # One at a time: several calls of an answer act in the order in which they were written.
        agent.invoke({"messages": [task]}, {"max_concurrency": 1})
    except BadRequestError as error:
        if error.code != "episode_ended":  # so it is told that the environment has ended the episode
            raise


main()
