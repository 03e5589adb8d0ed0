"""The whole loop: real Redis, real DeepSpeed rank, a real weight channel, and a thread that plays the actors."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import zlib
from collections import Counter
from contextlib import closing

import pytest
import redis
import torch

from learner.checkpoint import best, latest
from learner.dispatch import Dispatcher
from learner.ledger import Ledger
from learner.rank.group import start_ranks
from learner.trainer import Trainer
from services.buffer import Buffer
from services.buffer.commands import Action, Command
from services.buffer.keys import Keys
from services.config.tree import Config
from services.errors import CheckpointFailed, RunStalled
from services.model_folder import read_weights
from services.weights.directory import DirectoryChannel
from tests.learner.actors import Actors
from tests.learner.published import published
from tests.learner.synthetic import Publishing, play

SPLITS = {"train": 5}


@pytest.fixture
def buffer(redis_url, tiny_config):
    buffer = Buffer.connect(redis_url, tiny_config.run.name, tiny_config.buffer, max_attempts=1)
    yield buffer
    buffer.close()


@pytest.fixture
def channel(tiny_config):
    return DirectoryChannel(tiny_config.run.folder / "weights", 30.0)


@pytest.fixture(scope="module")
def started(ray_cluster, tiny_settings, tmp_path_factory):
    """One rank for all tests, and its engine as it was at the start."""
    group, beginning = start_ranks(Config.model_validate(tiny_settings)), tmp_path_factory.mktemp("engine")
    group.save(beginning)
    yield group, beginning
    group.stop()


@pytest.fixture
def ranks(started):
    group, beginning = started
    group.load(beginning)
    return group


class Killed(BaseException):
    """What ends a trainer without giving it time for anything."""


class NoRanks(Publishing):
    """Ranks for tests that never get as far as an update."""

    checkpoint_bytes = 0
    sharing = "lines"

    def weights(self):
        return {"weight": torch.zeros(1)}


def trainer(config, buffer, channel, ranks, **hooks):
    return Trainer(config, buffer, channel, ranks, config.run.folder, SPLITS, **hooks)


def with_learner(config, **values):
    return Config.model_validate(config.model_dump() | {"learner": config.learner.model_dump() | values})


def trained(config):
    return [(entry.update, entry.group) for entry in Ledger(config.run.folder / "ledger.jsonl").read()]


def test_a_version_that_the_channel_lost_is_published_again(tiny_config, buffer, channel):
    """As Ray's holder is empty after its node died: nobody could play, so no update would ever be due."""
    published = []

    class Forgetful(DirectoryChannel):
        def publish(self, version, tensors):
            published.append(version)
            return super().publish(version, tensors)

        def latest(self):
            return None if len(published) < 3 else super().latest()

    forgetful = Forgetful(tiny_config.run.folder / "weights", 30.0)
    trainer(tiny_config, buffer, forgetful, NoRanks(), should_stop=lambda: len(published) > 2).train()
    assert published == [0, 0, 0]


def test_a_version_that_the_channel_lost_is_published_again_while_a_panel_is_played(tiny_config, buffer, channel):
    """Redis may come back without the last second: the channel then names the version before, or none."""
    config = Config.model_validate(tiny_config.model_dump() | {"evaluation": {"every": 1}})
    seen = []

    def play_panel(version, should_stop):
        channel.publish(version - 1, {"weight": torch.ones(1)})
        assert not should_stop()
        seen.append(channel.latest().version)
        return {}

    trainer(config, buffer, channel, NoRanks(), evaluate=play_panel, should_stop=lambda: bool(seen)).train()
    assert seen == [0]


def test_a_full_buffer_brings_a_checkpoint_forward_while_the_next_update_waits(
    tiny_config, buffer, channel, ranks, monkeypatch
):
    """Only groups that were trained on can make room, and only a checkpoint lets go of them."""
    config = Config.model_validate(tiny_config.model_dump() | {"checkpoint": {"every": 100}})
    reports = []
    monkeypatch.setattr(buffer, "full", lambda: len(reports) == 1)  # while the second update waits
    with Actors(buffer, channel):
        trainer(with_learner(config, updates=2), buffer, channel, ranks, on_update=reports.append).train()
    assert sorted(path.name for path in (config.run.folder / "checkpoints").iterdir()) == ["000001", "000002"]


