"""Messages between an actor and its engine's process."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from actors.engine.messages import Messages, Request, Response, pack

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
REQUESTS = st.builds(Request, st.integers(0, 2**40), TOKENS, st.floats(0, 2), st.integers(1, 99), st.integers(0, 2**63))
ANSWERS = st.builds(
    Response,
    st.integers(0, 2**40),
    TOKENS,
    st.lists(st.floats(-1e30, 0), max_size=40),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)).map(list), max_size=3),
    st.booleans(),
)


@given(sent=st.lists(REQUESTS | ANSWERS, max_size=8), cuts=st.lists(st.integers(0, 4000), max_size=8))
def test_messages_come_whole_however_the_bytes_are_cut(sent: list[Request | Response], cuts: list[int]) -> None:
    stream = b"".join(pack(type(message).__name__, *message) for message in sent)
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    messages = Messages()
    heard = [message for begin, end in itertools.pairwise(places) for message in messages.of(stream[begin:end])]
    kinds = {"Request": Request, "Response": Response}
    assert [kinds[kind](*members) for kind, *members in heard] == sent
