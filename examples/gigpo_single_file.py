"""GiGPO on one page: the algorithm of arXiv 2505.10978 with a policy small enough to read.

A courier in a 6 × 6 house fetches a parcel and brings it to a door. Reward 10 arrives once, at the door; nothing else
is rewarded. The policy is one logit for each (state, action), so its gradient is written out by hand and the whole
run takes seconds on one core. Only the advantage comes from Anchorage: `ESTIMATORS["gigpo"]`, the function that trains
language models too. Everything else on this page is numpy.

    python examples/gigpo_single_file.py              # GiGPO
    python examples/gigpo_single_file.py grpo         # the same without the step level

Equation numbers are those of the paper.
"""

from __future__ import annotations

import sys

import numpy as np

from learner.advantages import ESTIMATORS, StepRows
from learner.anchors import step_groups
from services.config.tree import AdvantageConfig

SIZE, MAX_STEPS, REWARD = 6, 60, 10.0
MOVES = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
TASKS = 12  # (start, parcel, door); a group plays one of them
GROUPS, MEMBERS, UPDATES = 12, 8, 100
CLIP, KL, LEARNING_RATE = 0.2, 0.001, 1.0

State = tuple[int, int, int, int]  # task, x, y, carrying


class House:
    """One episode. Its state is the anchor: equal states are equal tuples."""

    def __init__(self, task: int) -> None:
        places = np.random.default_rng(task).choice(SIZE * SIZE, size=3, replace=False)
        self.start, self.parcel, self.door = (divmod(int(place), SIZE) for place in places)
        self.state: State = (task, *self.start, 0)

    def step(self, action: int) -> tuple[float, bool]:
        task, x, y, carrying = self.state
        here = tuple(np.clip((x, y) + MOVES[action], 0, SIZE - 1).tolist())
        carrying = int(carrying or here == self.parcel)
        self.state = (task, *here, carrying)
        won = bool(carrying) and here == self.door
        return REWARD * won, won


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [..., actions]."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def rollout(policy: np.ndarray, groups: int, rng: np.random.Generator) -> tuple[StepRows, np.ndarray, np.ndarray]:
    """Play `groups` groups: MEMBERS episodes of the same task each, sampled from the old policy π_old (section 3.1).

    Returns the rows of all steps, their states (int64 [N, 4]) and their actions (int64 [N]).
    """
    group, trajectory, step, reward, states, actions = [], [], [], [], [], []
    for g in range(groups):
        task = int(rng.integers(TASKS))
        for member in range(MEMBERS):
            house = House(task)
            for t in range(MAX_STEPS):
                states.append(house.state)
                action = int(rng.choice(len(MOVES), p=softmax(policy[house.state])))
                gained, done = house.step(action)
                reward.append(gained)
                actions.append(action)
                group.append(g)
                trajectory.append(g * MEMBERS + member)
                step.append(t)
                if done:
                    break
    # Eq. 6: the steps of one group that were taken in the same state are compared with each other.
    anchors = step_groups(np.array(group), [str(state) for state in states])
    rows = StepRows(
        group=np.array(group),
        trajectory=np.array(trajectory),
        step=np.array(step),
        step_group=anchors,
        reward=np.array(reward, dtype=np.float64),
        valid=np.ones(len(group), dtype=np.bool_),
    )
    return rows, np.array(states), np.array(actions)


def update(policy: np.ndarray, states: np.ndarray, actions: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """Two steps of gradient ascent on the objective of eq. 9: PPO's clipped ratio, less β·KL to the reference.

    The reference is the uniform policy that training begins with; a "response" is one action, its one token.
    """
    row, n = tuple(states.T), len(actions)
    chosen = np.eye(len(MOVES))[actions]
    old = softmax(policy[row])[np.arange(n), actions]
    for _ in range(2):
        probabilities = softmax(policy[row])
        ratio = probabilities[np.arange(n), actions] / old
        clipped = np.where(advantage > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)  # where min(…) has no gradient
        # ∇ log π(a|s) = onehot(a) − π(·|s), and ∇ KL(π ‖ uniform) = π · (log π + entropy).
        score = (chosen - probabilities) * (ratio * advantage * ~clipped)[:, None]
        log = np.log(probabilities)
        divergence = probabilities * (log - (probabilities * log).sum(axis=1, keepdims=True))
        gradient, visits = np.zeros_like(policy), np.zeros(policy.shape[:-1])
        np.add.at(gradient, row, score - KL * divergence)
        np.add.at(visits, row, 1)
        # The table's learning rate is by visit, so that a state that is met often does not learn faster.
        policy = policy + LEARNING_RATE * gradient / np.maximum(visits, 1)[..., None]
    return policy


def train(algorithm: str = "gigpo", updates: int = UPDATES, seed: int = 0) -> list[tuple[float, float]]:
    """Success rate and mean number of steps of the sampled episodes at each update."""
    rng = np.random.default_rng(seed)
    policy = np.zeros((TASKS, SIZE, SIZE, 2, len(MOVES)))
    config = AdvantageConfig(gamma=0.95, omega=1.0)
    curve = []
    for number in range(updates):
        rows, states, actions = rollout(policy, GROUPS, rng)
        # Eq. 3, 5, 7 and 8: A = A_E + ω · A_S, episode level over the group, step level over each step group.
        advantages = ESTIMATORS[algorithm](rows, config)
        policy = update(policy, states, actions, advantages.total)
        episodes = GROUPS * MEMBERS
        curve.append((float(rows.reward.sum()) / REWARD / episodes, len(rows) / episodes))
        if number % 10 == 9:
            success, steps = np.mean(curve[-10:], axis=0)
            compared = np.bincount(rows.step_group)[rows.step_group] > 1
            print(
                f"update {number + 1:3}  success {success:.2f}  steps {steps:4.1f}  "
                f"compared with another step {compared.mean():.2f}"
            )
    return curve


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "gigpo")