def test_a_group_that_cannot_be_read_is_played_again(tiny_config, buffer, channel, ranks, redis_url, caplog):
    """Damaged, or written by another version of the code: `--resume` would meet it again and again."""
    config, reports = with_learner(tiny_config, updates=1, max_staleness=0), []
    channel.publish(0, {"weight": torch.ones(1)})
    dispatcher = Dispatcher(config, SPLITS)
    with Actors(buffer, channel):
        buffer.issue(dispatcher.tickets(dispatcher.advance(1)))
        while len(buffer.complete("train")) < config.learner.groups_per_update:
            buffer.wait("train", 1.0)
    with redis.Redis.from_url(redis_url) as client:
        key = Keys(config.run.name)["trajectories"]
        client.hset(key, min(client.hkeys(key)), b"no trajectory")
    with Actors(buffer, channel):
        trainer(config, buffer, channel, ranks, on_update=reports.append).train(resume=True)
    assert trained(config) == [(1, 0), (1, 1)]
    assert reports[0].dropped_stale == 0
    assert "group 0 unreadable, issuing it again" in caplog.text


def test_the_panel_is_played_at_fixed_intervals_with_the_version_just_published(tiny_config, buffer, channel, ranks):
    settings = {"evaluation": {"every": 2}, "learner": tiny_config.learner.model_dump() | {"updates": 5}}
    config, panels = Config.model_validate(tiny_config.model_dump() | settings), []

    def play_panel(version, should_stop):
        assert not should_stop()
        panels.append((version, channel.latest().version))
        return {"evaluation/success_rate": version / 10}

    with Actors(buffer, channel):
        trainer(config, buffer, channel, ranks, evaluate=play_panel).train()
    assert panels == [(0, 0), (2, 2), (4, 4)]
    records = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    found = best(config.run.folder / "checkpoints")
    assert found is not None
    assert found[0].name == "best-000004"
    assert read_weights(found[0]).keys() == read_weights(config.model.path).keys()
    rates = [(r["step"], r["evaluation/success_rate"]) for r in records if "evaluation/success_rate" in r]
    assert rates == [(0, 0.0), (2, 0.2), (4, 0.4)]


def test_what_people_ask_for_is_done_between_updates(tiny_config, buffer, channel, ranks):
    """`evaluate` twice, played to its end and cut short, and `checkpoint`, as the control plane passes them on."""
    config = Config.model_validate(with_learner(tiny_config, updates=3).model_dump() | {"checkpoint": {"every": 100}})
    panels, after_first = [], []

    def play_panel(version, should_stop):
        panels.append((version, channel.latest().version))
        return {"evaluation/success_rate": 0.4} if len(panels) == 1 else {}

    def ask(report):
        if report.update == 1:
            for name, action in enumerate((Action.EVALUATE, Action.CHECKPOINT, Action.EVALUATE)):
                assert buffer.commands.request(Command(id=str(name), action=action, by="test", at=0.0))
        elif report.update == 2:
            after_first.append(latest(config.run.folder / "checkpoints"))

    with Actors(buffer, channel):
        trainer(config, buffer, channel, ranks, evaluate=play_panel, on_update=ask).train()
    assert panels == [(1, 1), (1, 1)]
    [written] = after_first
    assert written.name == "000001"
    answers = [(command.answer.done, command.answer.text) for command in buffer.commands.all()]
    assert answers == [
        (True, "success 40.0%"),
        (True, "checkpoint 000001 written"),
        (False, "the panel was cut short"),
    ]
    records = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "evaluation/success_rate" in r] == [1]
    # The checkpoint's groups have left Redis; those of later updates leave with the last one.
    assert buffer.known("train").isdisjoint(group for _, group in trained(config))


