"""One rank that trains in several ZeRO stages, one after the other: `python -m … RANK RANKS PORT FOLDER [resume]`.

FOLDER holds `cases.json`, a list of configurations. Without `resume` the rank makes an update with each of them, writes
a checkpoint (`N/middle`), makes two more and writes another (`N/end`). With `resume` it goes on from the first
checkpoint and writes `N/resumed`; from stage 2 on it moves its states to host memory and back before each update and
before the checkpoint, as where it shares its device. Rank 0 prints a line of JSON for each update: its number and the
loss figures.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from learner.dispatch import Dispatcher
from learner.prepare import prepare
from learner.rank.engine_deepspeed import DeepSpeedEngine, connect
from learner.rank.losses import load_loss
from learner.rank.rank import Rank
from services.config.tree import Config
from tests.learner.synthetic import play

GROUPS = 4
UPDATES = 3


class StagedRank(Rank):
    """A rank whose process group exists already, so that one process can have several engines in turn."""

    def __init__(self, config: Config, number: int) -> None:
        super().__init__(config, number)
        self._loss = load_loss(config.loss)
        self._engine = DeepSpeedEngine(config)
        self._reference = None


def train(config: Config, number: int, folder: Path, *, resume: bool) -> None:
    """Make the updates of one configuration, all of them or those after the first checkpoint."""
    rank = StagedRank(config, number)
    tickets = Dispatcher(config, {"train": 9}).tickets(range(GROUPS))
    groups = [[play(ticket) for ticket in tickets if ticket.group == group] for group in range(GROUPS)]
    if resume:
        rank.load(folder / "middle")
    moves = resume and config.learner.zero_stage > 1
    for update in range(1 if resume else 0, UPDATES):
        if moves:
            rank.leave_device()
            rank.return_to_device()
        figures = rank.update(prepare(groups, config, update).work[number])
        if number == 0:
            print(json.dumps({"update": update, **figures}), flush=True)
        if update == 0:
            rank.save(folder / "middle")
    if moves:
        rank.leave_device()
        rank.return_to_device()
    rank.save(folder / ("resumed" if resume else "end"))


def main() -> None:
    number, ranks, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    logging.disable(logging.CRITICAL)
    connect(number, ranks, "127.0.0.1", port)
    for case, tree in enumerate(json.loads((folder / "cases.json").read_text())):
        train(Config.model_validate(tree), number, folder / str(case), resume=sys.argv[5:] == ["resume"])


if __name__ == "__main__":
    main()
