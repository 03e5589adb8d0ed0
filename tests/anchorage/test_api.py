"""The Python API without a training: configuration, a run's folder as rows, baselines, environments of one's own."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest

import anchorage
from anchorage.rows import Rows
from anchorage.runs import environments
from env_servers.registry import ENVIRONMENTS
from services.archive import files, numbers_of, read_index
from services.config.tree import EnvConfig
from tests import needs
from tests.control_runs import GROUP_SIZE, UPDATES, make_finished

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def test_every_name_is_there_and_importing_the_package_imports_nothing_heavy() -> None:
    for name in anchorage.__all__:
        assert getattr(anchorage, name) is not None
    assert set(anchorage.__all__) <= set(dir(anchorage))
    assert anchorage.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = anchorage.trian
    code = "import sys, anchorage; print([m for m in ('torch', 'ray', 'vllm', 'pydantic', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"


def test_overrides_are_texts_or_mappings_and_the_last_one_wins() -> None:
    config = anchorage.load_config(
        DEMO, "learner.updates=5", {"learner": {"updates": 7, "group_size": 4}, "run.name": "mine"}, "run.seed=3"
    )
    assert (config.learner.updates, config.learner.group_size, config.learner.groups_per_update) == (7, 4, 8)
    assert (config.run.name, config.run.seed, config.run.minutes) == ("mine", 3, 9)
    tree = {"algorithm": "dapo", "learner": {"updates": 2}}
    of_mapping = anchorage.load_config(tree, {"loss.clip_high": 0.3})
    assert (of_mapping.loss.clip_high, of_mapping.loss.aggregation, of_mapping.learner.updates) == (0.3, "token", 2)
    assert tree == {"algorithm": "dapo", "learner": {"updates": 2}}
    assert anchorage.load_config().algorithm == "gigpo"


def test_mistakes_of_a_configuration_are_one_error() -> None:
    with pytest.raises(anchorage.ConfigError) as caught:
        anchorage.load_config(DEMO, {"learner.grup_size": 3, "loss": {"clip_low": -1}, "run.name.x": 1})
    assert sorted(str(caught.value).splitlines()) == [
        "learner.grup_size: unknown key, did you mean learner.group_size?",
        "loss.clip_low: must be >= 0.0, got -1",
        "run.name.x: run.name is 'demo', not a section",
    ]
    assert isinstance(caught.value, anchorage.AnchorageError)


@pytest.fixture
def run(tmp_path: Path) -> anchorage.Run:
    return anchorage.Run(make_finished(tmp_path).run.folder)


def test_the_figures_of_a_run_are_rows(run: anchorage.Run) -> None:
    assert (run.name, run.updates, run.config.learner.group_size) == ("finished", UPDATES, GROUP_SIZE)
    metrics = run.metrics()
    assert metrics.column("step") == [0, *range(1, UPDATES + 1), UPDATES]
    assert metrics[1]["rollout/success_rate"] is not None
    evaluations = run.evaluations()
    assert evaluations.column("update") == [0, UPDATES]
    assert all(0 <= row["success_low"] <= row["success_rate"] <= row["success_high"] <= 1 for row in evaluations)
    episodes, groups = run.episodes(), run.groups()
    assert len(episodes) == 2 * UPDATES * GROUP_SIZE
    assert groups.column("group") == list(range(2 * UPDATES))
    assert episodes.column("group") == [group for group in range(2 * UPDATES) for _ in range(GROUP_SIZE)]
    assert (episodes[0]["env"], episodes[0]["split"], episodes[0]["index"]) == ("alfworld", "train", 0)


def test_a_group_has_the_numbers_that_were_trained_with(run: anchorage.Run) -> None:
    group = run.group(3)
    assert (group.group, group.update, group.index) == (3, 2, 3)
    entry = read_index(files(run.folder)[1]).groups[1]
    for member in entry.members:
        numbers = numbers_of(member)
        steps = [step for step in group.steps if step["member"] == member.member]
        for column, values in (
            ("return", numbers.returns),
            ("episode_advantage", numbers.episode),
            ("step_advantage", numbers.step),
            ("advantage", numbers.total),
        ):
            assert np.array_equal([step[column] for step in steps], values), column
    assert len({step["advantage"] for step in group.steps}) > 1
    sizes = {row["state"]: row["size"] for row in group.step_groups}
    anchors = {row["state"]: row["anchor"] for row in group.step_groups}
    assert sum(sizes.values()) == len(group.steps)
    assert all(
        (step["step_group_size"], step["anchor"]) == (sizes[step["state"]], anchors[step["state"]])
        for step in group.steps
    )
    assert sum(row["count"] for row in group.actions) == len(group.steps)
    assert group.episodes.column("member") == list(range(GROUP_SIZE))


def test_what_is_not_there_is_one_clear_line(run: anchorage.Run, tmp_path: Path) -> None:
    with pytest.raises(anchorage.NoSuchGroup, match=r"group 99 is not kept .*: it keeps 12 groups from 0 to 11"):
        run.group(99)
    with pytest.raises(anchorage.AnchorageError, match="no run in"):
        anchorage.Run(tmp_path / "nothing")
    with pytest.raises(anchorage.AnchorageError, match="damaged"):
        run.policy()  # its checkpoint has a state and nothing else
    with pytest.raises(anchorage.AnchorageError, match="no run to resume"):
        anchorage.train(anchorage.load_config(DEMO, {"run.dir": tmp_path, "run.name": "new"}), resume=True)


def test_frames_are_made_by_the_library_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows([{"a": 1, "b": 0.5}, {"a": 2, "c": [3]}])
    assert rows.columns == ["a", "b", "c"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(anchorage.FramesUnavailable, match="pandas is not installed: pip install pandas"):
        rows.to_pandas()
    with pytest.raises(anchorage.FramesUnavailable, match="polars is not installed"):
        rows.frame("polars")


def test_pandas_frames() -> None:
    pytest.importorskip("pandas", reason=needs.PANDAS)
    frame = Rows([{"a": 1, "b": 0.5}, {"a": 2, "c": [3]}]).frame("pandas")
    assert list(frame.columns) == ["a", "b", "c"]
    assert frame["a"].tolist() == [1, 2]
    assert frame["b"].isna().tolist() == [False, True]


def test_polars_frames() -> None:
    pytest.importorskip("polars", reason=needs.POLARS)
    frame = Rows([{"a": 1, "b": 1}, {"a": 2, "b": 0.5, "c": [3]}]).frame("polars")
    assert frame.columns == ["a", "b", "c"]
    assert frame["b"].to_list() == [1.0, 0.5]
    assert frame["c"].to_list() == [None, [3]]


def test_baselines_in_a_notebook_off_the_main_thread(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where a loop runs already, in a thread that may install no signal handler; nothing is printed."""
    config = anchorage.load_config(DEMO, {"run.dir": tmp_path, "evaluation.episodes": 6, "env.max_steps": 30})
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
    found: list[anchorage.Evaluations] = []
    told: list[anchorage.Progress] = []

    async def cell() -> None:
        found.append(anchorage.evaluate(config, ["expert", "random"], on_progress=told.append))

    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    (results,) = found
    assert results["expert"].success.value > results["random"].success.value
    rows = results.rows()
    assert (rows.column("policy"), rows.column("episodes")) == (["expert", "random"], [6, 6])
    assert {(report.stage, report.title) for report in told} == {("evaluation", "expert"), ("evaluation", "random")}
    assert [report.done for report in told if report.title == "expert"] == [1, 2, 3, 4, 5, 6]
    after = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
    assert after == before
    assert capfd.readouterr() == ("", "")


