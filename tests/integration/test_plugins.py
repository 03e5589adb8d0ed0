"""A run whose algorithm, template, parser, loss and tracker come from outside, on the real parts; it is resumed too.

The package and the files lie beside the recipe, outside of the repository, and are installed nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from learner.advantages import ESTIMATORS, AdvantageConfig
from learner.prepare import step_rows
from services.archive import numbers_of, read_trajectory
from services.control.group_index import GroupIndex
from services.run_folder import run_config
from tests.processes import ROOT, Command
from tests.tiers import long

pytestmark = pytest.mark.timeout(1800)

PACKAGE = """
    import numpy as np
    from learner.advantages import AdvantageConfig, Advantages, StepRows, episode_scores, moments
    from pydantic import BaseModel

    class Params(BaseModel):
        alpha: float = 1.0

    def scaled(rows: StepRows, config: AdvantageConfig, params: Params) -> Advantages:
        scores = episode_scores(rows)
        total = params.alpha * (scores - moments(scores, rows.group).row_mean) - 0.01 * rows.step
        return Advantages(episode=total, step=np.zeros(len(rows)), total=total)
"""
FILES = """
    from actors.parsing import ParsedAction
    from learner.rank.losses import TokenLosses

    class Terminal:
        def __init__(self, params):
            self.greeting = params["greeting"]

        def opening(self, goal, observation):
            return f"{self.greeting}\\n{goal}\\n{' '.join(observation.split())}\\n>"

        def observation(self, observation):
            return f"\\n{' '.join(observation.split())}\\n>"

    def shouted(response, admissible, form):
        return ParsedAction(response.strip(), bool(response.strip()))

    def reinforce(batch, config, params):
        loss = -batch.advantage * (batch.logprob - batch.behaviour).exp()
        return TokenLosses(loss, {"of_mine": batch.logprob.exp()}, ("of_mine",))

    class Lines:
        def __init__(self, run):
            self.path = run.folder / "lines.jsonl"

        def write(self, step, scalars):
            import json
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **scalars}) + "\\n")

        def close(self):
            pass
"""
RECIPE = """
    extends: {root}/configs/demo.yaml
    algorithm: house_rules.advantages:scaled
    run: {{name: own, dir: {runs}}}
    env: {{max_steps: 8}}
    prompt:
      template: ./files.py:Terminal
      parser: ./files.py:shouted
      params: {{greeting: "Welcome to the house."}}
    advantage: {{params: {{alpha: 0.5}}}}
    loss: {{function: ./files.py:reinforce}}
    learner: {{updates: 2, groups_per_update: 2, group_size: 4}}
    checkpoint: {{every: 1}}
    telemetry: {{trackers: [./files.py:Lines]}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "house_rules").mkdir()
    (folder / "house_rules" / "__init__.py").touch()
    (folder / "house_rules" / "advantages.py").write_text(dedent(PACKAGE))
    (folder / "files.py").write_text(dedent(FILES))
    (folder / "own.yaml").write_text(dedent(RECIPE.format(root=ROOT, runs=folder / "runs")))
    return folder / "own.yaml"


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """The run's folder after two updates."""
    with Command(["train", str(recipe)]) as command:
        code, _, err = command.finish(1200)
    assert code == 0, err
    return recipe.parent / "runs" / "own"


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


def test_each_door_leads_to_what_is_outside(trained: Path) -> None:
    assert [line["step"] for line in lines(trained)][:2] == [1, 2]  # the tracker, in the trainer
    for record in lines(trained)[:2]:
        assert 0 < record["loss/of_mine"] <= record["loss/of_mine_max"] <= 1  # the loss, in the rank
    described = json.loads((trained / "algorithm.json").read_text())
    assert (described["title"], described["parameters"]) == ("scaled", {"alpha": 0.5})
    config = run_config(trained)
    rows = list(GroupIndex(trained).rows())
    assert rows
    for summary, _ in rows:
        found = GroupIndex(trained).find(summary.group)
        assert found is not None
        path, _, entry = found
        group = [read_trajectory(path, member) for member in entry.members]
        for trajectory in group:  # template and parser, in the actor
            assert trajectory.steps[0].prompt.startswith("Welcome to the house.\n")
            assert all(step.action == step.response.strip() for step in trajectory.steps)
        plain = ESTIMATORS["grpo"](
            step_rows([group], config), AdvantageConfig(normalisation="mean", invalid_action_penalty=0.0)
        )
        totals = np.concatenate([numbers_of(member).total for member in entry.members])
        expected = 0.5 * plain.total - 0.01 * step_rows([group], config).step
        np.testing.assert_allclose(totals, expected, atol=1e-6)  # the estimator, in the trainer


@long
def test_a_resumed_run_finds_them_again(recipe: Path, trained: Path) -> None:
    with Command(["train", str(recipe), "learner.updates=3", "--resume"]) as command:
        code, _, err = command.finish(1200)
    assert code == 0, err
    assert [line["step"] for line in lines(trained)] == [1, 2, 3]
