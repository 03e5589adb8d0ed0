"""Dynamic sampling in the trainer, on a real Redis. The ranks stand still: what they learn does not matter here."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.checkpoint import latest
from learner.dispatch import Dispatcher
from learner.dynamic_sampling import has_equal_rewards
from learner.ledger import Ledger
from learner.trainer import Trainer
from services.buffer import Buffer
from services.config.tree import Config
from services.errors import RunStalled
from services.weights.directory import DirectoryChannel
from tests.learner.synthetic import Publishing, play

SPLITS = {"train": 50}


class StillRanks(Publishing):
    """Ranks whose updates change nothing."""

    checkpoint_bytes = 0
    sharing = "lines"

    def update(self, work, meanwhile):
        return {"loss": 0.0}

    def weights(self):
        return {"weight": torch.zeros(1)}

    def save(self, folder):
        (folder / "nothing").touch()

    def load(self, folder):
        assert (folder / "nothing").exists()


class Actors:
    """Plays tickets in a thread, the `limit` foremost at a time and the last of them first."""

    def __init__(self, buffer, limit, player):
        self._buffer, self._limit, self._player = buffer, limit, player
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.is_set():
            for ticket in reversed(self._buffer.lease("actor", self._limit, 30.0)):
                self._buffer.store(self._player(ticket))
            self._stop.wait(0.005)


def fresh(ticket):
    """An episode that no learner of these tests finds too old."""
    return play(ticket, version=1000)


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture
def run(tiny_config, redis_url, tmp_path):
    """Makes trainers of a run that share its Redis and its folder."""

    class Run:
        def __init__(self, name="first", **learner):
            sections = {"learner": tiny_config.learner.model_dump() | {"dynamic_sampling": True, **learner}}
            sections["run"] = {"name": f"{tiny_config.run.name}-{name}", "dir": tmp_path}
            self.config = Config.model_validate(tiny_config.model_dump() | sections)
            self.buffer = Buffer.connect(redis_url, self.config.run.name, self.config.buffer)
            buffers.append(self.buffer)

        def train(self, on_update=lambda report: None, resume=False, player=fresh, limit=8):
            folder = self.config.run.folder
            channel = DirectoryChannel(folder / "weights", 30.0)
            trainer = Trainer(self.config, self.buffer, channel, StillRanks(), folder, SPLITS, on_update=on_update)
            with Actors(self.buffer, limit, player):
                trainer.train(resume=resume)

        def trained(self):
            entries = Ledger(self.config.run.folder / "ledger.jsonl").read()
            return [(entry.update, entry.group) for entry in entries]

    buffers = []
    yield Run
    for buffer in buffers:
        buffer.close()


def expected(config, updates):
    """(update, group) in order, and the dropped groups before each update's last: straight from the episodes."""
    dispatcher = Dispatcher(config, SPLITS)
    kept, dropped, size = [], [], config.learner.groups_per_update
    for group in range(1000):
        if len(kept) == updates * size:
            break
        equal = has_equal_rewards([play(ticket) for ticket in dispatcher.tickets([group])])
        (dropped if equal else kept).append(group)
    return [(1 + place // size, group) for place, group in enumerate(kept)], dropped


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_of_equal_rewards_are_replaced_by_the_next_ones_whatever_completes_first(run, staleness):
    ledgers = []
    for name, limit in (("wide", 50), ("narrow", 1)):
        each, reports = run(name, updates=4, max_staleness=staleness), []
        each.train(reports.append, limit=limit)
        ledgers.append(each.trained())
        wanted, dropped = expected(each.config, updates=4)
        assert each.trained() == wanted
        assert 0 < len(dropped) == sum(report.dropped_equal for report in reports)
        assert all(report.cancelled == 0 for report in reports)
        assert each.buffer.known("train") == set()
    assert ledgers[0] == ledgers[1]


def test_a_run_killed_between_drops_and_checkpoint_goes_on_with_the_same_groups(run):
    each, reports = run(updates=6), []

    def die_after_three(report):
        reports.append(report)
        if report.update == 3:
            raise Killed

    with pytest.raises(Killed):
        each.train(die_after_three)
    assert latest(each.config.run.folder / "checkpoints").name == "000002"
    # The drops of the lost update are still marked in Redis, their trajectories are not there any more.
    marked = set(each.buffer.cancelled("train"))
    assert marked
    played = []

    def note(ticket):
        played.append(ticket.group)
        return fresh(ticket)

    each.train(reports.append, resume=True, player=note)
    wanted, dropped = expected(each.config, updates=6)
    assert each.trained() == wanted
    assert marked <= set(dropped)
    assert not marked & set(played)
    third = [report.dropped_equal for report in reports if report.update == 3]
    assert len(third) == 2
    assert third[0] == third[1]
    assert each.buffer.known("train") == set()


def test_too_many_groups_of_equal_rewards_end_the_run(run):
    def lose(ticket):
        lost = fresh(ticket)
        return dataclasses.replace(lost, steps=tuple(dataclasses.replace(step, reward=0.0) for step in lost.steps))

    with pytest.raises(RunStalled, match=r"^\d groups were dropped .* learner\.dynamic_sampling_limit"):
        run(updates=2, max_staleness=0, dynamic_sampling_limit=2).train(player=lose)


def test_without_dynamic_sampling_every_group_is_used(run):
    each = run(updates=3, dynamic_sampling=False)
    each.train()
    assert each.trained() == [(1 + group // 2, group) for group in range(6)]


@given(st.lists(st.sampled_from([0.0, 0.1, 10.0]), min_size=2, max_size=5))
def test_equal_rewards(rewards):
    tickets = Dispatcher(Config(), SPLITS).tickets([0])[: len(rewards)]
    steps = play(tickets[0], steps=1).steps
    group = [
        dataclasses.replace(play(t), steps=(dataclasses.replace(steps[0], reward=r),))
        for t, r in zip(tickets, rewards, strict=True)
    ]
    assert has_equal_rewards(group) == (len(set(rewards)) == 1)
