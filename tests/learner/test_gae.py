"""GAE against a loop, and against outputs of published code over tokens and over turns.

`vectors/` holds those recorded on random batches. Where `REFERENCE_DIR` names a folder, further ones must be there.
"""

import json
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages.gae import gae, whitened

OWN = Path(__file__).parent / "vectors" / "gae_vectors.json"
NAMED = os.environ.get("REFERENCE_DIR")
FILES = [OWN, Path(NAMED) / OWN.name] if NAMED else [OWN]
BATCHES = [
    pytest.param(batch, id=f"{file.parent.name}-{number}")
    for file in FILES
    if file.exists()
    for number, batch in enumerate(json.loads(file.read_text()))
]
NUMBER = st.floats(-10, 10)
SEQUENCES = st.lists(
    st.tuples(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8), NUMBER), min_size=1, max_size=6
)
SHARE = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_vectors_are_there(file):
    assert file.exists()


def close(ours, recorded):
    """As near as single precision of the published code allows."""
    recorded = np.array(recorded)
    assert np.all(np.abs(np.array(ours) - recorded) <= 1e-4 * (1 + np.abs(recorded)))


def episode_of(row):
    return row["group"], row["trajectory"]


def last_reward(row, rows, config):
    """What the last token of a row's response earns."""
    penalty = 0.0 if row["valid"] else config["invalid_action_penalty"]
    if config["scope"] == "response":  # verl-agent: every response gets the episode's whole score
        return sum(other["reward"] for other in rows if episode_of(other) == episode_of(row)) - penalty
    return row["reward"] - penalty


def by_row(flat, rows):
    """Numbers of tokens, row by row."""
    ends = np.cumsum([len(row["values"]) for row in rows])[:-1]
    return [part.tolist() for part in np.split(flat, ends)]


@pytest.mark.parametrize("batch", BATCHES)
def test_gae_vectors(batch):
    rows, config, expect = batch["rows"], batch["config"], batch["expect"]
    earned = [last_reward(row, rows, config) for row in rows]
    episodes = [list(own) for _, own in groupby(rows, episode_of)]
    if config["unit"] == "turn":
        values = np.array([row["values"][0] for row in rows])
        after = np.array([own[-1]["bootstrap"] or 0.0 for own in episodes])
        lengths = np.array([len(own) for own in episodes])
        found = gae(values, np.array(earned), lengths, config["gamma"], config["lam"], after)
        close(found.advantage, expect["advantage"])
        close(found.returns, expect["return"])
        return
    values = np.array([value for row in rows for value in row["values"]])
    tokens = [len(row["values"]) for row in rows]
    rewards = np.zeros(len(values))
    rewards[np.cumsum(tokens) - 1] = earned
    per_episode = [sum(len(row["values"]) for row in own) for own in episodes]
    lengths = np.array(tokens if config["scope"] == "response" else per_episode)
    found = gae(values, rewards, lengths, config["gamma"], config["lam"])
    advantage = whitened(found.advantage) if config["whiten"] else found.advantage
    for ours, recorded in ((advantage, expect["advantage"]), (found.returns, expect["return"])):
        for one, other in zip(by_row(ours, rows), recorded, strict=True):
            close(one, other)


@given(SEQUENCES, SHARE, SHARE)
def test_gae_is_its_loop(sequences, gamma, lam):
    theirs = []
    for elements, after in sequences:
        advantages, coming, following = [], 0.0, after
        for value, reward in reversed(elements):
            coming = reward + gamma * following - value + gamma * lam * coming
            advantages.append(coming)
            following = value
        theirs += reversed(advantages)
    values, rewards = (np.array([e[i] for elements, _ in sequences for e in elements]) for i in (0, 1))
    lengths = np.array([len(elements) for elements, _ in sequences])
    found = gae(values, rewards, lengths, gamma, lam, np.array([after for _, after in sequences]))
    np.testing.assert_allclose(found.advantage, theirs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.returns, np.array(theirs) + values, rtol=0, atol=1e-9)


def test_the_worked_example():
    found = gae(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 10.0]), np.array([3]), 1.0, 0.5)
    assert found.advantage.tolist() == [3.25, 4.5, 7.0]
    assert found.returns.tolist() == [4.25, 6.5, 10.0]


@pytest.mark.parametrize("lengths", [[2], [2, 2], [3, 0]])
def test_lengths_must_divide_the_values(lengths):
    with pytest.raises(ValueError, match="do not divide 3 values"):
        gae(np.zeros(3), np.zeros(3), np.array(lengths), 1.0, 1.0)
