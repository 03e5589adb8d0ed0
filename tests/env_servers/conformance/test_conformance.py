"""The check finds each fault for what it is, and nothing in a server that is fit."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp

from env_servers.conformance import capacity as filling
from env_servers.conformance.__main__ import main
from env_servers.conformance.run import Options, Report, check_server
from env_servers.environment import Environment, Observation
from env_servers.server.app import create_app
from env_servers.server.settings import ServerSettings
from tests.env_servers.conformance import sloppy
from tests.env_servers.counting import Counting

QUICK = Options(tasks=3, steps=6, sessions=4, seconds=0.1)


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[str]:
    """A server in this process's loop, for as long as the block lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="websockets-sansio", lifespan="on"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


def app_of(environment: type[Environment], **options: Any) -> ASGIApp:
    return create_app(environment, ServerSettings(**{"token": None, "max_sessions": 64, **options}))


async def checked(app: ASGIApp, options: Options = QUICK, prefix: str = "") -> Report:
    async with running(app) as url:
        return await check_server(prefix + url, options=options)


def failed(report: Report) -> dict[str, str]:
    return {finding.check: finding.seen for finding in report.findings if finding.verdict == "fail"}


class Digestless(sloppy.Sound):
    """Gives no state digest."""

    def _observe(self, reward: float) -> Observation:
        return replace(super()._observe(reward), state="")


@pytest.mark.parametrize("environment", [sloppy.Sound, Digestless])
async def test_a_fit_server(environment: type[Environment]) -> None:
    report = await checked(app_of(environment, max_sessions=20))
    assert failed(report) == {}
    seen = {finding.check: finding.seen for finding in report.findings}
    assert list(seen) == [
        "deterministic", "isolated", "idempotent", "bounded", "clear errors", "honest endings", "anchors", "speed",
    ]  # fmt: skip
    assert "session 21 was refused (503 with Retry-After)" in seen["bounded"]
    assert ("by state: refused" in seen["anchors"]) == (environment is Digestless)


@pytest.mark.parametrize(
    ("most", "seconds", "text"),
    [
        (5000, 10.0, "back-pressure NOT CHECKED: max_sessions is 5,000, a check opens at most 4,096"),
        (600, 0.0, "back-pressure NOT CHECKED: only 0 of 600 sessions opened within 0 s"),
        (600, 10.0, "session 601 was refused (503 with Retry-After)"),
    ],
)
async def test_what_was_not_filled_is_not_called_checked(
    most: int, seconds: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "FILLING_S", seconds)
    report = await checked(app_of(sloppy.Sound, max_sessions=most))
    assert failed(report) == {}
    assert text in next(finding.seen for finding in report.findings if finding.check == "bounded")


async def test_an_openenv_server_is_checked_by_playing() -> None:
    report = await checked(app_of(sloppy.Sound), prefix="openenv+")
    assert failed(report) == {}
    checks = [finding.check for finding in report.findings]
    assert checks == ["deterministic", "isolated", "honest endings", "anchors", "speed"]


@pytest.mark.parametrize(
    ("environment", "check", "text"),
    [
        (sloppy.Moody, "deterministic", "played twice with the same actions: step 0: observation was"),
        (sloppy.Shared, "isolated", "beside 8 other sessions: step"),
        (sloppy.StateIsChance, "anchors", "anchors by state: step 0: anchor was"),
    ],
)
async def test_faults_of_environments(environment: type[Environment], check: str, text: str) -> None:
    assert text in failed(await checked(app_of(environment)))[check]


@pytest.mark.parametrize(
    ("twist", "check", "text"),
    [
        (sloppy.crashing, "clear errors", "an unknown split: expected status 400 or 404 or 422, got 500"),
        (sloppy.mumbling, "clear errors", "without a problem document"),
        (sloppy.chatty, "clear errors", "must be one line without a traceback"),
        (sloppy.confused, "honest endings", "has terminated=True and truncated=False; without the limit"),
        (sloppy.endless, "honest endings", "was taken although the episode ended with step"),
        (sloppy.forgetful(), "idempotent", "sent again, got another result"),
        (sloppy.permissive, "bounded", "an action of 4097 characters: expected status 400 or 413 or 422, got 200"),
        (
            sloppy.boastful,
            "bounded",
            "a reset with 21 sessions open (limit 20): expected 503 with Retry-After, got 200",
        ),
        (sloppy.unanchored, "anchors", "is not the observation's text"),
    ],
)
async def test_faults_of_servers(twist: Any, check: str, text: str) -> None:
    found = failed(await checked(sloppy.Twisted(twist)))
    assert text in found[check]


