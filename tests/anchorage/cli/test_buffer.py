"""`anchorage buffer inspect` and `anchorage pool scale` on a run with a Redis of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchorage.cli.main import app
from services.buffer import Buffer
from services.buffer.keys import NAMES, Keys
from services.buffer.owner import RECORD, Record
from services.config.tree import BufferConfig
from services.errors import AnchorageError, NoSuchRun, RedisUnavailable
from services.redis_server import EmbeddedRedis
from services.schemas import Task, Ticket, Trajectory

SIZE = 3


@pytest.fixture
def buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffer]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    with EmbeddedRedis(folder / "redis") as server:
        buffer = Buffer.connect(server.url, "mine", BufferConfig(), max_attempts=2)
        yield buffer
        buffer.close()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def group(number: int) -> list[Ticket]:
    task = Task(env="e", split="train", index=0)
    return [Ticket(group=number, member=m, group_size=SIZE, task=task, seed=m) for m in range(SIZE)]


def test_inspect_shows_what_is_where(buffer: Buffer, tmp_path: Path) -> None:
    buffer.issue([ticket for number in range(3) for ticket in group(number)])
    for ticket in buffer.lease("actor-1", SIZE, 60.0):
        buffer.store(Trajectory(ticket, ()))
    buffer.lease("actor-2", 2, 60.0)
    buffer.fail("actor-2", "train/1/0", "for the test")
    buffer.cancel("train", 2, "no such game")
    found = json.loads(run("buffer", "inspect", "--json", "--dir", str(tmp_path)))
    assert (found["run"], found["queued"], found["leased"]) == ("mine", 2, 1)
    assert [g["state"] for g in found["groups"]] == ["complete", "open", "cancelled"]
    assert [t["place"] for t in found["groups"][0]["tickets"]] == ["stored"] * SIZE
    assert found["groups"][0]["nbytes"] == found["trajectory_bytes"] > 0
    places = [(t["place"], t["holder"], t["attempts"]) for t in found["groups"][1]["tickets"]]
    assert places == [("waiting", None, 1), ("leased", "actor-2", 0), ("waiting", None, 0)]
    assert 50 < found["groups"][1]["tickets"][1]["lease_s"] <= 60
    assert (found["groups"][2]["reason"], found["groups"][2]["tickets"]) == ("no such game", [])
    text = run("buffer", "inspect", "mine", "--dir", str(tmp_path))
    assert "actor-2: 1" in text
    assert "no such game" in text


def test_texts_of_others_are_no_markup(buffer: Buffer, tmp_path: Path) -> None:
    """Neither a MarkupError nor a word that is gone."""
    text = "[/x] [red]a[/red] :smile:"
    (tmp_path / "mine" / "config.yaml").write_text("run: {name: mine}")
    record = RECORD.dump_json(dataclasses.replace(Record.here(60.0), host=text)).decode()
    assert buffer.take(None, "unique", "lineage", record) is not None
    buffer.issue([ticket for number in range(2) for ticket in group(number)])
    buffer.cancel("train", 0, text)
    buffer.lease(text, SIZE, 60.0)
    buffer.heartbeat(text, {"state": text}, 60.0)
    buffer.set_state(text)
    inspected = run("buffer", "inspect", "mine", "--dir", str(tmp_path))
    assert f"owned by {text} (process" in " ".join(inspected.split())
    folded = "".join(inspected.split())
    assert folded.count("[/x]") == 3
    assert folded.count(":smile:") == 3
    status = "".join(run("status", str(tmp_path / "mine")).split())
    assert status.count("[/x][red]a[/red]:smile:") >= 2


def test_scale_is_a_wish_in_redis(buffer: Buffer, tmp_path: Path) -> None:
    run("pool", "scale", "3", "mine", "--dir", str(tmp_path))
    assert buffer.desired_actors() == 3
    run("pool", "scale", "all", "--dir", str(tmp_path))
    assert buffer.desired_actors() is None


def test_a_run_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(NoSuchRun, match="no run in"):
        run("buffer", "inspect", "--dir", str(tmp_path))
    with pytest.raises(NoSuchRun, match=r"no run in .*nothing"):
        run("buffer", "inspect", "nothing", "--dir", str(tmp_path))
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "config.yaml").write_text("")
    with pytest.raises(RedisUnavailable, match="the Redis of run ended is not running"):
        run("buffer", "inspect", "ended", "--dir", str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_key_is_one_line_for_every_command_that_looks(buffer: Buffer, tmp_path: Path, name: str) -> None:
    """Two types at least: one of them is not the key's own."""
    buffer.set_state("running")
    commands = [
        ["buffer", "inspect", "mine", "--dir", str(tmp_path)],
        ["buffer", "inspect", "--json", "--dir", str(tmp_path)],
        ["pool", "scale", "2", "mine", "--dir", str(tmp_path)],
        ["pool", "scale", "all", "mine", "--dir", str(tmp_path)],
        ["status", str(tmp_path / "mine")],
        ["status", "--json", str(tmp_path / "mine")],
    ]
    key = Keys("mine")[name]
    for put in (lambda: buffer._client.set(key, b"\xff"), lambda: buffer._client.rpush(key, b"\xff")):
        for command in commands:
            buffer._client.delete(key)
            put()
            result = CliRunner().invoke(app, command)
            if result.exit_code:
                assert isinstance(result.exception, AnchorageError), result.exception
                assert key in str(result.exception)
                assert "\n" not in str(result.exception)
    buffer._client.delete(key)


def test_status_says_what_is_wrong_with_the_runs_data(buffer: Buffer, tmp_path: Path) -> None:
    buffer.set_state("running")
    buffer._client.set(Keys("mine")["queue"], "foreign")
    (tmp_path / "mine" / "config.yaml").write_text("run: {name: mine}")
    found = json.loads(run("status", "--json", str(tmp_path / "mine")))
    assert found["run"]["state"] == "ended"
    assert "Redis key anchorage:{mine}:queue is a string, but a run keeps a zset there" in found["run"]["note"]
