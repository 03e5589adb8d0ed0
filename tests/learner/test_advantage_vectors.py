"""The estimators against inputs and outputs of the published reference implementation.

`vectors/` holds those recorded on random batches. Where `REFERENCE_DIR` names a folder, further ones must be there.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from learner.advantages import ESTIMATORS, StepRows
from learner.advantages.rows import step_returns
from learner.anchors import dense_ids, step_groups
from services.config.tree import AdvantageConfig

OWN = Path(__file__).parent / "vectors" / "advantage_vectors.json"
NAMED = os.environ.get("REFERENCE_DIR")
FURTHER = Path(NAMED) / OWN.name if NAMED else None
BATCHES = [batch for file in (OWN, FURTHER) if file and file.exists() for batch in json.loads(file.read_text())]


def test_the_vectors_are_there():
    assert OWN.exists()
    assert FURTHER is None or FURTHER.exists(), f"REFERENCE_DIR={NAMED}, and there is no {FURTHER}"


def configured(batch):
    names = {"anchor_similarity": "similarity"}
    return AdvantageConfig(**{names.get(key, key): value for key, value in batch["config"].items()})


def rows_of(batch):
    rows = batch["rows"]
    group = dense_ids([row["group"] for row in rows])
    return StepRows(
        group=group,
        trajectory=dense_ids([(row["group"], row["trajectory"]) for row in rows]),
        step=np.arange(len(rows)),
        step_group=step_groups(group, [row["anchor"] for row in rows], configured(batch).similarity),
        reward=np.array([row["reward"] for row in rows], dtype=np.float64),
        valid=np.array([row["valid"] for row in rows]),
    )


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_step_groups_are_the_same_partition(batch):
    ours, theirs = rows_of(batch).step_group, np.array(batch["expect"]["step_group"])
    np.testing.assert_array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_step_returns(batch):
    config = configured(batch)
    returns = step_returns(rows_of(batch), config.gamma, config.invalid_action_penalty)
    close(returns, batch["expect"]["step_return"])


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_advantages(batch):
    rows, config, expect = rows_of(batch), configured(batch), batch["expect"]
    gigpo = ESTIMATORS["gigpo"](rows, config)
    close(gigpo.episode, expect["episode_advantage"])
    close(gigpo.step, expect["step_advantage"])
    close(gigpo.total, expect["gigpo"])
    for name in ("grpo", "rloo"):
        close(ESTIMATORS[name](rows, config).total, expect[name])
