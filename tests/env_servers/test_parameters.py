"""Parameters of an environment: declared, validated, bound to a class, and given to a server."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel

from env_servers.__main__ import main
from env_servers.environment import Environment
from env_servers.errors import ServerError
from env_servers.parameters import with_params
from env_servers.registry import load_environment
from tests.env_servers.counting import TASKS, Counting, Sized
from tests.env_servers.launching import launch

SIZED = "tests.env_servers.counting:Sized"


class Required(Sized):
    class Params(Sized.Params):
        word: str


def test_the_validated_parameters_are_those_of_the_class_and_of_its_sessions() -> None:
    found = load_environment(SIZED, {"tasks": 7, "stride": "2"})
    assert issubclass(found, Sized)
    assert (found.splits(), found.about()["fingerprint"]) == ({"train": 7}, '{"tasks":7,"stride":2}')
    game = found()
    game.reset("train", 0)
    assert game.step("up").terminated
    assert (found.__module__, found.__qualname__, found.name) == (Sized.__module__, "Sized", "sized")
    assert Sized.splits() == {"train": TASKS}


def test_without_parameters_it_is_the_class_with_the_defaults() -> None:
    assert load_environment(SIZED, {}) is load_environment(SIZED) is Sized
    assert Sized.params == Sized.Params()
    assert with_params(Counting, {}) is Counting


def test_equal_parameters_give_the_same_class() -> None:
    assert with_params(Sized, {"tasks": 3, "stride": 2}) is with_params(Sized, {"stride": 2, "tasks": 3})
    assert with_params(Sized, {"tasks": 3}) is not with_params(Sized, {"tasks": 4})


def test_required_parameters_are_required() -> None:
    for params in ({}, {"tasks": 3}):
        with pytest.raises(ServerError, match=r"^invalid parameters of environment sized: word: Field required$"):
            with_params(Required, params)
    assert with_params(Required, {"word": "a"}).params.word == "a"


def test_a_model_is_a_pydantic_model() -> None:
    with pytest.raises(TypeError, match=r"Odd\.Params must be a pydantic model"):
        type("Odd", (Counting,), {"Params": dict})


def test_a_model_that_allows_others_gets_others() -> None:
    open_model = type("Open", (BaseModel,), {"model_config": {"extra": "allow"}})
    found = with_params(type("Lax", (Counting,), {"Params": open_model}), {"anything": [1]})
    assert found.params.anything == [1]


@pytest.mark.parametrize(
    ("environment", "params", "line"),
    [
        (Sized, {"task": 3}, "environment sized has no parameter 'task', did you mean tasks?"),
        (Sized, {"tasks": 0}, "invalid parameters of environment sized: tasks: Input should be greater than or equal"),
        (
            Counting,
            {"tasks": 3},
            "environment counting takes no parameters (its class declares no `Params`), got tasks",
        ),
    ],
)
def test_what_is_wrong_is_one_line(environment: type[Environment], params: dict[str, object], line: str) -> None:
    with pytest.raises(ServerError) as caught:
        with_params(environment, params)
    assert str(caught.value).startswith(line)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"tasks": "many"}',
            "anchorage: invalid parameters of environment sized: tasks: Input should be a valid integer",
        ),
        ('{"taks": 3}', "anchorage: environment sized has no parameter 'taks', did you mean tasks?"),
        ("tasks=3", "argument --params: invalid JSON: "),
        ("[3]", "argument --params: must be a JSON object, got [3]"),
    ],
)
def test_a_server_refuses_them_in_one_line(text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([SIZED, "--params", text])
    except SystemExit as ended:
        code = ended.code
    (told,) = capsys.readouterr().err.splitlines()
    assert (code, line in told) == (2, True), told


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_process_of_a_server_has_them(tmp_path: Path, workers: str) -> None:
    params = json.dumps({"tasks": 7, "stride": 2})
    with (
        launch(tmp_path / "ready", SIZED, "--params", params, "--workers", workers) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        info = client.get("/info").json()
        assert (info["splits"], info["fingerprint"]) == ({"train": 7}, '{"tasks":7,"stride":2}')
        opened = [client.post("/reset", json={"split": "train", "index": 0}).json()["session"] for _ in range(4)]
        for session in opened:
            body = {"session": session, "step": 1, "action": "up"}
            assert client.post("/step", json=body).json()["terminated"]
        assert len({session.partition(".")[0] for session in opened if "." in session}) == (2 if workers == "2" else 0)