async def test_a_task_that_cannot_be_played() -> None:
    assert failed(await checked(app_of(Counting)))["deterministic"].endswith(
        "broken/0 cannot be reset: the task's file is damaged"
    )


async def test_a_server_that_is_too_slow() -> None:
    report = await checked(app_of(sloppy.Sound), Options(tasks=2, steps=2, seconds=0.05, least_steps_per_s=1e9))
    assert "below the minimum of" in failed(report)["speed"]


async def test_the_command_says_it_in_a_table_and_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--tasks", "2", "--steps", "3", "--seconds", "0.05", "--json", str(tmp_path / "report.json")]
    async with running(app_of(sloppy.Sound)) as url:
        assert await asyncio.to_thread(main, [url, *quick]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[:1].isalpha()][:3] == [
        "deterministic", "isolated", "idempotent",
    ]  # fmt: skip
    assert out.rstrip().endswith("fit for training")
    assert json.loads((tmp_path / "report.json").read_text())["fit"] is True

    async with running(app_of(sloppy.Moody)) as url:
        assert await asyncio.to_thread(main, [url, *quick]) == 1
    assert "NOT fit for training: deterministic" in capsys.readouterr().out
    assert await asyncio.to_thread(main, ["localhost"]) == 2
    assert capsys.readouterr().err.startswith("anchorage: ")


async def test_no_server_is_one_line(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, [f"http://127.0.0.1:{closed_port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is unavailable" in line


class Counter(sloppy.Sound):
    """Says how many actions were taken."""

    taken = 0

    def step(self, action: str) -> Observation:
        self.taken += 1
        return super().step(action)

    def _observe(self, reward: float) -> Observation:
        seen = super()._observe(reward)
        return replace(seen, text=f"Step {self.taken}. {seen.text}", terminated=False)


class History(Counter):
    """Shows all that happened."""

    told = ""

    def step(self, action: str) -> Observation:
        self.told += f"\n> {action}\n"
        return super().step(action)

    def _observe(self, reward: float) -> Observation:
        seen = super()._observe(reward)
        self.told += seen.text
        return replace(seen, text=self.told, state="")


class Terse(sloppy.Sound):
    """Tells nothing beside its texts, and takes no action of a check's."""

    def _observe(self, reward: float) -> Observation:
        return Observation("Well?", accepted=False)


def notes(report: Report) -> dict[str, tuple[str, str]]:
    return {note.check: (note.verdict, note.seen) for note in report.notes}


async def test_anchors_that_repeat() -> None:
    verdict, seen = notes(await checked(app_of(sloppy.Sound)))["repeats"]
    assert verdict == "ok"
    by_observation, by_state = (
        re.search(rf"by {kind}: of (\d+) steps, (\d+) .* (\d+) with one", seen) for kind in ("observation", "state")
    )
    for found in (by_observation, by_state):
        assert found is not None
        steps, shared, again = map(int, found.groups())
        assert steps >= shared >= again > steps / 2


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        (Counter, "a step counter or a time; env.anchor=state would help"),
        (History, "the observation holds the history; return the latest state only"),
    ],
)
async def test_anchors_that_never_repeat(environment: type[Environment], cause: str) -> None:
    report = await checked(app_of(environment), replace(QUICK, steps=12))
    verdict, seen = notes(report)["repeats"]
    assert verdict == "note"
    assert "0 with one at another step" in seen
    assert "GiGPO equals GRPO" in seen
    assert seen.endswith(cause)
    assert report.fit


async def test_missing_facts_are_told_with_what_they_cost() -> None:
    report = await checked(app_of(Terse))
    assert report.fit
    verdict, seen = notes(report)["facts"]
    assert verdict == "note"
    for missing in ("no won: success is", "no goal", "no task_type", "no admissible actions", "no state digests"):
        assert missing in seen
    assert notes(report)["actions"] == (
        "note",
        "0 of 18 were accepted; sent as written; at most 4,096 characters: "
        "little was checked; give valid actions with --action",
    )
    assert notes(await checked(app_of(sloppy.Sound)))["facts"][1].startswith("no goal")


async def test_a_task_that_cannot_be_played_leaves_its_notes_out() -> None:
    assert notes(await checked(app_of(Counting)))["facts"][1].startswith("not checked: broken/0")
