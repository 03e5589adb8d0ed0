import random
import statistics
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.evaluation import (
    Outcome,
    Rate,
    effective_episodes,
    evaluate,
    panel,
    summarise,
    summarise_splits,
    wait_for_episodes,
)
from services.buffer import Buffer
from services.buffer.keys import ticket_field
from services.config.tree import Config, EvaluationConfig
from services.errors import EnvironmentUnavailable, RunStalled
from tests.learner.synthetic import play

SPLITS = {"train": 5, "valid_unseen": 8}


def configured(run_name, timeout_s=30.0):
    return Config.model_validate(
        {
            "run": {"name": run_name},
            "evaluation": {"episodes": 7},
            "learner": {"group_timeout_s": timeout_s},
        }
    )


@pytest.fixture
def buffer(redis_url, run_name):
    buffer = Buffer.connect(redis_url, run_name, configured(run_name).buffer, max_attempts=1)
    yield buffer
    buffer.close()


def test_panels_are_paired():
    before, after = (panel(configured("run"), SPLITS, stream) for stream in ("eval-0", "eval-1"))
    assert [ticket.task.index for ticket in before] == [0, 1, 2, 3, 4, 5, 6]
    assert [ticket.task.index for ticket in panel(configured("run"), {"valid_unseen": 3}, "eval-0")] == [0, 1, 2]
    assert [(t.seed, t.task, t.temperature) for t in before] == [(t.seed, t.task, t.temperature) for t in after]
    assert len({ticket.seed for ticket in before}) == 7
    assert before[0].temperature == 0.4
    with pytest.raises(EnvironmentUnavailable, match="valid_unseen"):
        panel(configured("run"), {"train": 5}, "eval-0")


def test_held_out_tasks_come_from_the_first_such_split_there_is():
    splits = {"train": 5, "test": 4, "valid_seen": 2, "valid_unseen": 0}
    assert {ticket.task.split for ticket in panel(configured("run"), splits, "eval")} == {"valid_seen"}
    named = configured("run").model_copy(update={"evaluation": EvaluationConfig(split="train")})
    assert {ticket.task.split for ticket in panel(named, splits, "eval")} == {"train"}


def test_evaluation_beside_training_leaves_nothing_behind(buffer, run_name):
    config, progress, finished = configured(run_name), [], threading.Event()
    train = [panel(config, SPLITS, "eval")[0].model_copy(update={"stream": "train"})]
    buffer.issue(train)
    played = {}

    def actors():
        while not finished.is_set():
            for ticket in buffer.lease("actor", 2, 30.0):
                if ticket.stream == "train":
                    buffer.release("actor", [ticket.id])
                elif ticket.group == 4:
                    buffer.fail("actor", ticket.id, "broken game")
                else:
                    played[ticket.group] = play(ticket, version=3 + ticket.group % 2)
                    buffer.store(played[ticket.group])

    thread = threading.Thread(target=actors, daemon=True)
    thread.start()
    result = evaluate(
        config, buffer, SPLITS, stream="eval-3", version=3, on_progress=lambda *done: progress.append(done)
    )
    finished.set()
    thread.join()
    episodes = list(played.values())
    assert result.success == Rate(sum(e.won for e in episodes), 6)
    assert result.panels == (result.success,)
    assert result.mean_steps == pytest.approx(sum(len(e.steps) for e in episodes) / 6)
    assert result.task_types == {"look": result.success}
    assert (result.oldest_version, result.newest_version, result.cancelled, result.complete) == (3, 4, 1, True)
    assert progress[-1] == (7, 7)
    assert buffer.known("eval-3") == set()
    assert buffer.known("train") == {0}


@pytest.mark.parametrize("heals", [True, False])
def test_an_episode_that_cannot_be_read_is_played_again(buffer, run_name, monkeypatch, heals):
    """Damaged, or another ticket's in its place; where that does not end, the evaluation says so."""
    config, finished, damaged = configured(run_name), threading.Event(), []
    read = buffer.read

    def damage_then_read(stream, group):
        if group in (2, 3) and (not heals or group not in damaged):
            damaged.append(group)
            field, other = ticket_field(stream, group, 0), ticket_field(stream, 0, 0)
            foreign = b"foreign" if group == 2 else buffer._client.hget(buffer._keys["trajectories"], other)
            buffer._client.hset(buffer._keys["trajectories"], field, foreign)
        return read(stream, group)

    def actors():
        while not finished.is_set():
            for ticket in buffer.lease("actor", 2, 30.0):
                buffer.store(play(ticket, version=3))

    monkeypatch.setattr(buffer, "read", damage_then_read)
    thread = threading.Thread(target=actors, daemon=True)
    thread.start()
    try:
        if heals:
            result = evaluate(config, buffer, SPLITS, stream="eval-3")
            assert (result.success.episodes, result.complete, sorted(damaged)) == (7, True, [2, 3])
        else:
            with pytest.raises(RunStalled, match="2 episodes are unreadable after 3 attempts"):
                evaluate(config, buffer, SPLITS, stream="eval-3")
    finally:
        finished.set()
        thread.join()
    assert buffer.known("eval-3") == set()


