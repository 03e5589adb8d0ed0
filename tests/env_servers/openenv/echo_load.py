"""Runs under a real OpenEnv: loads an echo server with OpenEnv's own client and prints its steps a second.

`sessions` sockets each wait for their answer; the first `warm` seconds are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

from openenv.core import GenericEnvClient

MESSAGE = "go to countertop 1"
ACTIONS: dict[str, dict[str, Any]] = {
    "plain": {"message": MESSAGE},
    "tools": {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": MESSAGE}},
}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(ACTIONS))
    parser.add_argument("url")
    parser.add_argument("--sessions", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm", type=float, default=2.0)
    options = parser.parse_args()
    action = ACTIONS[options.kind]
    steps = 0
    connected = 0
    everyone = asyncio.Event()
    began = 0.0

    async def play() -> None:
        nonlocal steps, connected, began
        async with GenericEnvClient(base_url=options.url, connect_timeout_s=60.0) as env:
            await env.reset()
            connected += 1
            if connected == options.sessions:
                began = time.monotonic() + options.warm
                everyone.set()
            await everyone.wait()
            while (now := time.monotonic()) < began + options.seconds:
                await env.step(action)
                steps += now >= began

    await asyncio.gather(*(play() for _ in range(options.sessions)))
    print(json.dumps({"steps": steps, "steps_per_s": steps / (time.monotonic() - began)}))


if __name__ == "__main__":
    asyncio.run(main())
