"""Episodes that a run keeps go out to a file and come back equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anchorage
from anchorage.cli.main import main
from anchorage.runs import episodes
from anchorage.runs.episodes import EpisodesUnavailable, export_episodes
from services.archive import files, numbers_of, read_index, read_trajectory
from tests import needs
from tests.control_runs import GROUP_SIZE, make_finished

EPISODES = 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps 1,000 episodes in 125 files."""
    updates = EPISODES // (2 * GROUP_SIZE)
    return make_finished(tmp_path_factory.mktemp("runs"), updates=updates).run.folder


def parquet(suffix: str) -> Any:
    return pytest.param(suffix, marks=pytest.mark.skipif(not has_pyarrow(), reason=needs.PYARROW))


def has_pyarrow() -> bool:
    try:
        episodes._pyarrow()
    except EpisodesUnavailable:
        return False
    return True


@pytest.mark.parametrize("suffix", [".jsonl", parquet(".parquet")])
def test_a_thousand_episodes_come_back_equal(run: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"episodes{suffix}"
    assert anchorage.Run(run).export_episodes(file) == EPISODES
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    back = anchorage.read_episodes(file)
    count = 0
    for path in files(run):
        index = read_index(path)
        for group in index.groups:
            for member in group.members:
                assert_equal(next(back), index.update, group, member, path)
                count += 1
    assert count == EPISODES
    assert next(back, None) is None


def assert_equal(record: dict[str, Any], update: int, group: Any, member: Any, path: Path) -> None:
    """Against the archive itself: every field of the episode and of its steps, arrays bit by bit."""
    episode, numbers = read_trajectory(path, member), numbers_of(member)
    task = episode.ticket.task
    assert (record["update"], record["group"], record["member"]) == (update, group.group, member.member)
    assert (record["env"], record["split"], record["index"]) == (task.env, task.split, task.index)
    assert (record["seed"], record["temperature"]) == (episode.ticket.seed, episode.ticket.temperature)
    assert (record["won"], record["reward"], record["facts"]) == (episode.won, episode.reward, dict(episode.facts))
    assert (record["actor"], record["started_at"]) == (episode.actor, episode.started_at)
    assert len(record["steps"]) == len(episode.steps)
    for number, (row, step) in enumerate(zip(record["steps"], episode.steps, strict=True)):
        for name in ("anchor", "observation", "prompt", "response", "action", "reward", "valid", "terminated"):
            assert row[name] == getattr(step, name), name
        for name in ("truncated", "finished", "prompt_truncated"):
            assert row[name] == getattr(step, name), name
        for name in ("prompt_ids", "response_ids", "logprobs"):
            values = getattr(step, name)
            assert np.array(row[name], values.dtype).tobytes() == values.tobytes(), name
        assert [(s["version"], s["tokens"]) for s in row["versions"]] == [(s.version, s.tokens) for s in step.versions]
        trained = (numbers.returns, numbers.episode, numbers.step, numbers.total)
        for name, values in zip(("return", "episode_advantage", "step_advantage", "advantage"), trained, strict=True):
            assert row[name] == values[number], name
        assert (row["number"], row["step_group"]) == (number, numbers.step_group[number])


@pytest.mark.skipif(not has_pyarrow(), reason=needs.PYARROW)
def test_both_forms_hold_the_same(run: Path, tmp_path: Path) -> None:
    export_episodes(run, tmp_path / "a.jsonl")
    export_episodes(run, tmp_path / "a.parquet")
    pairs = zip(
        anchorage.read_episodes(tmp_path / "a.jsonl"), anchorage.read_episodes(tmp_path / "a.parquet"), strict=True
    )
    assert all(one == other for one, other in pairs)


def test_the_command_writes_the_file_and_refuses_what_it_cannot_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run), "--episodes", str(tmp_path / "out.jsonl")])
    assert capsys.readouterr().out == f"1000 episodes of {run} → {tmp_path / 'out.jsonl'}\n"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == EPISODES
    for arguments, code, line in (
        ([str(run)], 2, "give a folder for the policy, or --episodes FILE, or both"),
        ([str(run), "--episodes", "out.csv"], 1, "the file's name must end in .jsonl or .parquet, got out.csv"),
        ([str(tmp_path), "--episodes", "out.jsonl"], 1, "no run in"),
        ([str(run), "--episodes", str(tmp_path / "no" / "out.jsonl")], 1, "cannot write"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["export", *arguments])
        assert exit_.value.code == code
        assert line in capsys.readouterr().err


def test_a_missing_pyarrow_is_one_clear_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EpisodesUnavailable, match=r"Parquet needs pyarrow, .* pip install pyarrow, or .* \.jsonl"):
        export_episodes(run, tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_the_archive_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_finished(tmp_path, updates=3).run.folder
    files(folder)[1].write_bytes(b"damaged")
    assert export_episodes(folder, tmp_path / "out.jsonl") == 2 * 2 * GROUP_SIZE
    assert "skipped the rest of 000002.bin" in caplog.text
    assert {row["update"] for row in anchorage.read_episodes(tmp_path / "out.jsonl")} == {1, 3}


def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_finished(tmp_path, updates=1).run.folder
    (tmp_path / "out.jsonl").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(episodes.os, "fsync", full)
    with pytest.raises(EpisodesUnavailable, match=r"cannot write .*: No space left on device"):
        export_episodes(folder, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished", "out.jsonl"]


def test_what_is_no_file_of_episodes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text, reason in (
        (json.dumps({"schema": 99}), "has schema 99; this version reads 1"),
        ('{"schema": 1}\n{"sch', "line 2: invalid JSON"),
        ("[1]", "line 1: must be an object, got list"),
    ):
        file.write_text(text)
        with pytest.raises(EpisodesUnavailable, match=reason):
            list(anchorage.read_episodes(file))
    with pytest.raises(EpisodesUnavailable, match=r"cannot read .*: No such file or directory"):
        list(anchorage.read_episodes(tmp_path / "missing.jsonl"))


def test_a_run_without_groups_is_told(tmp_path: Path) -> None:
    folder = make_finished(tmp_path, updates=1).run.folder
    files(folder)[0].unlink()
    with pytest.raises(EpisodesUnavailable, match="keeps no groups"):
        export_episodes(folder, tmp_path / "out.jsonl")
