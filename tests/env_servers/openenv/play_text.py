"""Runs under a real OpenEnv: plays text environments over `/ws`, all sessions at once, and prints what it saw.

Session k has the seed `first_seed + k` and takes the admissible action number `k + steps taken`, modulo their number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from openenv.core import GenericEnvClient


async def play(url: str, seed: int, number: int, max_steps: int) -> list[dict[str, Any]]:
    async with GenericEnvClient(base_url=url) as env:
        result = await env.reset(seed=seed, max_steps=max_steps)
        seen = []
        while True:
            observation = dict(result.observation)
            seen.append({"observation": observation, "reward": result.reward, "done": result.done})
            if result.done:
                break
            choices = observation["admissible_actions"]
            result = await env.step({"action": choices[(number + observation["step"]) % len(choices)]})
        state = await env.state()
        seen.append({"state": {"step_count": state["step_count"], "index": state["index"]}})
        return seen


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=6)
    options = parser.parse_args()
    games = (
        play(url, options.first_seed + number, number, options.max_steps)
        for url in options.urls
        for number in range(options.sessions)
    )
    print(json.dumps(await asyncio.gather(*games)))


if __name__ == "__main__":
    asyncio.run(main())
