"""Every mistake of a user's: one clear line, an exit code, nothing left running."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

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


def test_unknown_key(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "learner.group_sice=8", *run])
    assert (code, line) == (2, "anchorage: unknown configuration key 'learner.group_sice'")


def test_value_out_of_range(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "learner.zero_stage=7", *run])
    assert code == 2
    assert "learner.zero_stage" in line


def test_missing_recipe() -> None:
    code, line = fail(["train", "configs/nothing.yaml"])
    assert code == 2
    assert "configs/nothing.yaml" in line


def test_missing_model_folder(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "model.path=/no/such/model", *run])
    assert code == 1
    assert "/no/such/model" in line


def test_environment_server_down(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "env.url=http://127.0.0.1:9", *run])
    assert code == 1
    assert "http://127.0.0.1:9" in line


def test_a_wrong_address_is_told_without_its_password(run: list[str]) -> None:
    both = ["env.url=http://me:hidden@a:1", "env.urls=[http://me:hidden@b:2]"]
    code, line = fail(["train", DEMO, *both, *run])
    assert code == 2
    assert "give url or urls, not both" in line
    assert "http://a:1" in line
    assert "hidden" not in line


def test_redis_down(run: list[str]) -> None:
    code, line = fail(["train", DEMO, "buffer.redis_url=redis://:hidden@127.0.0.1:9", "buffer.reconnect_s=1", *run])
    assert code == 1
    assert "127.0.0.1:9" in line
    assert "hidden" not in line


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
    assert "taken" in line


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


def test_nothing_to_resume_is_a_new_run_refused_where_one_exists(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "mistake" / "checkpoints" / "000002").mkdir(parents=True)
    (tmp_path / "mistake" / "checkpoints" / "000002" / "state.json").write_text("{}")
    code, line = fail(["train", DEMO, *run])
    assert code == 1
    assert "resume" in line
