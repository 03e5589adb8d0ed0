import dataclasses

import numpy as np
import pytest
import torch

from learner.dispatch import Dispatcher
from learner.prepare import prepare, step_rows
from learner.rank.losses import TokenBatch, policy_loss
from services.config.tree import Config
from tests.learner.synthetic import play


def groups_of(config, count=3):
    tickets = Dispatcher(config, {"train": 50}).tickets(range(count))
    return [[play(ticket) for ticket in tickets if ticket.group == group] for group in range(count)]


def configured(**sections):
    return Config.model_validate({"learner": {"group_size": 4}, "loss": {"kl_coef": 0.0}, **sections})


def all_batches(update):
    return [batch for own in update.work for step in own for batch in step.batches]


def test_rows_follow_groups_members_and_steps():
    groups = groups_of(configured())
    rows = step_rows(groups, configured())
    steps = [step for group in groups for episode in group for step in episode.steps]
    assert rows.reward.tolist() == [step.reward for step in steps]
    assert rows.valid.tolist() == [step.valid for step in steps]
    assert np.bincount(rows.group).tolist() == [sum(len(e.steps) for e in group) for group in groups]
    assert np.bincount(rows.trajectory).tolist() == [len(e.steps) for group in groups for e in group]
    assert rows.step.tolist() == [k for group in groups for e in group for k in range(len(e.steps))]


def ending_in(group, *finals):
    return [dataclasses.replace(episode, final_anchor=final) for episode, final in zip(group, finals, strict=True)]


def test_rows_know_the_states_that_episodes_ended_in():
    config = configured()
    groups = [ending_in(group, None, "room 0", "room 1", "elsewhere") for group in groups_of(config)]
    rows, plain = step_rows(groups, config), step_rows(groups_of(config), config)
    assert rows.step_group.tolist() == plain.step_group.tolist()
    played = [episode for group in groups for episode in group]
    ends = np.flatnonzero(np.append(np.diff(rows.trajectory), 1))
    seen = {(g, anchor): s for g, s, anchor in zip(rows.group, rows.step_group, anchors_of(played), strict=True)}
    for end, episode in zip(ends, played, strict=True):
        state = rows.next_state[end]
        if episode.final_anchor is None:
            assert state == -1
        else:
            assert state == seen.get((rows.group[end], episode.final_anchor), state)
            assert ((rows.group[end], episode.final_anchor) in seen) == (state <= rows.step_group.max())
    inner = np.setdiff1d(np.arange(len(rows)), ends)
    assert rows.next_state[inner].tolist() == rows.step_group[inner + 1].tolist()


def anchors_of(played):
    return [step.anchor for episode in played for step in episode.steps]


def test_similarity_of_the_graph_leaves_step_groups_exact():
    config = configured(algorithm="graphgpo", advantage={"similarity": 0.5})
    rows = step_rows(groups_of(config), config)
    assert rows.step_group.tolist() == step_rows(groups_of(config), configured()).step_group.tolist()
    # `room 0` and `room 1` are alike: one node in each group.
    assert len(set(rows.state.tolist())) == len(set(rows.group.tolist()))
    prepare(groups_of(config), config, 0)


def test_rows_that_cannot_move_the_policy_are_left_out_but_counted():
    config = configured(algorithm="grpo", advantage={"invalid_action_penalty": 0.0})
    groups = groups_of(config, count=8)
    update = prepare(groups, config, 0)
    undecided = [group for group in groups if len({episode.won for episode in group}) == 1]
    lost = sum(len(episode.steps) for group in undecided for episode in group)
    assert 0 < lost < update.rows
    assert update.trained_rows == update.rows - lost
    assert {step.total_tokens for own in update.work for step in own} == {update.response_tokens}
    assert {step.total_rows for own in update.work for step in own} == {update.rows}
    assert all((np.abs(batch.advantage) > 0).all() for batch in all_batches(update))


def test_with_other_loss_terms_every_row_is_needed():
    config = configured(algorithm="grpo", loss={"kl_coef": 0.1})
    update = prepare(groups_of(config, count=8), config, 0)
    assert update.trained_rows == update.rows


