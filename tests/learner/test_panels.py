"""Which panels count as played, and who writes the best policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.checkpoint import best
from learner.panels import Panels
from learner.rank.group import RankFailed
from services.config.tree import Config


class MortalRanks:
    """Ranks of which the first export finds one dead."""

    def __init__(self) -> None:
        self.exports = 0

    def export(self, folder: Path) -> None:
        self.exports += 1
        if self.exports == 1:
            raise RankFailed("a rank died")
        (folder / "config.json").write_text("{}")


def test_a_panel_whose_best_policy_could_not_be_written_is_due_again(tiny_config: Config) -> None:
    config = Config.model_validate(tiny_config.model_dump() | {"evaluation": {"every": 2}})
    recorded: list[int] = []
    panels = Panels(
        config,
        config.run.folder,
        MortalRanks(),
        lambda version, should_stop: {"evaluation/success_rate": 0.5},
        lambda version, figures: recorded.append(version),
    )
    with pytest.raises(RankFailed):
        panels.play(2, lambda: False)
    panels.cut(2)  # as the trainer does after the restart, from the checkpoint of the same update
    assert best(config.run.folder / "checkpoints") is None
    assert recorded == []
    assert panels.due(2)
    panels.play(2, lambda: False)
    kept = best(config.run.folder / "checkpoints")
    assert kept is not None
    assert (kept[0].name, kept[1]) == ("best-000002", 0.5)
    assert recorded == [2]
    assert not panels.due(2)
    panels.play(4, lambda: False)  # no better: nothing is written
    assert recorded == [2, 4]
    assert best(config.run.folder / "checkpoints") == kept
