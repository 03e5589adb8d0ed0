import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import MIN_SHARED, UNITS_PER_BATCH, Row, plan


def make(shape):
    prompt, response, value = shape
    tokens = (np.arange(prompt + response) * 7 + value) % 50 + 1
    return Row(tokens.astype(np.int32), np.full(response, -float(value), np.float32), float(value))


rows = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3)).map(make), min_size=1, max_size=40)


def path(batch, position):
    """The tokens of the line that a token's hidden state depends on, itself the last."""
    own = int(np.searchsorted(batch.starts, position, side="right")) - 1
    read = batch.path[batch.path_starts[own] : batch.path_starts[own + 1]]
    return read[: int(np.flatnonzero(read == position)[0]) + 1]


def content(batch):
    """Each token of a batch, with all that the loss will see of it: prefix, target, log-probability, advantage."""
    for position, target, behaviour, advantage in zip(
        batch.positions, batch.targets, batch.behaviour, batch.advantage, strict=True
    ):
        places = path(batch, position)
        assert batch.position_ids[0, places].tolist() == list(range(len(places)))
        yield tuple(batch.input_ids[0, places].tolist()), int(target), float(behaviour), float(advantage)


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
        assert batch.input_ids.size <= budget or len(batch.starts) == 2
        assert set(batch.weight) in ({0.0}, {1.0})


@given(rows, st.integers(1, 3), st.integers(10, 120))
def test_ranks_get_equally_many_tokens(some, ranks, budget):
    loads = [sum(b.tokens for b in own) for own in plan(some, ranks, budget)]
    longest = max(len(row.tokens) for row in some)
    assert max(loads) - min(loads) <= max(longest, budget // UNITS_PER_BATCH)


@given(rows, st.integers(1, 3))
def test_nothing_is_padded_and_rows_are_told_apart(some, ranks):
    for batch in (b for own in plan(some, ranks, 64) for b in own if b.weight.all()):
        assert batch.input_ids.all()
        assert batch.tokens == batch.input_ids.size == batch.starts[-1]
        rows_of_batch = int(batch.sequence[-1]) + 1
        assert sorted(set(batch.sequence.tolist())) == list(range(rows_of_batch))
        for number in range(rows_of_batch):
            assert len(set(batch.advantage[batch.sequence == number])) == 1


@given(rows, st.integers(1, 3))
def test_passes_at_the_same_time_know_the_widest_of_them(some, ranks):
    for together in zip(*plan(some, ranks, 64), strict=True):
        assert {batch.widest for batch in together} == {max(len(batch.targets) for batch in together)}


def test_rows_of_the_same_tokens_share_a_sequence_and_keep_their_own_losses():
    first = make((4, 2, 1))
    second = Row(first.tokens, first.logprobs - 1, -3.0)
    ((batch,),) = plan([first, second], 1, 64)
    assert batch.input_ids.shape == (1, 6)
    assert batch.sequence.tolist() == [0, 0, 1, 1]
    assert batch.advantage.tolist() == [1.0, 1.0, -3.0, -3.0]
    assert batch.behaviour.tolist() == [-1.0, -1.0, -2.0, -2.0]


def test_steps_that_go_on_from_one_another_are_one_sequence():
    tokens = np.arange(1, 13, dtype=np.int32)
    steps = [Row(tokens[:end], np.full(2, -float(end), np.float32), float(end)) for end in (4, 8, 12)]
    other = Row(np.array([1, 2, 3, 9, 9], np.int32), np.zeros(1, np.float32), 5.0)
    ((batch,),) = plan([*steps, other], 1, 64)
    assert batch.tokens == 17
    assert sorted(np.diff(batch.starts)) == [5, 12]
    assert sorted(content(batch)) == sorted(t for row in [*steps, other] for t in expected(row))


@given(rows, st.integers(1, 3))
def test_as_few_sequences_as_the_rows_allow(some, ranks):
    texts = {tuple(row.tokens.tolist()) for row in some}
    leaves = [t for t in texts if not any(len(o) > len(t) and o[: len(t)] == t for o in texts)]
    planned = plan(some, ranks, 64)
    assert sum(len(b.starts) - 1 for own in planned for b in own if b.weight.all()) == len(leaves)
    assert sum(b.tokens for own in planned for b in own) == sum(map(len, leaves))


def test_a_common_beginning_is_computed_once():
    opening = np.arange(1, 1 + MIN_SHARED + 8, dtype=np.int32)
    some = [
        Row(np.append(opening, [100 + n] * (n + 2)).astype(np.int32), np.full(n + 1, -1.0 - n, np.float32), float(n))
        for n in range(5)
    ]
    ((batch,),) = plan(some, 1, 4 * 1000)
    assert batch.tokens == len(opening) + sum(n + 2 for n in range(5))
    assert sorted(content(batch)) == sorted(t for row in some for t in expected(row))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        plan([], 1, 64)
