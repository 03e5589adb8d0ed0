"""A light agent program, so that 32 of them fit on two cores: the standard library, one connection, one helper process.

It asks the policy for an action, tries the answer as one, and thinks for a moment in between, until the episode is
over. The helper stands for the tools that an agent runs beside itself.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from typing import Any
from urllib.parse import urlsplit

THINK_S = 0.4
TIMEOUT_S = 300.0
HELPER = ("sleep", "3600")


class World:
    """The gateway of the episode."""

    def __init__(self) -> None:
        address = urlsplit(os.environ["ANCHORAGE_URL"])
        self._link = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
        self._headers = {
            "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
            "Content-Type": "application/json",
        }

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The body of the response. SystemExit if it is a refusal."""
        self._link.request(method, path, None if body is None else json.dumps(body), self._headers)
        response = self._link.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        if response.status != 200:
            raise SystemExit(f"{path}: {response.status} {answer}")
        return answer


def main() -> None:
    subprocess.Popen(HELPER)
    world = World()
    state = world.ask("GET", "/episode")["state"]
    messages: list[dict[str, Any]] = []
    while not state["done"]:
        messages.append({"role": "user", "content": state["observation"]})
        answer = world.ask("POST", "/v1/chat/completions", {"model": "policy", "messages": messages})
        messages.append(answer["choices"][0]["message"])
        time.sleep(THINK_S)
        action = messages[-1].get("content") or "nothing"
        state = world.ask("POST", "/episode/step", {"action": action, "step": state["step"] + 1})


if __name__ == "__main__":
    main()
