"""The real OpenEnv clients and validators, from their packages, against servers of ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from env_servers.clients.local import LocalClient
from env_servers.launch import ServerProcess
from env_servers.protocol import ResetRequest, StepResult
from env_servers.registry import ENVIRONMENTS, load_environment
from tests.env_servers.openenv.conftest import run_under

SESSIONS = 4
MAX_STEPS = 6
FIRST_SEED = 2
QUICK = [name for name in ENVIRONMENTS if not name.endswith("-textworld")]


async def transcript(environment: str, seed: int, number: int) -> list[dict[str, Any]]:
    """What `play_text.py` should have seen, from the same sessions without a network."""
    factory = load_environment(environment)
    split, size = next(iter(factory.splits().items()))
    client = LocalClient(factory)
    request = ResetRequest(split=split, index=seed % size, max_steps=MAX_STEPS)
    result = await client.reset(request)
    seen = [expected(request, result)]
    while not result.done:
        choices = result.admissible or []
        result = await client.step(result.session, result.step + 1, choices[(number + result.step) % len(choices)])
        seen.append(expected(request, result))
    await client.close()
    return [*seen, {"state": {"step_count": result.step, "index": request.index}}]


def expected(request: ResetRequest, result: StepResult) -> dict[str, Any]:
    facts = result.facts
    observation = {
        "text": result.observation,
        "task": facts.get("goal") or f"{request.split}/{request.index}",
        "split": request.split,
        "index": request.index,
        "step": result.step,
        "admissible_actions": result.admissible,
        "anchor": result.anchor,
        "terminated": result.terminated,
        "truncated": result.truncated,
        "won": facts.get("won"),
        "score": facts.get("score"),
        "task_type": facts.get("task_type"),
        "expert_action": None,
        "facts": facts,
    }
    return {"observation": observation, "reward": result.reward, "done": result.done}


async def test_several_sessions_of_several_servers_at_once(openenv: str, serve: Callable[..., ServerProcess]) -> None:
    environments = [*QUICK, "tests.env_servers.counting:Counting"]
    urls = [serve(environment).url for environment in environments]
    options = ("--sessions", str(SESSIONS), "--first-seed", str(FIRST_SEED), "--max-steps", str(MAX_STEPS))
    played = run_under(openenv, "play_text.py", *urls, *options)
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout) == [
        await transcript(environment, FIRST_SEED + number, number)
        for environment in environments
        for number in range(SESSIONS)
    ]


COMMAND = """
import json, sys
from openenv.cli.__main__ import app
from typer.testing import CliRunner
results = [CliRunner().invoke(app, ["validate", "--url", url, "--json"]) for url in sys.argv[1:]]
print(json.dumps([(result.exit_code, result.stdout) for result in results]))
"""


def test_the_validator_passes(openenv_10: str, serve: Callable[..., ServerProcess]) -> None:
    urls = [serve(environment).url for environment in QUICK]
    done = subprocess.run([openenv_10, "-c", COMMAND, *urls], capture_output=True, text=True, timeout=120, check=True)
    answers = json.loads(done.stdout)
    assert len(answers) == len(QUICK)
    for code, output in answers:
        report = json.loads(output)
        assert (code, report["passed"], report["mode"]) == (0, True, "simulation")
        assert (report["standard_profile"], report["summary"]["failed_criteria"]) == ("openenv-http/1.x", [])


OLD_VALIDATOR = """
import json, sys
from openenv.cli._validation import validate_running_environment
print(json.dumps([validate_running_environment(url) for url in sys.argv[1:]]))
"""


def test_the_old_validator_passes_too(openenv_03: str, serve: Callable[..., ServerProcess]) -> None:
    urls = [serve(environment).url for environment in QUICK]
    command = [openenv_03, "-c", OLD_VALIDATOR, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    reports = json.loads(done.stdout)
    assert [(r["passed"], r["summary"]["failed_criteria"]) for r in reports] == [(True, [])] * len(QUICK)
