"""Every mistake of a user's: one clear line, an exit code, nothing left running."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis

from anchorage.cli.main import main
from env_servers.__main__ import main as serve_environment
from services.buffer import Buffer
from services.buffer.owner import take
from services.config.tree import BufferConfig
from services.redis_server import EmbeddedRedis
from services.schemas import Task, Ticket
from tests.control_runs import make_finished
from tests.processes import Command

DEMO = "configs/demo.yaml"


def fail(arguments: list[str], environment: dict[str, str] | None = None, timeout_s: float = 300) -> tuple[int, str]:
    """Exit code and the one line of standard error that is not a log record."""
    with Command(arguments, environment) as command:
        code, _, err = command.finish(timeout_s)
        command.wait_until_gone()
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert len(lines) == 1, err
    return code, lines[0]


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    return [f"run.dir={tmp_path}", "run.name=mistake"]


def test_all_mistakes_of_a_configuration(run: list[str]) -> None:
    with Command(["train", DEMO, "learner.group_sice=8", "learner.zero_stage=7", *run]) as command:
        code, _, err = command.finish(300)
        command.wait_until_gone()
    assert code == 2
    assert sorted(err.splitlines()) == [
        "anchorage: learner.group_sice: unknown key, did you mean learner.group_size?",
        "anchorage: learner.zero_stage: must be one of 0, 1, 2, 3, got 7",
    ]


def test_environment_server_down(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "env.url=http://127.0.0.1:9", *run])
    assert code == 1
    assert "http://127.0.0.1:9" in line


def test_a_wrong_address_is_told_without_its_password(run: list[str]) -> None:
    both = ["env.url=http://me:hidden@a:1", "env.urls=[http://me:hidden@b:2]"]
    code, line = fail(["train", DEMO, *both, *run])
    assert code == 2
    assert line == "anchorage: env: give url or urls, not both"


def test_redis_down(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "buffer.redis_url=redis://:hidden@127.0.0.1:9", "buffer.reconnect_s=1", *run])
    assert code == 1
    assert "127.0.0.1:9" in line
    assert "hidden" not in line


def test_a_redis_that_evicts(run: list[str], tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "foreign") as server, Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 4 * 2**30)
        client.config_set("maxmemory-policy", "allkeys-lru")
        code, line = fail(["train", DEMO, f"buffer.redis_url={server.url}", *run])
        assert client.keys() == []
    assert code == 1
    assert "has maxmemory-policy allkeys-lru" in line


@pytest.mark.parametrize(("command", "name"), [("train", "mistake"), ("eval", "mistake-eval")])
def test_a_name_in_use_on_the_same_redis(
    run: list[str], tmp_path: Path, redis_url: str, command: str, name: str
) -> None:
    """Another folder, as of a second user of a recipe: the lock of the folder cannot see it."""
    buffer = Buffer.connect(redis_url, name, BufferConfig())
    buffer.own(take(buffer, name, "other", 600.0))
    buffer.set_state("running")
    buffer.issue([Ticket(group=0, member=0, group_size=1, task=Task(env="e", split="s", index=0), seed=0)])
    before = buffer.contents()
    code, line = fail([command, DEMO, *run], {"REDIS_URL": redis_url})
    assert code == 1
    assert re.match(rf"anchorage: run {name} is in use by \S+ \(process {os.getpid()}\) since 20\d\d-", line)
    assert (buffer.contents(), buffer.state()) == (before, "running")
    assert not (tmp_path / name / "config.yaml").exists()
    buffer.release_owner()
    buffer.close()


def test_folder_without_games(run: list[str], tmp_path: Path) -> None:
    code, line = fail(["train", DEMO, *run], {"ALFWORLD_DATA": str(tmp_path)})
    assert code == 1
    assert "no ALFWorld games" in line


def test_broken_game_file(run: list[str], tmp_path: Path) -> None:
    for split in ("train", "valid_unseen"):
        trial = tmp_path / "data" / "json_2.1.1" / split / "task" / "trial"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(json.dumps({"pddl_domain": "", "grammar": ""}))
    small = ["evaluation.episodes=2", "rollout.max_attempts=1"]
    code, line = fail(["eval", DEMO, *small, *run], {"ALFWORLD_DATA": str(tmp_path / "data")})
    assert code == 1
    assert "not an ALFWorld game file" in line


def test_port_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = fail(["env", "serve", "alfworld", "--port", str(port)])
    assert code == 2
    assert str(port) in line
    assert "in use" in line


def test_a_file_that_cannot_be_written_is_told_before_anything_is_played(run: list[str], tmp_path: Path) -> None:
    for option in ("--json", "--markdown"):
        missing = tmp_path / "missing" / "figures"
        code, line = fail(
            ["eval", DEMO, "--policy", "random", option, str(missing), "evaluation.episodes=100000", *run]
        )
        assert code == 1
        assert line == f"anchorage: cannot write {missing}: No such file or directory"


def test_a_report_that_cannot_be_written_is_told_before_it_is_drawn(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_finished(tmp_path, name)
    (tmp_path / "two" / "report.html").mkdir()
    code, line = fail(["report", str(tmp_path / "one"), str(tmp_path / "two")])
    assert code == 1
    assert line.startswith("anchorage: cannot write ")
    assert not (tmp_path / "one" / "report.html").exists()


def test_a_path_is_printed_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "[bold]a folder whose name is long enough to be folded where lines are eighty columns wide"
    make_finished(folder, "finished")
    with Command(["report", str(folder / "finished")]) as command:
        code, out, _ = command.finish(120)
    assert (code, out) == (0, f"{folder / 'finished' / 'report.html'}\n")


def test_run_in_use(run: list[str], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "mistake").mkdir()
    with (tmp_path / "mistake" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, line = fail(["train", DEMO, *run])
    assert code == 1
    assert "in use" in line


def test_a_new_run_is_refused_where_one_exists(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "mistake" / "checkpoints" / "000002").mkdir(parents=True)
    code, line = fail(["train", DEMO, *run])
    assert code == 1
    assert "resume" in line


def test_checkpoints_that_are_all_damaged_are_told_before_anything_starts(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("000008", "000009"):  # beside those that the run has, without a manifest
        (folders / "finished" / "checkpoints" / version).mkdir()
    with pytest.raises(SystemExit):
        main(["train", DEMO, f"run.dir={folders}", "run.name=finished", "--resume", "model.path=/nope"])
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"no intact checkpoint in .*; .*000009 is damaged: manifest\.json is missing", line)


def test_a_run_that_does_not_exist_is_not_resumed(run: list[str], tmp_path: Path) -> None:
    make_finished(tmp_path, "mistook")
    code, line = fail(["train", DEMO, "--resume", *run])
    assert code == 1
    assert line.startswith(f"anchorage: no run to resume in {tmp_path}/mistake, did you mean mistook?")
    assert not (tmp_path / "mistake").exists()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Things that are not what a command wants, and a run and a model that are almost."""
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    # A command sets up logging for its process; here it must not stay.
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("listed", "- 1"), ("odd", "learner: {updatse: 3}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    make_finished(tmp_path, "finished")
    model = shutil.copytree("models/starter", tmp_path / "model")
    (model / "warmstart.json").write_text('{"phases": [1]}')
    return tmp_path


# Arguments, with {} for the folder above; exit code; what the lines must hold, one entry a line.
MISTAKES: list[tuple[str, int, list[str]]] = [
    ("trian", 2, ["No such command 'trian'. Did you mean 'train'?"]),
    ("train", 2, ["Missing argument 'recipe'"]),
    ("train configs/demo.yaml --no-such", 2, ["No such option: --no-such"]),
    ("train configs/demo.yaml --resume=aut", 2, ["'aut' is not one of"]),
    ("train configs/dmo.yaml", 2, ["did you mean configs/demo.yaml?"]),
    ("train dmo", 2, ["cannot read the recipe dmo: "]),
    ("train learner.updates=3 configs/demo.yaml", 2, ["give the recipe before the overrides"]),
    ("train run.dir={}", 2, ["give the recipe before the overrides"]),
    ("train {}", 2, ["Is a directory"]),
    ("train {}/broken/config.yaml", 2, ["broken/config.yaml: invalid YAML: line "]),
    ("train configs/demo.yaml learner.updates", 2, ["'learner.updates': invalid override"]),
    ("train configs/demo.yaml model.path={}/file", 1, ["{}/file is not a folder"]),
    ("train configs/demo.yaml run.dir={}/file", 1, ["{}/file is a file (run.dir"]),
    ("train configs/demo.yaml run.dir={} --resume", 1, ["no run to resume in {}/demo"]),
    (
        "train configs/demo.yaml run.dir={} --resume=auto env.name=alfwrld model.path=/nope",
        1,
        ["model.path /nope", "unknown environment 'alfwrld' (env.name), did you mean alfworld?"],
    ),
    ("train configs/demo.yaml run.dir={} env.split=trian", 1, ["no tasks in split 'trian'"]),
    ("train configs/demo.yaml run.dir={} evaluation.split=vald", 1, ["no tasks in split 'vald'"]),
    ("demo foo", 2, ["'foo': invalid override"]),
    ("demo model.path={}/empty", 1, ["holds no config.json"]),
    ("demo run.dir={}/file", 1, ["{}/file is a file (run.dir"]),
    ("demo run.dir={} optimizer.lr=inf run.seed=-1", 2, ["run.seed: must be >= 0", "optimizer.lr: must be a finite"]),
    ("warmstart", 2, ["Missing argument 'out'"]),
    ("warmstart {}/out configs/starter.yaml env.name=foo", 1, ["unknown environment 'foo'"]),
    ("warmstart {}/file configs/starter.yaml", 1, ["cannot write {}/file"]),
    ("warmstart {}/out configs/starter.yaml --start {}/nothing", 1, ["{}/nothing is not a folder"]),
    (
        "warmstart {}/out configs/starter.yaml --start {}/model --first-phase 99",
        1,
        ["--first-phase must be <= ", "cannot read {}/model/warmstart.json"],
    ),
    ("warmstart {}/out configs/starter.yaml warmstart.heads=3", 1, ["must be a multiple of warmstart.heads"]),
    ("warmstart {}/out configs/starter.yaml warmstart.hidden_size=64 warmstart.heads=4", 1, ["heads = 16"]),
    ("eval model.path={}/nothing", 2, ["{}/nothing is no run"]),
    ("eval --policy {}/nothing", 2, ["{}/nothing is no run"]),
    ("eval --policy {}/broken", 2, ["broken/config.yaml: invalid YAML"]),
    ("eval --policy {}/odd", 2, ["did you mean learner.updates?"]),
    (
        "eval configs/demo.yaml --policy randm",
        1,
        ["no such policy: randm is neither a folder, a baseline (random, expert) nor api:NAME, did you mean random?"],
    ),
    ("eval configs/demo.yaml --policy {}/empty", 1, ["holds no config.json"]),
    ("eval configs/demo.yaml --policy random --episodes 0", 2, ["evaluation.episodes: must be >= 1, got 0"]),
    ("eval configs/demo.yaml --policy random --temperature nan", 2, ["evaluation.temperature: must be a finite"]),
    ("eval configs/demo.yaml --policy random --env nothing run.dir={}", 1, ["unknown environment 'nothing'"]),
    ("eval configs/demo.yaml --policy random --split nothing run.dir={}", 1, ["no tasks in split 'nothing'"]),
    ("eval configs/demo.yaml --policy random --json {}/no/x", 1, ["cannot write {}/no/x"]),
    ("export {}/nothing {}/out", 1, ["neither a checkpoint nor a run"]),
    ("export {}/file {}/out", 1, ["neither a checkpoint nor a run"]),
    ("export {}/finished {}/out --best", 1, ["holds no best policy"]),
    ("report", 2, ["Missing argument 'runs'"]),
    ("report {}/nothing", 1, ["no run in {}/nothing"]),
    ("report {}/finishd", 1, ["did you mean finished?"]),
    ("report {}/broken", 2, ["broken/config.yaml: invalid YAML"]),
    ("report {}/file", 1, ["no run in {}/file"]),
    ("report {}/finished --picture {}/no/x.png", 1, ["cannot write {}/no/x.png"]),
    ("status {}/nothing", 1, ["no run in {}/nothing"]),
    ("status {}/listed", 2, ["must be a mapping of sections, got a list"]),
    ("status {}/file", 1, ["no run in {}/file"]),
    ("control {}/nothing", 1, ["{}/nothing"]),
    ("control {}/file", 1, ["{}/file"]),
    ("control {} --port 0 --ready-file {}/no/x", 1, ["cannot write {}/no/x"]),
    ("control {} --port 99999", 2, ["Invalid value for '--port'"]),
    ("control {} --host 0.0.0.0", 1, ["requires a token"]),
    ("buffer inspect --dir {}/empty", 1, ["no run in {}/empty"]),
    ("buffer inspect finishd --dir {}", 1, ["did you mean finished?"]),
    ("buffer inspect broken --dir {}", 2, ["broken/config.yaml: invalid YAML"]),
    ("buffer inspect ../x --dir {}", 1, ["no run in ../x"]),
    ("buffer inspect {}/finishd", 1, ["did you mean finished?"]),
    ("buffer inspect .x --dir {}", 1, ["invalid run name: '.x'"]),
    ("pool scale", 2, ["Missing argument 'actors'"]),
    ("pool scale many", 2, ["got 'many'"]),
    ("pool scale -- -1", 2, ["got '-1'"]),
    ("pool scale 99999999999999999999 finished --dir {}", 2, ["must be `all` or a number from 0 to"]),
    ("pool scale 3 nothing --dir {}", 1, ["no run in {}/nothing"]),
]


@pytest.mark.parametrize(("arguments", "code", "wanted"), MISTAKES, ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_its_lines_and_an_exit_code(
    arguments: str, code: int, wanted: list[str], folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command as the console script calls it, in this process."""
    before = {path for path in folders.rglob("*") if path.name != "run.lock"}
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(SystemExit) as ended:
        main(arguments.replace("{}", str(folders)).split())
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == code, said
    assert len(said) == len(wanted), said
    for line, part in zip(said, wanted, strict=True):
        assert line.startswith("anchorage: ")
        assert part.replace("{}", str(folders)) in line
    assert {path for path in folders.rglob("*") if path.name != "run.lock"} == before
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("serve", "the following arguments are required"),
        ("serve nothing", "unknown environment 'nothing'"),
        ("serve no.such:Thing", "cannot load environment"),
        ("serve json:loads", "is not a class derived from Environment"),
        ("serve alfworld --port x", "argument --port: invalid int value: 'x'"),
        ("serve alfworld --port 70000", "port"),
        ("serve alfworld --workers 0", "workers"),
        ("serve alfworld --host 999.1.1.1", "999.1.1.1"),
        ("serve alfworld --port 0 --ready-file {}/no/x", "cannot write {}/no/x"),
        ("serve alfworld --port 0 --workers 2 --ready-file {}/no/x", "cannot write {}/no/x"),
        ("check", "the following arguments are required: url"),
        ("check nonsense", "'nonsense'"),
        ("check http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("check http://127.0.0.1:9 --tasks 0", "argument --tasks: must be >= 1, got 0"),
        ("check http://127.0.0.1:9 --seconds nan", "argument --seconds: must be > 0"),
        ("check http://127.0.0.1:9 --json {}/no/x", "cannot write {}/no/x"),
        ("new", "the following arguments are required: name"),
        ("new 1", "'1'"),
        ("new class", "'class'"),
        ("new rock --in {}/file", "cannot write {}/file/rock"),
    ],
)
def test_a_mistake_about_environments_is_one_line(
    arguments: str, wanted: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _environments(arguments.replace("{}", str(folders)).split())
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert wanted.replace("{}", str(folders)) in line


def _environments(words: list[str]) -> None:
    """`anchorage env WORDS` in this process. `serve` becomes another program, whose own function is called."""
    if words[0] == "serve":
        sys.exit(serve_environment(words[1:], "anchorage env serve"))
    main(["env", *words])
