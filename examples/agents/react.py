"""A ReAct agent with one tool; it plays one episode. docs/agents.md trains it."""

import asyncio
import json
import os
from typing import Any

import httpx
from openai import AsyncOpenAI

PARAMETERS = {"type": "object", "properties": {"action": {"type": "string"}}, "required": ["action"]}
ACT: Any = {"type": "function", "function": {"name": "act", "description": "Do one action.", "parameters": PARAMETERS}}


def told(state: dict[str, Any]) -> str:
    return f"{state['observation']}\nActions: {', '.join(state['admissible'] or [])}"


async def main() -> None:
    key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    world = httpx.AsyncClient(base_url=os.environ["ANCHORAGE_URL"], headers=key, timeout=120)
    async with AsyncOpenAI() as model, world:
        episode = (await world.get("/episode")).json()
        messages: list[Any] = [{"role": "user", "content": f"Task: {episode['goal']}\n{told(episode['state'])}"}]
        while True:
            reply = await model.chat.completions.create(model="policy", messages=messages, tools=[ACT])
            answer: Any = reply.choices[0].message
            messages.append(answer.model_dump(exclude_none=True))
            for call in answer.tool_calls or [None]:  # a text without a call is tried as an action
                action = json.loads(call.function.arguments).get("action") if call else answer.content
                body = {"action": str(action or "")}
                state = (await world.post("/episode/step", json=body)).json()
                if state.get("done", True):
                    return
                to = {"role": "tool", "tool_call_id": call.id} if call else {"role": "user"}
                messages.append({**to, "content": told(state)})


asyncio.run(main())
