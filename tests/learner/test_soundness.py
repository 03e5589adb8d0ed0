"""Updates that cannot be made: who is at fault is named and given up, the others are trained on."""

import dataclasses
import json
from contextlib import closing

import pytest
import torch

from learner.ledger import Ledger
from learner.trainer import Trainer
from services.buffer import Buffer
from services.config.tree import Config
from services.errors import RunStalled, UpdateNotFinite
from services.weights.directory import DirectoryChannel
from tests.learner.actors import Actors
from tests.learner.synthetic import Publishing, play

METRICS = {"loss": 0.0}
MARK = 9999


class FakeRanks(Publishing):
    """Ranks without a model: `refuse` says of the work whether it is not finite."""

    checkpoint_bytes = 0
    sharing = "lines"

    def __init__(self, refuse=lambda work: False, gap=None):
        self.refuse, self.gap, self.updates = refuse, gap, 0

    def update(self, work, meanwhile):
        if self.refuse(work):
            raise UpdateNotFinite("the loss or the gradient is not finite")
        self.updates += 1
        return METRICS | ({} if self.gap is None else {"fresh_gap": self.gap})

    def finite(self, work):
        return not self.refuse(work)

    def weights(self):
        return {"weight": torch.zeros(1)}

    def save(self, folder):
        (folder / "state").write_text("")

    def load(self, folder):
        pass


@pytest.fixture
def train(redis_url, tiny_config):
    """Trains with fake ranks and an `alter`ed play; the run's configuration may be changed by section."""

    def run(ranks, alter, **sections):
        config = Config.model_validate(
            tiny_config.model_dump()
            | {name: getattr(tiny_config, name).model_dump() | v for name, v in sections.items()}
        )
        channel = DirectoryChannel(config.run.folder / "weights", 30.0)
        played = lambda ticket, version: alter(ticket, play(ticket, version))  # noqa: E731
        with (
            closing(Buffer.connect(redis_url, config.run.name, config.buffer, max_attempts=1)) as buffer,
            Actors(buffer, channel, play=played),
        ):
            Trainer(config, buffer, channel, ranks, config.run.folder, {"train": 5}).train()
            return [(entry.update, entry.group) for entry in Ledger(config.run.folder / "ledger.jsonl").read()], buffer

    return run


def rewarded(trajectory, reward):
    return dataclasses.replace(
        trajectory, steps=tuple(dataclasses.replace(step, reward=reward) for step in trajectory.steps)
    )


def test_a_group_whose_advantages_no_gradient_can_hold_is_given_up_and_the_rest_trained_on(train, caplog):
    def alter(ticket, trajectory):
        return rewarded(trajectory, 1e200) if (ticket.group, ticket.member) == (1, 0) else trajectory

    trained, _ = train(FakeRanks(), alter, learner={"updates": 2}, advantage={"normalisation": "mean"})
    assert trained == [(1, 0), (1, 2), (2, 3), (2, 4)]
    assert any("group 1 cancelled" in line and "1e+200" in line for line in caplog.messages)


def test_a_group_that_the_policy_cannot_score_is_given_up_and_the_rest_trained_on(train, caplog):
    """A marker in the data of group 1, which these ranks call not finite."""

    def alter(ticket, trajectory):
        steps = tuple(dataclasses.replace(s, prompt_ids=s.prompt_ids * 0 + MARK) for s in trajectory.steps)
        return dataclasses.replace(trajectory, steps=steps) if ticket.group == 1 else trajectory

    def refuse(work):
        return any((b.input_ids == MARK).any() for own in work for step in own for b in step.batches)

    trained, _ = train(FakeRanks(refuse), alter, learner={"updates": 2})
    assert trained == [(1, 0), (1, 2), (2, 3), (2, 4)]
    assert any("group 1 cancelled" in line and "not finite" in line for line in caplog.messages)


def test_a_run_whose_every_group_is_too_large_ends_in_one_line(train):
    with pytest.raises(RunStalled, match=r"update 1 failed in 3 tries, .* group \d+: its advantages reach"):
        train(FakeRanks(), lambda ticket, t: rewarded(t, 1e200 * ticket.member), advantage={"normalisation": "mean"})


def test_a_run_whose_policy_is_no_longer_finite_ends_in_one_line(train):
    ranks = FakeRanks(lambda work: True)
    with pytest.raises(RunStalled, match=r"no update is possible: .* finite for none of its groups") as stalled:
        train(ranks, lambda ticket, t: t)
    assert "\n" not in str(stalled.value)
    assert ranks.updates == 0


def test_a_gradient_that_overflows_without_a_culprit_ends_the_run(train):
    class Overflowing(FakeRanks):
        def finite(self, work):
            return True

    with pytest.raises(RunStalled, match="finite for each of its groups"):
        train(Overflowing(lambda work: True), lambda ticket, t: t)


def test_warnings_are_logged_and_kept_and_a_wide_gap_ends_the_run(train, tiny_config, caplog):
    with pytest.raises(RunStalled, match=r"update 3: .*max_logprob_gap=0.2"):
        train(FakeRanks(gap=0.9), lambda ticket, t: t, learner={"updates": 9, "max_logprob_gap": 0.2})
    (record,) = map(json.loads, (tiny_config.run.folder / "warnings.jsonl").read_text().splitlines())
    assert (record["update"], record["name"]) == (1, "logprob_gap")
    assert caplog.messages.count(record["text"]) == 1