def test_killed_and_resumed_run_trains_each_group_once_and_ends_with_the_same_weights(
    tiny_config, buffer, channel, ranks
):
    config = with_learner(tiny_config, updates=7, max_staleness=1)
    reports = []

    def die_after_the_third(report):
        reports.append(report)
        if report.update == 3:
            raise Killed

    def kill_the_rank_once(report):
        reports.append(report)
        if report.update == 5 and sum(r.update == 5 for r in reports) == 1:
            os.kill(ranks.pids[0], signal.SIGKILL)

    with Actors(buffer, channel, broken=(1,)):
        with pytest.raises(Killed):
            trainer(config, buffer, channel, ranks, on_update=die_after_the_third).train()
        # Update 3 is lost, its groups are not.
        assert latest(config.run.folder / "checkpoints").name == "000002"
        assert {2 * 2 + 1, 2 * 2 + 2} <= set(buffer.complete("train"))
        second = trainer(config, buffer, channel, ranks, on_update=kill_the_rank_once)
        second.train(resume=True)

    assert second.version == 7
    assert [report.update for report in reports] == [1, 2, 3, 3, 4, 5, 5, 6, 7]
    groups = [group for group in range(15) if group != 1]
    assert trained(config) == [(1 + place // 2, group) for place, group in enumerate(groups)]
    assert sum(report.cancelled for report in reports[:3]) == 1
    assert max(report.staleness_max for report in reports) <= 1
    assert buffer.known("train") == set()
    # The lost updates were done again on the same groups: same loss, to the bit.
    by_update = {update: [r.loss["loss"] for r in reports if r.update == update] for update in (3, 5)}
    assert all(first == second for first, second in by_update.values())
    newest = channel.latest()
    assert newest.version == 7
    now = published(ranks)
    for name, tensor in channel.fetch(newest).items():
        assert torch.equal(tensor, now[name])
    steps = [json.loads(line)["step"] for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))
    assert latest(config.run.folder / "checkpoints").name == "000007"
    record = buffer.metrics()[-1]
    assert (record["kind"], record["update"]) == ("update", 7)
    assert record["loss/ratio"] == record["loss/ratio_max"] == pytest.approx(1.0)


def with_panels(config, updates):
    learner = config.learner.model_dump() | {"updates": updates}
    return Config.model_validate(config.model_dump() | {"evaluation": {"every": 2}, "learner": learner})


def records(config, name):
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if name in record]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_what_ends_a_run_in_a_panel_loses_neither_the_panel_nor_the_updates_figures(
    tiny_config, buffer, channel, ranks, how
):
    config, panels, stop = with_panels(tiny_config, 5), [], threading.Event()

    def play_panel(version, should_stop):
        panels.append(version)
        if panels == [0, 2]:
            if how == "killed":
                raise Killed
            stop.set()
            return {}
        return {"evaluation/success_rate": {0: 0.1, 2: 0.9, 4: 0.2}[version]}

    def again():
        return trainer(config, buffer, channel, ranks, evaluate=play_panel, should_stop=stop.is_set)

    with Actors(buffer, channel):
        if how == "killed":
            with pytest.raises(Killed):
                again().train()
        else:
            again().train()
        assert latest(config.run.folder / "checkpoints").name == "000002"
        assert records(config, "rollout/success_rate") == [1, 2]
        assert records(config, "evaluation/success_rate") == [0]
        stop.clear()
        again().train(resume=True)
        again().train(resume=True)
    assert panels == [0, 2, 2, 4]
    assert records(config, "rollout/success_rate") == [1, 2, 3, 4, 5]
    assert records(config, "evaluation/success_rate") == [0, 2, 4]
    assert best(config.run.folder / "checkpoints") == (config.run.folder / "checkpoints" / "best-000002", 0.9)


def test_a_kill_at_a_checkpoint_does_not_lose_the_figures_of_its_update(tiny_config, buffer, channel, ranks):
    config = with_learner(tiny_config, updates=4)

    class DiesAfterSaving(Trainer):
        def _acknowledge(self):
            if self.version == 2:
                raise Killed

    with Actors(buffer, channel):
        with pytest.raises(Killed):
            DiesAfterSaving(config, buffer, channel, ranks, config.run.folder, SPLITS).train()
        trainer(config, buffer, channel, ranks).train(resume=True)
    assert records(config, "rollout/success_rate") == [1, 2, 3, 4]


def test_ranks_that_die_in_a_panel_cost_the_panel_and_not_the_best_policy(tiny_config, buffer, channel, ranks):
    """The ranks write the best policy: after their restart the panel is played again."""
    config, panels = with_panels(tiny_config, 4), []

    def play_panel(version, should_stop):
        panels.append(version)
        if panels == [0, 2]:
            os.kill(ranks.pids[0], signal.SIGKILL)
        return {"evaluation/success_rate": {0: 0.1, 2: 0.9, 4: 0.2}[version]}

    with Actors(buffer, channel):
        run = trainer(config, buffer, channel, ranks, evaluate=play_panel)
        run.train()
    assert run.version == 4
    assert panels == [0, 2, 2, 4]
    assert records(config, "evaluation/success_rate") == [0, 2, 4]
    assert best(config.run.folder / "checkpoints")[0].name == "best-000002"


def test_a_synchronous_run_that_was_killed_ends_with_the_same_bits(tiny_config, redis_url, started):
    """Each episode depends on every bit of the weights that played it. The resumed half has ranks of new processes."""
    group, beginning = started
    ends = []
    for name, killed in (("whole", False), ("killed", True)):
        run = tiny_config.run.model_copy(update={"name": f"{tiny_config.run.name}-{name}"})
        config = with_learner(tiny_config.model_copy(update={"run": run}), updates=7, max_staleness=0)
        channel = DirectoryChannel(config.run.folder / "weights", 30.0)
        group.load(beginning)

        def by_these_weights(ticket, version, channel=channel):
            digest = zlib.crc32(channel.latest().checksum.encode())
            return dataclasses.replace(play(ticket.model_copy(update={"seed": digest}), version), ticket=ticket)

        def die(report):
            if report.update == 3:
                raise Killed

        buffer = Buffer.connect(redis_url, config.run.name, config.buffer, max_attempts=1)
        with closing(buffer), Actors(buffer, channel, play=by_these_weights):
            if killed:
                with pytest.raises(Killed):
                    trainer(config, buffer, channel, group, on_update=die).train()
                group.restart()
            trainer(config, buffer, channel, group).train(resume=killed)
        checkpoint = latest(config.run.folder / "checkpoints")
        assert checkpoint.name == "000007"
        files = sorted([*(checkpoint / "engine").iterdir(), checkpoint / "policy" / "model.safetensors"])
        ends.append({file.name: file.read_bytes() for file in files})
    whole, resumed = ends
    assert whole.keys() == resumed.keys() >= {"engine.json", "random-00000.safetensors", "model.safetensors"}
    for name, content in whole.items():
        assert content == resumed[name], name


