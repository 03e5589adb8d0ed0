"""Warnings of an update's figures: when, once, and with which cause."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.dispatch import Dispatcher
from learner.prepare import prepare
from learner.record import WarningLog
from learner.signal import ANCHORS, CUT, EQUAL, GAP, INVALID, STALE_UPDATES, Figures, Signal, figures
from services.config.tree import Config
from services.errors import RunStalled
from tests.learner.synthetic import play

SOUND = Figures(steps=10, valid=9, cut=1, equal_groups=False, repeated_anchors=6, counted=8, gap=0.001)
CONFIG = Config()


def over(updates, config=CONFIG, **changes):
    """All warnings of so many updates of the same figures, with the update that gave each."""
    signal = Signal()
    return {
        name: (update, text)
        for update in range(1, updates + 1)
        for name, text in signal.judge(update, replace(SOUND, **changes), config).items()
    }


def test_a_sound_run_hears_nothing():
    assert over(50) == {}


@pytest.mark.parametrize(
    ("name", "changes", "first", "cause"),
    [
        (INVALID, {"valid": 0}, 1, "prompt.template=think"),
        (EQUAL, {"equal_groups": True}, 5, "same reward"),
        (CUT, {"cut": 6}, 1, "model.max_response_tokens=24"),
        (ANCHORS, {"repeated_anchors": 0}, 3, "GiGPO is reduced to GRPO"),
        (GAP, {"gap": 0.06}, 1, "0.06 nats"),
    ],
)
def test_each_warning_comes_once_with_its_cause(name, changes, first, cause):
    given = over(20, **changes)
    assert given.keys() == {name}
    update, text = given[name]
    assert update == first
    assert cause in text
    assert "\n" not in text
    assert text.startswith(f"update {first}: ")


@pytest.mark.parametrize(
    "changes", [{"valid": 1}, {"cut": 5}, {"repeated_anchors": 2}, {"gap": 0.05}, {"gap": None}], ids=str
)
def test_what_is_just_sound_is_not_warned_of(changes):
    assert over(20, **changes) == {}


def test_one_update_of_another_kind_starts_the_count_again():
    signal = Signal()
    for update in range(1, 30):
        seen = replace(SOUND, equal_groups=update % 5 != 0, repeated_anchors=update % 3 == 0)
        assert signal.judge(update, seen, CONFIG) == {}


def test_algorithms_that_use_no_anchors_do_not_miss_them():
    assert over(9, Config(algorithm="grpo"), repeated_anchors=0) == {}
    assert "HGPO has nothing to compare" in over(9, Config(algorithm="hgpo"), repeated_anchors=0)[ANCHORS][1]


def test_episodes_that_only_begin_alike_repeat_no_state():
    assert over(9, repeated_anchors=0, counted=0) == {}  # one turn each
    assert "(4 of 100 turns)" in over(9, repeated_anchors=4, counted=100)[ANCHORS][1]
    assert over(9, repeated_anchors=5, counted=100) == {}


@pytest.mark.parametrize(("world", "said"), [("own", "agent.anchor=last"), ("bound", "env.anchor")])
def test_what_helps_against_lone_anchors_of_agents_is_named(world, said):
    config = Config.model_validate({"agent": {"service": True, "environment": world}})
    assert said in over(9, config, repeated_anchors=0)[ANCHORS][1]


def with_limit(limit):
    return Config.model_validate({"learner": {"max_logprob_gap": limit}})


def test_a_gap_that_stays_above_the_limit_ends_the_run_in_its_third_update():
    with pytest.raises(RunStalled, match=r"update 3: .* 0\.3 nats apart .* learner.max_logprob_gap=0.2, in 3 updates"):
        over(3, gap=0.3)
    assert over(2, gap=0.3).keys() == {GAP}
    assert over(9, with_limit(None), gap=99.0).keys() == {GAP}
    with pytest.raises(RunStalled):
        over(3, with_limit(0.01), gap=0.02)


@given(st.lists(st.sampled_from([None, 0.0, 0.19, 0.21, 5.0]), max_size=30))
def test_only_three_measured_gaps_in_a_row_end_a_run(gaps):
    measured = [gap for gap in gaps if gap is not None]
    ends = any(all(gap > 0.2 for gap in measured[n : n + 3]) for n in range(len(measured) - 2))
    signal = Signal()
    try:
        for update, gap in enumerate(gaps):
            signal.judge(update, replace(SOUND, gap=gap), CONFIG)
    except RunStalled:
        assert ends
    else:
        assert not ends


def test_a_run_without_fresh_tokens_is_judged_by_older_ones_after_a_while():
    assert over(STALE_UPDATES - 1, gap=None, stale_gap=0.1) == {}
    update, text = over(20, gap=None, stale_gap=0.1)[GAP]
    assert update == STALE_UPDATES
    assert "0.1 nats" in text
    assert "older tokens" in text
    with pytest.raises(RunStalled, match=f"update {STALE_UPDATES + 2}: .* older tokens"):
        over(20, gap=None, stale_gap=0.3)


def test_the_gap_of_older_tokens_is_not_judged_while_there_are_fresh_ones():
    signal = Signal()
    for update in range(1, 40):
        fresh = 1e-6 if update % STALE_UPDATES == 0 else None
        assert signal.judge(update, replace(SOUND, gap=fresh, stale_gap=9.0), CONFIG) == {}


def test_figures_are_those_of_the_played_groups(tiny_config):
    tickets = Dispatcher(tiny_config, {"train": 9}).tickets(range(4))
    groups = {g: [play(ticket) for ticket in tickets if ticket.group == g] for g in range(4)}
    prepared = prepare(list(groups.values()), tiny_config, 0)
    seen = figures(groups.values(), prepared.table, {"fresh_gap": 0.5})
    steps = [step for group in groups.values() for t in group for step in t.steps]
    assert (seen.steps, seen.valid, seen.cut) == (len(steps), sum(step.valid for step in steps), 0)
    turns = [
        (number, sum(s.anchor == step.anchor for t in group for s in t.steps) > 1)
        for group in groups.values()
        for t in group
        for number, step in enumerate(t.steps)
    ]
    counted = [is_repeated for number, is_repeated in turns if number > 0 or not is_repeated]
    assert (seen.repeated_anchors, seen.counted) == (sum(counted), len(counted))
    assert len(counted) < len(turns)
    assert seen.gap == 0.5
    assert figures(groups.values(), prepared.table, {"logprob_gap": 0.1}).gap is None
    assert figures(groups.values(), prepared.table, {"logprob_gap": 0.1}).stale_gap == 0.1


def test_only_tokens_of_the_version_that_is_updated_are_fresh(tiny_config):
    tickets = Dispatcher(tiny_config, {"train": 9}).tickets(range(2))
    played = [[play(ticket, version=3 + ticket.group) for ticket in tickets if ticket.group == g] for g in range(2)]
    for version, group in ((3, 0), (4, 1)):
        work = prepare(played, tiny_config, version).work
        fresh = sum(float(batch.fresh.sum()) for own in work for step in own for batch in step.batches)
        assert fresh == sum(trajectory.response_tokens for trajectory in played[group])


def test_a_warning_that_was_given_is_remembered_over_a_resumption(tmp_path):
    log = WarningLog(tmp_path)
    assert log.names() == set()
    log.append(4, CUT, "…")
    (tmp_path / "warnings.jsonl").open("a").write('{"broken')
    assert WarningLog(tmp_path).names() == {CUT}
    signal = Signal(given=WarningLog(tmp_path).names())
    assert signal.judge(5, replace(SOUND, cut=10), CONFIG) == {}
    log.clear()
    assert log.names() == set()