def cut_off(group, wanted):
    """The group with the responses of `wanted` tokens ended by the limit."""
    return [
        dataclasses.replace(
            episode,
            steps=tuple(dataclasses.replace(s, finished=len(s.response_ids) != wanted) for s in episode.steps),
        )
        for episode in group
    ]


@pytest.mark.parametrize("loss", [{"kl_coef": 0.0}, {"kl_coef": 0.1, "entropy_coef": 0.1}])
def test_responses_that_were_cut_off_are_not_trained_on_if_so_wished(loss):
    wished = {"ignore_cut_responses": True}
    config = configured(algorithm="grpo", loss=loss, advantage=wished, model={"max_response_tokens": 3})
    # Others reach the limit with their last token, and are whole.
    groups = [cut_off(group, 2) for group in groups_of(config, count=8)]
    steps = [step for group in groups for episode in group for step in episode.steps]
    assert max(len(step.response_ids) for step in steps) == 3
    update, cut = prepare(groups, config, 0), np.array([not step.finished for step in steps])
    assert update.cut_fraction == cut.mean()
    assert 0 < cut.sum() < len(steps)
    assert not update.advantages.total[cut].any()
    assert update.advantages.total[~cut].any()
    total = sum(len(step.response_ids) for step in steps)
    assert {step.total_tokens for own in update.work for step in own} == {total}
    assert {step.total_rows for own in update.work for step in own} == {len(steps)}
    trained = sum(int(batch.weight.sum()) for batch in all_batches(update))
    all_kept = sum(len(step.response_ids) for step in steps if step.finished)
    assert trained == all_kept if loss["kl_coef"] else 0 < trained <= all_kept
    ends = {tuple(step.response_ids) for step in steps if not step.finished}
    for batch in all_batches(update):
        for number in range(batch.sequence[-1] + 1):
            own = batch.sequence == number
            assert tuple(batch.targets[own]) not in ends or not batch.weight[own].any()
    assert prepare(groups, configured(algorithm="grpo", loss=loss), 0).advantages.total[cut].any()


def test_what_does_not_count_moves_nothing():
    """An update in which every response was cut: KL and entropy terms have no gradient either."""
    loss = {"kl_coef": 0.1, "entropy_coef": 0.1}
    config = configured(algorithm="grpo", loss=loss, advantage={"ignore_cut_responses": True})
    groups = [
        [dataclasses.replace(e, steps=tuple(dataclasses.replace(s, finished=False) for s in e.steps)) for e in g]
        for g in groups_of(config)
    ]
    update = prepare(groups, config, 0)
    assert update.trained_rows == 0
    (batch,) = all_batches(update)
    behaviour = torch.tensor(batch.behaviour)
    logprob, entropy = (behaviour + 0.5).requires_grad_(), torch.ones_like(behaviour).requires_grad_()
    tokens = TokenBatch(
        logprob=logprob,
        behaviour=behaviour,
        advantage=torch.tensor(batch.advantage),
        weight=torch.tensor(batch.weight),
        old=behaviour,
        reference=behaviour,
        entropy=entropy,
        sequence=torch.tensor(batch.sequence),
    )
    policy_loss(tokens, config.loss, 1.0).loss.backward()
    assert not logprob.grad.any()
    assert not entropy.grad.any()


def test_without_any_advantage_the_optimizer_step_remains():
    config = configured(algorithm="grpo", advantage={"invalid_action_penalty": 0.0})
    groups = groups_of(config, count=8)
    undecided = [group for group in groups if len({episode.won for episode in group}) == 1]
    update = prepare(undecided, config, 0)
    assert update.trained_rows == 0
    (batch,) = all_batches(update)
    assert not batch.advantage.any()


def test_minibatches_split_the_trajectories_and_differ_from_update_to_update():
    config = configured(learner={"group_size": 4, "minibatches": 3, "ranks": 2})
    groups = groups_of(config)
    first, again, second = prepare(groups, config, 0), prepare(groups, config, 0), prepare(groups, config, 1)
    for own in first.work:
        assert len(own) == 3
        assert sum(step.total_tokens for step in own) == first.response_tokens
        assert sum(step.total_rows for step in own) == first.rows
    assert [step.total_tokens for step in first.work[0]] == [step.total_tokens for step in again.work[0]]
    assert [step.total_tokens for step in first.work[0]] != [step.total_tokens for step in second.work[0]]
