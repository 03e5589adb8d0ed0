"""A run's folder, read as plain rows: metrics, evaluations, the episodes and groups that it was trained on.

Invariants
- Nothing here writes to the run's folder, and a run may be read while it trains.
- Advantages are the very numbers that the policy was trained with; none is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorage.rows import Rows
from anchorage.runs.metrics import evaluations, read_metrics
from services.config.tree import Config
from services.errors import AnchorageError
from services.run_folder import run_config
from services.telemetry import METRICS_NAME

if TYPE_CHECKING:
    from services.control.group_index import GroupIndex
    from services.control.views import GroupSummary, TrajectorySummary


class NoSuchGroup(AnchorageError):
    """The run's folder does not hold the group: it was not trained on, or has made room for newer ones."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group as the policy was trained on it.

    Attributes:
        group: its number. update: the policy update that trained on it, from 1.
        env / split / index: the task that its episodes played. task_type: its kind, "" where the environment has none.
        episodes: a row an episode, as of `Run.episodes`.
        steps: a row a step, in the order of episodes and steps. `member` and `number` name the step, `state` its step
            group, `anchor` the key of that. `observation`, `prompt`, `response`, `action` are texts. `return` is the
            discounted return, the penalty on invalid actions subtracted. `episode_advantage` and `step_advantage` are
            the two levels, `advantage` is what the policy was trained with. `step_group_size` counts steps.
        step_groups: a row a step group: `state` (numbered from 0 in order of first appearance), `anchor`,
            `observation`, `size`, `mean_return`, `deviation` (of the returns, ddof 1), `layer` (number of the step at
            which an episode first came there).
        actions: a row for each action taken in a state, with its `outcome`: `source` and `target` are states, `target`
            is None where the episode ended (`outcome` `won` or `lost`); `count` steps, `members` that took it, and the
            means `step_advantage` and `advantage`.
    """

    group: int
    update: int
    env: str
    split: str
    index: int
    task_type: str
    episodes: Rows
    steps: Rows
    step_groups: Rows
    actions: Rows


class Run:
    """A run, by its folder.

    Example:
        run = Run("runs/first")
        run.evaluations()
        run.group(12).steps.to_pandas()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open the run in `folder`.

        Raises:
            NoSuchRun: the folder holds no run. ConfigError: its configuration is damaged.
        """
        self.folder = Path(folder)
        self.config: Config = run_config(self.folder)
        """The configuration that the run was started with."""

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.run.name

    @property
    def updates(self) -> int:
        """Number of policy updates done so far."""
        if not (self.folder / METRICS_NAME).exists():
            return 0
        return max((row["step"] for row in self.metrics() if "rollout/success_rate" in row), default=0)

    def metrics(self) -> Rows:
        """Return the records of `metrics.jsonl`: `step` (update), `time` (Unix seconds) and the update's figures.

        Raises:
            AnchorageError: the run has recorded nothing yet.
        """
        return Rows(read_metrics(self.folder))

    def evaluations(self) -> Rows:
        """Return a row an evaluation and, where it had several splits, one a split.

        Columns: `update`, `split` (None: over all), `success_rate` with the ends of its 95 % interval `success_low` and
        `success_high`, `mean_score`, `mean_steps`, `valid_fraction`.

        Raises:
            AnchorageError: the run has recorded nothing yet.
        """
        return Rows(evaluations(read_metrics(self.folder)))

    def groups(self) -> Rows:
        """Return a row for each group that is kept in the folder (`telemetry.keep_groups_mib`), oldest update first."""
        return Rows(_flat(summary) for summary, _ in self._summaries())

    def episodes(self) -> Rows:
        """Return a row for each episode of the groups that are kept, oldest update first.

        Columns: `update`, `group`, `member`, the task (`env`, `split`, `index`, `task_type`), `won`, `reward`
        (undiscounted), `steps` and `valid_steps` (calls of the policy), `turns` (steps of the environment),
        `response_tokens`, `oldest_version` and `newest_version` of the policy that played it, `actor`,
        `episode_advantage`.
        """
        return Rows(_flat(episode) for _, episodes in self._summaries() for episode in episodes)

    def group(self, number: int) -> Group:
        """Return the group of that number, with the texts and advantages of all its steps.

        Raises:
            NoSuchGroup: it is not kept. AnchorageError: its file is damaged.
        """
        from services.control.explorer import group_view, trajectory_view

        found = self._kept().find(number)
        if found is None:
            raise NoSuchGroup(f"group {number} is not kept in {self.folder}{self._kept_groups()}")
        path, summary, entry = found
        view = group_view(path, summary, entry, None, None)
        anchors = {state.state: state.anchor for state in view.states}
        steps = Rows()
        for member in entry.members:
            for step in trajectory_view(path, summary, entry, member).steps:
                row = step.model_dump(by_alias=True)
                anchor = None if step.state is None else anchors[step.state]
                steps.append({"member": member.member, **row, "anchor": anchor})
        step_groups = Rows({**state.model_dump(exclude={"steps"}), "size": len(state.steps)} for state in view.states)
        return Group(
            group=summary.group,
            update=summary.update,
            env=summary.task.env,
            split=summary.task.split,
            index=summary.task.index,
            task_type=summary.task_type,
            episodes=Rows(map(_flat, view.trajectories)),
            steps=steps,
            step_groups=step_groups,
            actions=Rows(edge.model_dump() for edge in view.edges),
        )

    def policy(self, *, best: bool = False) -> Path:
        """Return the Hugging Face folder of the newest intact checkpoint's policy, or of the best by evaluation.

        The folder is a part of the run, and goes when newer checkpoints take its place: `export` makes a copy.

        Raises:
            CheckpointFailed: there is none, or its files are damaged.
        """
        from anchorage.runs.export import policy_of

        return policy_of(self.folder, best=best)

    def export(self, folder: str | os.PathLike[str], *, best: bool = False) -> Path:
        """Copy the policy to a Hugging Face folder, which must be new or empty, and return its path.

        Raises:
            CheckpointFailed: there is no policy, or the folder cannot be written.
        """
        from anchorage.runs.export import export_policy

        export_policy(self.folder, Path(folder), best=best)
        return Path(folder)

    def export_episodes(self, file: str | os.PathLike[str]) -> int:
        """Write all episodes that are kept, with texts, token ids and advantages, to a file; return their number.

        The file's name ends in `.jsonl`, or in `.parquet` where pyarrow is installed. `read_episodes` reads it back;
        the format is described in docs/episodes-format.md.

        Raises:
            EpisodesUnavailable: no episode is kept, the file cannot be written, or pyarrow is missing.
        """
        from anchorage.runs.episodes import export_episodes

        return export_episodes(self.folder, Path(file))

    def _kept(self) -> GroupIndex:
        from services.control.group_index import GroupIndex

        return GroupIndex(self.folder)

    def _summaries(self) -> Iterator[tuple[GroupSummary, list[TrajectorySummary]]]:
        """Yield the kept groups with their episodes, oldest update first."""
        by_update: dict[int, list[tuple[GroupSummary, list[TrajectorySummary]]]] = {}
        for summary, episodes in self._kept().rows():
            by_update.setdefault(summary.update, []).append((summary, episodes))
        for update in sorted(by_update):
            yield from by_update[update]

    def _kept_groups(self) -> str:
        """Return which groups are kept, for an error."""
        numbers = sorted(summary.group for summary, _ in self._summaries())
        return f": it keeps {len(numbers)} groups from {numbers[0]} to {numbers[-1]}" if numbers else ": it keeps none"


def _flat(view: GroupSummary | TrajectorySummary) -> dict[str, Any]:
    """Return the fields as one row, the task's among them."""
    row = view.model_dump()
    return {**row.pop("task"), **row}
