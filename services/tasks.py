"""The task of each group: `f(seed, i)`, a pure function of the configuration and the group's number.

Invariants
- The tasks of each environment come in a seeded permutation, a new one each epoch.
- In a mix of environments each block of `MIX_BLOCK` groups holds every environment in proportion to its weight, in a
  seeded order.
- Split sizes are keyed by split for a single environment, and by `environment/split` for a mix.

Example: a split of 3 tasks, no mix
    group   0 1 2   3 4 5   6 …
    epoch   0       1       2
    task    2 0 1   1 2 0   …       a permutation of the seed and the epoch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from services.config.tree import Config, EnvConfig
from services.errors import EnvironmentUnavailable, did_you_mean
from services.schemas import Task

MIX_BLOCK = 100
HELD_OUT = ("valid_unseen", "valid_seen", "test")


def split_key(config: Config, env: str, split: str) -> str:
    """Key of a split in the run's split sizes."""
    return f"{env}/{split}" if config.envs else split


def split_size(splits: Mapping[str, int], split: str, env: str) -> int:
    """Number of tasks of a split.

    Raises:
        EnvironmentUnavailable: the environment has no such split, or it is empty.
    """
    size = splits.get(split, 0)
    if size < 1:
        offered = ", ".join(f"{name} ({count})" for name, count in splits.items()) or "none"
        own = [name for name, count in splits.items() if count and name.rpartition("/")[0] == split.rpartition("/")[0]]
        hint = did_you_mean(split, own)
        raise EnvironmentUnavailable(f"{env} has no tasks in split '{split}'{hint}; it offers {offered}")
    return size


class TaskOrder:
    """The training tasks of a run, in order. EnvironmentUnavailable if an environment lacks its split."""

    def __init__(self, config: Config, splits: Mapping[str, int]) -> None:
        self._seed = config.run.seed
        self._mix = Mix(config)
        self._sizes = [
            min(size, env.tasks or size)
            for env in config.environments
            for size in [split_size(splits, split_key(config, env.name, env.split), env.name)]
        ]
        self._permutation = lru_cache(maxsize=2 * len(self._sizes))(self._permute)

    def task(self, group: int) -> Task:
        """The task of a group (its number, from 0)."""
        number, env, place = self._mix.place(group)
        epoch, position = divmod(place, self._sizes[number])
        return Task(env=env.name, split=env.split, index=self._permutation(number, epoch)[position])

    def _permute(self, number: int, epoch: int) -> Sequence[int]:
        # The first environment's order is the one it has alone.
        seed = [self._seed, epoch, number] if number else [self._seed, epoch]
        order: Sequence[int] = np.random.default_rng(seed).permutation(self._sizes[number]).tolist()
        return order


class Mix:
    """Assigns an environment to each group of a mix.

    Example: weights 3 and 1, so 75 and 25 of each block of 100 groups. The seeded order of a block begins a, b, a, a, …
        number             0     1     2     3
        place(number)      a, 0  b, 0  a, 1  a, 2      environment, and place among its own groups
    """

    def __init__(self, config: Config) -> None:
        self._environments = config.environments
        self._seed = config.run.seed
        self._shares = shares([env.weight for env in self._environments])
        self._block = lru_cache(maxsize=4)(self._order)

    def place(self, number: int) -> tuple[int, EnvConfig, int]:
        """Index of the environment, its settings, and the number of earlier groups of the same environment."""
        if len(self._environments) == 1:
            return 0, self._environments[0], number
        block, position = divmod(number, MIX_BLOCK)
        order = self._block(block)
        chosen = order[position]
        place = block * self._shares[chosen] + order[:position].count(chosen)
        return chosen, self._environments[chosen], place

    def _order(self, block: int) -> list[int]:
        members = [index for index, share in enumerate(self._shares) for _ in range(share)]
        order: list[int] = np.random.default_rng([self._seed, block, MIX_BLOCK]).permutation(members).tolist()
        return order


def shares(weights: Sequence[float]) -> list[int]:
    """Number of groups of a block for each weight, by largest remainder, ties to the first.

    Example:
        weights 1, 1, 1: exactly 33.3 each, so 33 each and one more to the first: [34, 33, 33]
    """
    exact = [MIX_BLOCK * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: MIX_BLOCK - sum(whole)]:
        whole[index] += 1
    return whole


def panel_tasks(config: Config, splits: Mapping[str, int]) -> list[Task]:
    """The tasks of all panels of all splits, without repetition; see `split_tasks`."""
    return [task for tasks in split_tasks(config, splits) for task in tasks]


def split_tasks(config: Config, splits: Mapping[str, int]) -> list[list[Task]]:
    """The tasks of the panels of each split of `evaluation.split`: the first tasks of each environment.

    If no split is configured, each environment's first held-out split is used. A single panel may be shorter than
    configured if the split is; several panels must all be full.

    Raises:
        EnvironmentUnavailable: an environment has no such split, or it has too few tasks for the panels.
    """
    return [tasks_of_split(config, splits, split) for split in config.evaluation.splits or (None,)]


def tasks_of_split(config: Config, splits: Mapping[str, int], asked: str | None) -> list[Task]:
    """The tasks of one split, None for the first held-out one; see `split_tasks`."""
    mix = Mix(config)
    wanted = config.evaluation.episodes * config.evaluation.panels
    tasks: list[Task] = []
    used_up: set[str] = set()
    for number in range(wanted):
        _, env, place = mix.place(number)
        offered = (name for name in HELD_OUT if splits.get(split_key(config, env.name, name)))
        split = asked or next(offered, HELD_OUT[0])
        size = split_size(splits, split_key(config, env.name, split), env.name)
        if place < size:
            tasks.append(Task(env=env.name, split=split, index=place))
        elif config.evaluation.panels == 1:
            used_up.add(env.name)
            if len(used_up) == len(config.environments):
                break
        else:
            raise EnvironmentUnavailable(
                f"{config.evaluation.panels} panels of {config.evaluation.episodes} take {wanted} different tasks, and "
                f"split '{split}' of {env.name} has {size}: fewer panels, fewer episodes, or evaluation.seeds instead"
            )
    return tasks
