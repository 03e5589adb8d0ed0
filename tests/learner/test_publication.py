"""A version that travels while the learner goes on: what waits for it, and what does not."""

from contextlib import closing

import pytest
import torch

from learner.ledger import Ledger
from learner.publication import Publication
from learner.trainer import Trainer
from services.buffer import Buffer
from services.config.tree import Config
from services.weights import WeightsUnavailable, WeightVersion
from services.weights.channel import WeightChannel
from services.weights.directory import DirectoryChannel
from tests.learner.actors import Actors
from tests.learner.synthetic import play


class Announced(WeightChannel):
    """A channel of which only the announcement matters."""

    version = None

    def announce_initial(self):
        raise NotImplementedError

    def send(self, version, file, digest=None):
        raise NotImplementedError

    def latest(self):
        return None if self.version is None else WeightVersion(self.version, 1, "", "")


class SlowRanks:
    """Their versions travel until `arrives` says so, which is asked with the version and what the learner does."""

    checkpoint_bytes = 0
    sharing = "lines"

    def __init__(self, arrives=lambda version, doing: True):
        self._arrives = arrives
        self.travelling = None
        self.doing = "waiting"
        self.log = []

    def publish(self, version, channel):
        while not self.published():
            pass
        self.log.append(("sent", version))
        self.travelling = version, channel

    def published(self):
        if self.travelling is not None and self._arrives(self.travelling[0], self.doing):
            version, channel = self.travelling
            self.travelling = None
            channel.publish(version, {"weight": torch.full((1,), float(version))})
            self.log.append(("announced", version))
        return self.travelling is None

    def rest(self):
        """They wait as they are."""

    def update(self, work, meanwhile):
        self.log.append(("update", None))
        self.doing = "updating"
        for _ in range(3):
            self.published()
            meanwhile()
        self.doing = "waiting"
        return {"loss": 0.0}

    def save(self, folder):
        (folder / "state").write_text("")

    def export(self, folder):
        folder.mkdir()


def test_a_version_is_seen_in_the_channel_while_the_ranks_work():
    class Busy(SlowRanks):
        def publish(self, version, channel):
            pass

        def published(self):
            raise AssertionError("they work")

    channel = Announced()
    publication = Publication(channel, Busy())
    channel.version = 3
    publication.begin(4)
    assert not publication.seen()
    channel.version = 4
    assert publication.seen()
    assert publication.announced()


def test_an_unavailable_channel_is_asked_again_while_the_ranks_work():
    class Away(Announced):
        def latest(self):
            raise WeightsUnavailable("away")

    class Still(SlowRanks):
        def published(self):
            return True

    publication = Publication(Away(), Still())
    publication.begin(1)
    assert not publication.seen()
    publication.wait()
    assert publication.seen()


@pytest.fixture
def train(redis_url, tiny_config, monkeypatch):
    """Trains with `SlowRanks` and real tickets; the log has what was issued too."""

    def run(ranks, staleness, updates=4):
        learner = tiny_config.learner.model_dump() | {"updates": updates, "max_staleness": staleness}
        config = Config.model_validate(tiny_config.model_dump() | {"learner": learner})
        channel = DirectoryChannel(config.run.folder / "weights", 30.0)
        versions = {}

        def played(ticket, version):
            versions.setdefault(ticket.group, set()).add(version)
            return play(ticket, version)

        with closing(Buffer.connect(redis_url, config.run.name, config.buffer, max_attempts=1)) as buffer:
            issue = buffer.issue

            def noted(tickets):
                ranks.log += [("issued", group) for group in sorted({ticket.group for ticket in tickets})]
                return issue(tickets)

            monkeypatch.setattr(buffer, "issue", noted)
            with Actors(buffer, channel, play=played):
                Trainer(config, buffer, channel, ranks, config.run.folder, {"train": 5}).train()
        trained = [(entry.update, entry.group) for entry in Ledger(config.run.folder / "ledger.jsonl").read()]
        return trained, versions

    return run


def test_without_staleness_nothing_is_issued_before_the_version_is_announced(train):
    asked = []

    def late(version, doing):
        asked.append(version)
        return asked.count(version) >= 5

    ranks = SlowRanks(late)
    trained, versions = train(ranks, staleness=0)
    assert trained == [(1 + group // 2, group) for group in range(8)]
    assert versions == {group: {group // 2} for group in range(8)}
    for version in range(1, 4):
        first = ranks.log.index(("issued", 2 * version))
        assert ranks.log.index(("announced", version)) < first


def test_with_staleness_the_next_update_begins_while_the_version_travels(train):
    """Version 1 arrives only during the second update: its groups are issued then."""
    ranks = SlowRanks(lambda version, doing: version != 1 or doing == "updating")
    trained, versions = train(ranks, staleness=1)
    assert trained == [(1 + group // 2, group) for group in range(8)]
    assert all(min(played) >= group // 2 - 1 for group, played in versions.items())
    sent, announced = ranks.log.index(("sent", 1)), ranks.log.index(("announced", 1))
    assert ("update", None) in ranks.log[sent:announced]
    second = ranks.log.index(("update", None), sent)
    assert second < announced < ranks.log.index(("issued", 4)) < ranks.log.index(("sent", 2))


def test_a_version_that_cannot_be_stored_ends_the_run_in_one_line(train):
    def full(version, doing):
        if version == 2:
            raise WeightsUnavailable("no memory for 3 MiB of weights")
        return True

    with pytest.raises(WeightsUnavailable, match="no memory"):
        train(SlowRanks(full), staleness=0)


def test_the_last_version_is_announced_before_the_run_ends(train):
    asked = []

    def late(version, doing):
        asked.append(version)
        return version < 4 or asked.count(4) > 5

    ranks = SlowRanks(late)
    train(ranks, staleness=1)
    assert ranks.log[-1] == ("announced", 4)