def flip_a_byte(checkpoint):
    file = checkpoint / "engine" / "state-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def take_another_engine(checkpoint):
    shutil.rmtree(checkpoint / "engine")
    shutil.copytree(checkpoint.with_name("000004") / "engine", checkpoint / "engine")


def fill_the_random_state_with_garbage(checkpoint):
    (checkpoint / "engine" / "random-00000.safetensors").write_bytes(b"garbage")


@pytest.mark.parametrize("damage", [flip_a_byte, take_another_engine, fill_the_random_state_with_garbage])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_and_trains_each_group_once(
    tiny_config, buffer, channel, ranks, damage, caplog
):
    """The groups since the older checkpoint have left Redis: they are played again."""
    config, checkpoints, reports = with_learner(tiny_config, updates=7), tiny_config.run.folder / "checkpoints", []

    def stop():
        return reports[-1:] == [5]

    with Actors(buffer, channel, broken=(1,)):
        trainer(
            config, buffer, channel, ranks, on_update=lambda report: reports.append(report.update), should_stop=stop
        ).train()
        # The last checkpoint is the one that the stop left behind.
        assert sorted(path.name for path in checkpoints.iterdir()) == ["000004", "000005"]
        damage(checkpoints / "000005")
        assert channel.latest().version == 5
        second = trainer(config, buffer, channel, ranks, on_update=lambda report: reports.append(report.update))
        second.train(resume=True)
    assert channel.latest().version == 7
    assert reports == [1, 2, 3, 4, 5, 5, 6, 7]
    groups = [group for group in range(15) if group != 1]
    assert trained(config) == [(1 + place // 2, group) for place, group in enumerate(groups)]
    assert buffer.known("train") == set()
    assert "000005 is damaged: " in caplog.text
    assert "using 000004 instead" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000006", "000007"]
    assert records(config, "rollout/success_rate") == list(range(1, 8))


def test_stale_groups_are_dropped_and_played_again(tiny_config, buffer, channel, ranks):
    config = with_learner(tiny_config, updates=3, max_staleness=0)
    played: Counter[int] = Counter()

    def late(newest):
        """The first episodes after each publication still come from the version before."""
        played[newest] += 1
        return newest - 1 if newest and played[newest] <= 2 else newest

    reports = []
    with Actors(buffer, channel, late):
        trainer(config, buffer, channel, ranks, on_update=reports.append).train()
    assert [report.staleness_max for report in reports] == [0, 0, 0]
    assert [report.dropped_stale for report in reports] == [0, 1, 1]
    assert trained(config) == [(1, 0), (1, 1), (2, 2), (2, 3), (3, 4), (3, 5)]


def test_stop_leaves_a_checkpoint_and_groups_lost_by_redis_are_issued_again(tiny_config, buffer, channel, ranks):
    config = with_learner(tiny_config, updates=50)
    reports = []
    with Actors(buffer, channel):
        stopped = trainer(
            config, buffer, channel, ranks, on_update=reports.append, should_stop=lambda: len(reports) >= 3
        )
        stopped.train()
    assert latest(config.run.folder / "checkpoints").name == "000003"
    with pytest.raises(CheckpointFailed, match="continue that run with --resume"):
        trainer(config, buffer, channel, ranks).train()
    buffer.remove("train", sorted(buffer.known("train")))
    with Actors(buffer, channel):
        trainer(with_learner(config, updates=5), buffer, channel, ranks).train(resume=True)
    assert trained(config) == [(1 + group // 2, group) for group in range(10)]


def test_nothing_completes(tiny_config, buffer, channel):
    config = with_learner(tiny_config, group_timeout_s=0.2)
    with pytest.raises(RunStalled, match=r"no group completed for 0\.2 s"):
        trainer(config, buffer, channel, NoRanks()).train()


def test_every_group_is_cancelled(tiny_config, buffer, channel):
    with Actors(buffer, channel, broken=range(1000)), pytest.raises(RunStalled, match="were cancelled"):
        trainer(tiny_config, buffer, channel, NoRanks()).train()


def test_every_group_is_stale(tiny_config, buffer, channel):
    with Actors(buffer, channel, lambda newest: -9), pytest.raises(RunStalled, match="too old"):
        trainer(tiny_config, buffer, channel, NoRanks()).train()