def test_stop_and_stall(buffer, run_name):
    stopped = evaluate(configured(run_name), buffer, SPLITS, stream="eval-0", should_stop=lambda: True)
    assert not stopped.complete
    assert stopped.success.interval == (0.0, 1.0)
    with pytest.raises(RunStalled, match=r"no episode finished for 0\.1 s \(0 of 7 have\)"):
        evaluate(configured(run_name, 0.1), buffer, SPLITS, stream="eval-0")
    assert buffer.known("eval-0") == set()


@given(st.integers(0, 200), st.integers(1, 200))
def test_interval_holds_the_rate(won, episodes):
    rate = Rate(min(won, episodes), episodes)
    low, high = rate.interval
    assert 0 <= low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= high <= 1


def test_interval_is_wilsons():
    assert Rate(15, 20).interval == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert summarise([], stream="s", split="test").oldest_version is None


def test_panels_are_apart_and_summed_up_apart():
    config = configured("run").model_copy(update={"evaluation": EvaluationConfig(episodes=2, panels=3)})
    tickets = panel(config, {"valid_unseen": 10}, "eval")
    assert [ticket.task.index for ticket in tickets] == [0, 1, 2, 3, 4, 5]
    outcomes = [
        Outcome(number // 2, "look", won=number > 2, score=number / 5, steps=4, valid=number % 5, task=number)
        for number in range(6)
    ]
    result = summarise(outcomes, stream="eval", split="valid_unseen")
    assert result.panels == (Rate(0, 2), Rate(1, 2), Rate(2, 2))
    assert result.score is not None
    assert result.score.value == pytest.approx(0.5)
    assert result.score.error == pytest.approx(statistics.stdev([o.score or 0 for o in outcomes]) / 6**0.5)
    assert result.valid_fraction == pytest.approx(10 / 24)


def seeds_of(tasks, seeds=2):
    """Outcomes of tasks that were won so many times of `seeds`."""
    return [
        Outcome(0, "look", won=seed < won, score=float(won), steps=1, valid=1, task=task, seed=seed)
        for task, won in enumerate(tasks)
        for seed in range(seeds)
    ]


def test_seeds_are_further_episodes_of_the_same_tasks():
    settings = EvaluationConfig(episodes=2, panels=2, seeds=3)
    config = configured("run").model_copy(update={"evaluation": settings})
    tickets = panel(config, {"valid_unseen": 9}, "eval")
    assert [ticket.task.index for ticket in tickets] == 3 * [0, 1, 2, 3]
    assert len({ticket.seed for ticket in tickets}) == len({ticket.group for ticket in tickets}) == 12
    once = panel(config.model_copy(update={"evaluation": EvaluationConfig(episodes=2, panels=2)}), SPLITS, "eval")
    assert tickets[:4] == once
    outcomes = [Outcome.of(ticket, {"won": True}, config, steps=1, valid=1) for ticket in tickets]
    assert [(o.panel, o.task, o.seed) for o in outcomes[3:6]] == [(1, 3, 0), (0, 0, 1), (0, 1, 1)]


def test_the_interval_is_over_tasks_not_over_their_episodes():
    alike = summarise(seeds_of([2, 0] * 10), stream="s", split="test")
    assert alike.success.effective == pytest.approx(20)
    assert alike.success.interval == pytest.approx(Rate(10, 20).interval, abs=0.01)
    assert (alike.success.won, alike.success.episodes) == (20, 40)
    assert alike.seeds == (Rate(10, 20), Rate(10, 20))
    assert alike.score is not None
    assert alike.score.count == 20
    # Won once each: the tasks do not differ, so every episode counts, but not more than there are.
    assert summarise(seeds_of([1] * 20), stream="s", split="test").success.effective == 40
    # Nothing tells the episodes of a task apart.
    assert summarise(seeds_of([2] * 20), stream="s", split="test").success.interval == Rate(20, 20).interval
    assert effective_episodes([(1, 1), (0, 1), (1, 1), (1, 1)]) == pytest.approx(4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_episodes_count_as_at_least_one_a_task_and_at_most_all(tasks):
    rate = summarise(seeds_of(tasks, seeds=3), stream="s", split="test").success
    assert len(tasks) <= rate.effective <= 3 * len(tasks)
    low, high = rate.interval
    assert low - 1e-12 <= rate.value <= high + 1e-12


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Tasks are won with chances of their own: 95 % of the intervals hold their mean, those over episodes do not."""
    rng = random.Random(0)
    held, held_by_episodes, times = 0, 0, 400
    for _ in range(times):
        chances = [rng.choice([0.1, 0.9]) for _ in range(40)]
        tasks = [sum(rng.random() < chance for _ in range(4)) for chance in chances]
        rate = summarise(seeds_of(tasks, seeds=4), stream="s", split="test").success
        held += rate.interval[0] <= 0.5 <= rate.interval[1]
        low, high = Rate(rate.won, rate.episodes).interval
        held_by_episodes += low <= 0.5 <= high
    assert 0.92 < held / times < 0.98
    assert held_by_episodes / times < 0.85


def two_splits(**settings):
    several = EvaluationConfig(split=("valid_seen", "valid_unseen"), **settings)
    return configured("run").model_copy(update={"evaluation": several})


def test_each_split_has_panels_and_figures_of_its_own():
    config = two_splits(episodes=2, panels=2, seeds=2)
    tickets = panel(config, {"valid_seen": 9, "valid_unseen": 4}, "eval")
    assert [ticket.task.split for ticket in tickets] == 2 * (4 * ["valid_seen"] + 4 * ["valid_unseen"])
    assert [ticket.task.index for ticket in tickets] == 4 * [0, 1, 2, 3]
    assert len({ticket.group for ticket in tickets}) == len({ticket.seed for ticket in tickets}) == 16
    assert len(tickets) == config.evaluation.most_episodes
    won = {("valid_seen", 0), ("valid_seen", 1), ("valid_unseen", 3)}
    outcomes = [
        Outcome.of(t, {"won": (t.task.split, t.task.index) in won, "score": 0.5}, config, steps=2, valid=1)
        for t in tickets
    ]
    assert [(o.panel, o.task, o.seed) for o in outcomes[2:6]] == [(1, 2, 0), (1, 3, 0), (0, 4, 0), (0, 5, 0)]
    result = summarise_splits(config, outcomes[:-1], tickets, stream="eval", cancelled={tickets[-1].group})
    assert (result.split, result.success.won, result.success.episodes) == ("valid_seen, valid_unseen", 5, 15)
    seen, unseen = result.splits.values()
    assert (seen.success.won, seen.success.episodes, seen.cancelled) == (4, 8, 0)
    assert [rate.won for rate in seen.panels] == [4, 0]
    assert (unseen.success.won, unseen.success.episodes, unseen.cancelled, result.cancelled) == (1, 7, 1, 1)
    scalars = result.scalars()
    assert scalars["evaluation/valid_seen/success_rate"] == 0.5
    assert scalars["evaluation/valid_unseen/success_rate"] == pytest.approx(1 / 7)
    assert scalars["evaluation/success_rate"] == pytest.approx(1 / 3)
    low, high = unseen.success.interval
    assert (scalars["evaluation/valid_unseen/success_low"], scalars["evaluation/valid_unseen/success_high"]) == (
        low,
        high,
    )


def test_a_panel_larger_than_one_of_the_splits_is_that_split():
    tickets = panel(two_splits(episodes=5), {"valid_seen": 9, "valid_unseen": 3}, "eval")
    assert [(t.task.split, t.task.index) for t in tickets[4:]] == [("valid_seen", 4)] + [
        ("valid_unseen", number) for number in range(3)
    ]


def test_one_split_in_a_list_is_the_split_alone():
    alone, listed = (
        configured("run").model_copy(update={"evaluation": EvaluationConfig(split=split, episodes=3)})
        for split in ("test", ("test",))
    )
    tickets = panel(alone, {"test": 9}, "eval")
    assert panel(listed, {"test": 9}, "eval") == tickets
    outcomes = [Outcome.of(ticket, {}, listed, steps=1, valid=1) for ticket in tickets]
    result = summarise_splits(listed, outcomes, tickets, stream="eval")
    assert (result.split, result.splits) == ("test", {})


@pytest.mark.parametrize("split", ["", (), ("",), 3, {"a": 1}])
def test_what_names_no_split_is_refused(split):
    with pytest.raises(ValueError, match=r"must (not (be empty|contain an empty name)|be a split name or a list)"):
        EvaluationConfig(split=split)


def test_the_lease_of_a_dead_actor_ends_while_no_other_lives(buffer, run_name):
    """Nobody but the evaluation calls then, and one attempt is all that a ticket has here."""
    config = configured(run_name, timeout_s=10.0)
    tickets = panel(config, SPLITS, "eval")
    buffer.issue(tickets)
    assert len(buffer.lease("dead", 100, 0.3)) == len(tickets)
    wait_for_episodes(buffer, "eval", tickets, config.learner.group_timeout_s, lambda: False, lambda *_: None)
    assert len(buffer.cancelled("eval")) == len(tickets)
