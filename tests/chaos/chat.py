"""A run whose messages and memory come from a package outside of the repository, from warm start to trained policy.

    python -m pytest tests/chaos/chat.py

Too long for the suite, and so not collected with it.
"""

from __future__ import annotations

import shutil
from textwrap import dedent

import pytest

from anchorage.runs.warmstart import make_starter
from services.archive import read_trajectory
from services.config import load_config
from services.control.group_index import GroupIndex
from services.schemas import Step
from tests.processes import ROOT, Command

pytestmark = pytest.mark.timeout(2400)

RECIPE = """
    extends: {root}/configs/demo.yaml
    run: {{name: own, dir: {runs}}}
    model: {{path: {model}, max_prompt_tokens: 1200, max_response_tokens: 40}}
    env: {{max_steps: 5}}
    prompt:
      template: house_memory.notes:Briefing
      reader: tool
      memory: house_memory.notes:Summary
      memory_params: {{longest: 300}}
      history_length: 1
      validity: well_formed
    learner: {{updates: 3, groups_per_update: 2, group_size: 4}}
    checkpoint: {{every: 1}}
"""
SHAPE = ["hidden_size=64", "intermediate_size=64", "layers=1", "heads=2", "kv_heads=2", "batch_tokens=2000"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Of a run of three updates, after a short warm start on tool calls."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "house_memory").mkdir()
    (folder / "house_memory" / "__init__.py").touch()
    shutil.copy(ROOT / "examples" / "custom_memory.py", folder / "house_memory" / "notes.py")
    phases = "warmstart.phases=[{tokens: 400000, lr: 5e-3, noise: [0.0, 0.3], expert_share: 1.0}]"
    shape = [f"warmstart.{one}" for one in SHAPE]
    chat = ["prompt.template=chat", "prompt.params.admissible=false", "model.max_response_tokens=40"]
    make_starter(
        load_config(ROOT / "configs" / "starter.yaml", [phases, *shape, *chat]), folder / "model", lambda *_: None
    )
    recipe = folder / "own.yaml"
    recipe.write_text(dedent(RECIPE.format(root=ROOT, runs=folder / "runs", model=folder / "model")))
    with Command(["train", str(recipe)]) as command:
        code, _, err = command.finish(1800)
    assert code == 0, err
    groups = GroupIndex(folder / "runs" / "own")
    found = [groups.find(summary.group) for summary, _ in groups.rows()]
    trajectories = [read_trajectory(one[0], member) for one in found if one is not None for member in one[2].members]
    return [step for trajectory in trajectories for step in trajectory.steps]


def test_tool_calls_are_actions(steps: list[Step]) -> None:
    called = [step for step in steps if step.valid]
    assert len(called) > len(steps) / 4
    assert all(f'"arguments": {{"action": "{step.action}"}}' in step.response for step in called)


def test_the_memory_is_in_later_prompts(steps: list[Step]) -> None:
    remembered = [step for step in steps if "What you know so far:\n- " in step.prompt]
    assert len(remembered) > len(steps) / 4
    assert all(step.prompt.count("<|user|>") == 1 for step in remembered)
