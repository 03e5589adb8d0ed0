"""Actions: passed on through Redis, answered, and written down whatever comes of them."""

import json
import threading
import time

import pytest
from starlette.testclient import TestClient

from learner.commands import Commands, NotDone
from services.buffer.commands import MAX_WAITING, Action, Command
from services.control.app import create_app
from tests.control_server import READ
from tests.waiting import until

WAIT_S = 30.0


def act(api, run, body, **headers):
    return api.post(f"/api/v1/runs/{run}/actions", json=body, headers=headers)


def audit(runs, run):
    path = runs / run / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_pause_reaches_the_trainer_and_its_answer_comes_back(api, live, run_name, runs):
    ended = threading.Event()
    commands = Commands(live, {}, ended.is_set)
    response = act(api, run_name, {"action": "pause"})
    assert response.status_code == 202
    asked = response.json()
    assert (asked["action"], asked["by"], asked["answer"]) == ("pause", "admin@testclient", None)
    thread = threading.Thread(target=commands.carry_out)
    thread.start()
    try:
        until(lambda: live.state() == "paused")
        until(lambda: api.get(f"/api/v1/runs/{run_name}").json()["state"] == "paused")
        assert act(api, run_name, {"action": "resume"}).status_code == 202
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert live.state() == "running"
    finally:
        ended.set()
        thread.join()
    until(lambda: [line["result"] for line in audit(runs, run_name)].count("done: running") == 1)
    lines = [line for line in audit(runs, run_name) if line["command"] == asked["id"]]
    assert [line["result"].split(":")[0] for line in lines] == ["passing to the run", "requested", "done"]
    newest = api.get(f"/api/v1/runs/{run_name}/commands").json()["commands"]
    assert [one["action"] for one in newest] == ["resume", "pause"]
    assert api.get(f"/api/v1/runs/{run_name}/audit").json()["entries"][0]["by"] == "admin@testclient"


def test_the_read_token_may_not_act_and_the_attempt_is_written_down(settings, live, run_name, runs):
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {READ}"}) as reader:
        assert act(reader, run_name, {"action": "stop"}).status_code == 403
    assert live.commands.all() == []
    (line,) = audit(runs, run_name)
    assert (line["by"], line["action"]) == ("read@testclient", "stop")
    assert line["result"].startswith("refused")


def test_a_finished_run_can_be_asked_nothing(api, runs):
    response = act(api, "finished", {"action": "evaluate"})
    assert response.status_code == 409
    assert "not live" in response.json()["detail"]
    assert [line["result"].split(":")[0] for line in audit(runs, "finished")] == ["refused"]


def test_scale_is_a_recorded_wish(api, live, run_name):
    assert act(api, run_name, {"action": "scale", "actors": 3}).status_code == 202
    assert live.desired_actors() == 3
    assert api.get(f"/api/v1/runs/{run_name}/actors").json()["wanted"] == 3
    (command,) = live.commands.all()
    assert command.answer is not None
    assert command.answer.done


@pytest.mark.parametrize(
    "body",
    [
        {"action": "explode"},
        {},
        {"action": "scale"},
        {"action": "pause", "actors": 1},
        {"action": "scale", "actors": -1},
    ],
)
def test_nonsense_is_refused(api, live, run_name, body):
    assert act(api, run_name, body).status_code == 422
    assert live.commands.all() == []


def test_too_many_waiting_commands_are_refused(api, live, run_name):
    for _ in range(MAX_WAITING):
        assert act(api, run_name, {"action": "checkpoint"}).status_code == 202
    assert act(api, run_name, {"action": "checkpoint"}).status_code == 409
    assert len(live.commands.waiting()) == MAX_WAITING


def test_what_cannot_be_written_down_is_not_done(api, live, run_name, runs):
    (runs / run_name / "audit.jsonl").mkdir()
    assert act(api, run_name, {"action": "pause"}).status_code == 503
    assert live.commands.all() == []


def test_a_run_that_is_gone_leaves_its_word_in_the_log(api, live, run_name, runs):
    act(api, run_name, {"action": "checkpoint"})
    live._call("delete", "state")
    until(lambda: audit(runs, run_name)[-1]["result"].startswith("no result"))


def test_the_trainer_does_what_it_is_asked(live):
    done = []

    def checkpoint():
        done.append("checkpoint")
        return "written"

    commands = Commands(live, {Action.CHECKPOINT: checkpoint}, lambda: False)
    request(live, "a", Action.CHECKPOINT)
    request(live, "b", Action.STOP)
    assert commands.waiting()
    commands.carry_out()
    assert done == ["checkpoint"]
    assert commands.stopped
    assert not commands.waiting()
    assert [c.answer.text for c in live.commands.all()] == ["written", "stopping after a checkpoint"]


def test_what_was_not_carried_to_its_end_is_not_done(api, live, run_name, runs):
    def cut_short():
        raise NotDone("the panel was cut short")

    commands = Commands(live, {Action.EVALUATE: cut_short}, lambda: False)
    assert act(api, run_name, {"action": "evaluate"}).status_code == 202
    commands.carry_out()
    (command,) = live.commands.all()
    assert not command.answer.done
    until(lambda: audit(runs, run_name)[-1]["result"] == "not done: the panel was cut short")


def test_what_was_asked_before_the_run_is_refused(live):
    request(live, "old", Action.STOP)
    commands = Commands(live, {}, lambda: False)
    commands.refuse_old()
    commands.carry_out()
    assert not commands.stopped
    (command,) = live.commands.all()
    assert not command.answer.done


def request(buffer, identity, action):
    assert buffer.commands.request(Command(id=identity, action=action, by="test", at=time.time()))
