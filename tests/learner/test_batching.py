import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import Row, plan


def make(shape):
    prompt, response, value = shape
    tokens = (np.arange(prompt + response) * 7 + value) % 50 + 1
    return Row(tokens.astype(np.int32), np.full(response, -float(value), np.float32), float(value))


rows = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3)).map(make), min_size=1, max_size=40)


def content(batch):
    """Each token of a batch, with all that the loss will see of it: prefix, target, log-probability, advantage."""
    length = batch.input_ids.shape[1]
    for position, target, behaviour, advantage in zip(
        batch.positions, batch.targets, batch.behaviour, batch.advantage, strict=True
    ):
        line, place = divmod(int(position), length)
        yield tuple(batch.input_ids[line, : place + 1].tolist()), int(target), float(behaviour), float(advantage)


def expected(row):
    first = len(row.tokens) - row.response_tokens
    for k in range(row.response_tokens):
        prefix = tuple(row.tokens[: first + k].tolist())
        yield prefix, int(row.tokens[first + k]), float(row.logprobs[k]), row.advantage


@given(rows, st.integers(1, 3), st.integers(10, 120))
def test_every_token_is_there_once(some, ranks, budget):
    batches = [b for own in plan(some, ranks, budget) for b in own if b.weight.all()]
    assert sorted(t for b in batches for t in content(b)) == sorted(t for row in some for t in expected(row))


@given(rows, st.integers(1, 3), st.integers(10, 120))
def test_budget_and_equal_number_of_passes(some, ranks, budget):
    planned = plan(some, ranks, budget)
    assert len({len(own) for own in planned}) == 1
    for batch in (batch for own in planned for batch in own):
        assert batch.input_ids.size <= budget or len(batch.input_ids) == 1
        assert set(batch.weight) in ({0.0}, {1.0})


@given(rows, st.integers(1, 3))
def test_ranks_get_equally_many_sequences(some, ranks):
    counts = [sum(len(b.input_ids) for b in own if b.weight.all()) for own in plan(some, ranks, 64)]
    assert max(counts) - min(counts) <= 1


def test_rows_of_the_same_tokens_share_a_sequence_and_keep_their_own_losses():
    first = make((4, 2, 1))
    second = Row(first.tokens, first.logprobs - 1, -3.0)
    ((batch,),) = plan([first, second], 1, 64)
    assert batch.input_ids.shape == (1, 6)
    assert batch.advantage.tolist() == [1.0, 1.0, -3.0, -3.0]
    assert batch.behaviour.tolist() == [-1.0, -1.0, -2.0, -2.0]


def test_steps_that_go_on_from_one_another_are_one_sequence():
    tokens = np.arange(1, 13, dtype=np.int32)
    steps = [Row(tokens[:end], np.full(2, -float(end), np.float32), float(end)) for end in (4, 8, 12)]
    other = Row(np.array([1, 2, 3, 9, 9], np.int32), np.zeros(1, np.float32), 5.0)
    ((batch,),) = plan([*steps, other], 1, 64)
    assert batch.input_ids.shape == (2, 12)
    assert batch.tokens == 17
    assert sorted(content(batch)) == sorted(t for row in [*steps, other] for t in expected(row))


@given(rows, st.integers(1, 3))
def test_as_few_sequences_as_the_rows_allow(some, ranks):
    texts = {tuple(row.tokens.tolist()) for row in some}
    leaves = [t for t in texts if not any(len(o) > len(t) and o[: len(t)] == t for o in texts)]
    planned = plan(some, ranks, 64)
    assert sum(len(b.input_ids) for own in planned for b in own if b.weight.all()) == len(leaves)
    assert sum(b.tokens for own in planned for b in own) == sum(map(len, leaves))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        plan([], 1, 64)