def test_a_stop_ends_an_evaluation_and_leaves_out_the_policies_after_it(tmp_path: Path) -> None:
    config = anchorage.load_config(DEMO, {"run.dir": tmp_path, "evaluation.episodes": 60, "env.max_steps": 5})
    told: list[anchorage.Progress] = []
    results = anchorage.evaluate(
        config, ["random", "expert"], on_progress=told.append, should_stop=lambda: len(told) >= 3
    )
    assert list(results) == ["random"]
    assert not results["random"].complete
    assert 3 <= results["random"].success.episodes < 60
    with pytest.raises(ZeroDivisionError):  # what a call-back raises ends the evaluation
        anchorage.evaluate(config, "random", on_progress=lambda progress: 1 / 0)


MODULE = """
from env_servers.environment import Environment, Observation


class Coin(Environment):
    name = "coin"

    @classmethod
    def splits(cls):
        return {"train": 4, "test": 2}

    def reset(self, split, index, *, expert=False):
        return Observation("heads or tails?", admissible=("heads", "tails"))

    def step(self, action):
        return Observation("over", float(action == "heads"), terminated=True, facts={"won": action == "heads"})
"""


def test_an_environment_of_ones_own_is_served_from_wherever_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "coin_environment.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    from coin_environment import Coin  # type: ignore[import-not-found]

    try:
        anchorage.register("coin", Coin)
        anchorage.register("coin", "coin_environment:Coin")  # once more changes nothing
        env = EnvConfig(name="coin")
        with environments.serve(env, tmp_path, port=0) as server:
            assert environments.info_of(env, [server.url]).splits == {"train": 4, "test": 2}
    finally:
        ENVIRONMENTS.pop("coin", None)


def test_what_is_no_environment_is_refused() -> None:
    class Local(anchorage.Environment):  # type: ignore[misc]
        name = "local"

    Local.__module__ = "__main__"
    with pytest.raises(anchorage.AnchorageError, match=r"script or a notebook, .* move the class into a module"):
        anchorage.register("local", Local)
    with pytest.raises(anchorage.AnchorageError, match="already exists"):
        anchorage.register("alfworld", "mine:Env")
    with pytest.raises(anchorage.AnchorageError, match="has the name 'counting', not 'other'"):
        anchorage.register("other", "tests.env_servers.counting:Counting")
    with pytest.raises(anchorage.AnchorageError, match="cannot load environment"):
        anchorage.register("mine", "no_such_module:Env")
    assert set(ENVIRONMENTS) == {"alfworld", "alfworld-textworld", "webshop"}
