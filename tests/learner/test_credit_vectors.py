"""GraphGPO, G2PO and HGPO against inputs and outputs of their authors' published code.

`vectors/` holds those recorded on random batches. Where `REFERENCE_DIR` names a folder, further ones must be there. The
authors compute in single precision, which a small deviation magnifies: float64 statements of their formulas are up to
3e-5 off. So results may differ by 1e-4 of the recorded size; what is not divided by a deviation, by 1e-5 of it.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from learner.advantages import ESTIMATORS, StepRows
from learner.advantages.g2po import state_values
from learner.advantages.graph import distances
from learner.advantages.graphgpo import step_worths
from learner.advantages.rows import episode_scores, later_rows, step_returns
from learner.anchors import dense_ids, final_states, graph_nodes, step_groups
from services.config.tree import AdvantageConfig

OWN = Path(__file__).parent / "vectors"
NAMED = os.environ.get("REFERENCE_DIR")
FOLDERS = [OWN, Path(NAMED)] if NAMED else [OWN]
NAMES = {"alpha": "history_power", "anchor_similarity": "similarity"}


def batches(name):
    """A case a batch of all folders."""
    found = []
    for folder in FOLDERS:
        file = folder / f"{name}_vectors.json"
        for number, batch in enumerate(json.loads(file.read_text()) if file.exists() else []):
            found.append(pytest.param(batch, id=f"{folder.name}-{number}"))
    return pytest.mark.parametrize("batch", found)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["graphgpo", "g2po", "hgpo"])
def test_the_vectors_are_there(folder, name):
    assert (folder / f"{name}_vectors.json").exists()


def configured(batch):
    return AdvantageConfig(**{NAMES.get(key, key): value for key, value in batch["config"].items()})


def rows_of(batch):
    """The rows as the learner tabulates them: the states that steps led to are those of the next rows, and the ends."""
    rows = batch["rows"]
    group = dense_ids([row["group"] for row in rows])
    trajectory = dense_ids([(row["group"], row["trajectory"]) for row in rows])
    anchors = [row["anchor"] for row in rows]
    last = np.append(trajectory[1:] != trajectory[:-1], True)
    finals = [row["next"] for row, ends in zip(rows, last, strict=True) if ends]
    similarity = batch["config"].get("anchor_similarity")
    if similarity is None:
        step_group, ends = final_states(group, anchors, group[last], finals)
        state, after = None, np.append(step_group[1:], -1)
        after[last] = ends
    else:
        step_group = step_groups(group, anchors)
        state, after = graph_nodes(group, anchors, last, finals, similarity)
    return StepRows(
        group=group,
        trajectory=trajectory,
        step=np.array([row["step"] for row in rows]),
        step_group=step_group,
        reward=np.array([row["reward"] for row in rows], dtype=np.float64),
        valid=np.array([row["valid"] for row in rows]),
        state=state,
        next_state=after,
    )


def close(ours, recorded, within=1e-4):
    recorded = np.array(recorded)
    assert np.all(np.abs(ours - recorded) <= within * (1 + np.abs(recorded)))


@batches("graphgpo")
def test_graphgpo_vectors(batch):
    rows, config, expect = rows_of(batch), configured(batch), batch["expect"]
    away = distances(rows, episode_scores(rows) > 0)
    np.testing.assert_array_equal(away.here, expect["distance"])
    np.testing.assert_array_equal(away.there, expect["next_distance"])
    worths = step_worths(rows, config)
    close(worths, expect["step_return"], 1e-5)
    close(worths - config.invalid_action_penalty * ~rows.valid, expect["step_reward"], 1e-5)
    theirs = np.array(expect["step_group"])
    np.testing.assert_array_equal(rows.step_group[:, None] == rows.step_group, theirs[:, None] == theirs)
    found = ESTIMATORS["graphgpo"](rows, config)
    close(found.step, expect["step_advantage"])
    close(found.episode, expect["episode_advantage"])
    close(found.total, expect["advantage"])


@batches("g2po")
def test_g2po_vectors(batch):
    rows, config, expect = rows_of(batch), configured(batch), batch["expect"]
    close(state_values(rows, config)[0], expect["value"], 1e-5)
    theirs, after = np.array(expect["next_state"]), later_rows(rows)
    np.testing.assert_array_equal(theirs[after >= 0], np.array(expect["state"])[after[after >= 0]])
    reached = np.abs(episode_scores(rows) - config.goal_reward) < 1e-9
    np.testing.assert_array_equal(theirs[after < 0] == -1, reached[after < 0])
    found = ESTIMATORS["g2po"](rows, config)
    close(found.step, expect["step_advantage"])
    close(found.episode, expect["episode_advantage"])
    close(found.total, expect["advantage"])


@batches("hgpo")
def test_hgpo_vectors(batch):
    rows, config, expect = rows_of(batch), configured(batch), batch["expect"]
    close(step_returns(rows, config.gamma, config.invalid_action_penalty), expect["step_return"], 1e-5)
    close(ESTIMATORS["hgpo"](rows, config).total, expect["advantage"])


def test_the_papers_form_of_hgpo_is_another():
    """By how much, on the batch of the authors' settings: docs/algorithms.md says it."""
    (batch,) = [b for b in json.loads((OWN / "hgpo_vectors.json").read_text()) if b["config"]["history"] == 2][:1]
    rows, config = rows_of(batch), configured(batch)
    published, paper = (
        ESTIMATORS["hgpo"](rows, config.model_copy(update={"history_form": form})).total
        for form in ("published", "paper")
    )
    assert 0.1 < np.abs(published - paper).mean() / np.abs(published).mean() < 0.3
