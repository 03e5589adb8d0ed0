from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from services import codec
from services.codec import CodecError, decode, encode
from services.schemas import Step, Task, Ticket, Trajectory, VersionSpan

INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
FACT = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
FACTS = st.dictionaries(TEXT, st.recursive(FACT, lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4)
FLOAT = st.floats(-1e307, 1e307)


@st.composite
def spans(draw: st.DrawFn) -> tuple[VersionSpan, ...]:
    counts = draw(st.lists(st.integers(0, 5), max_size=3))
    return tuple(VersionSpan(draw(st.integers(0, 10**6)), count) for count in counts)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    versions = draw(spans())
    tokens = sum(span.tokens for span in versions)
    logprobs = draw(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=tokens, max_size=tokens)
    )
    return Step(
        prompt_ids=np.array(draw(st.lists(INT32, max_size=5)), dtype=np.int32),
        response_ids=np.array(draw(st.lists(INT32, min_size=tokens, max_size=tokens)), dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=versions,
        **{name: draw(TEXT) for name in ("anchor", "observation", "prompt", "response", "action")},
        reward=draw(FLOAT),
        **{name: draw(st.booleans()) for name in FLAGS},
        turn=draw(st.integers(-1, 2**62)),
    )


FLAGS = ("valid", "terminated", "truncated", "finished", "prompt_truncated", "trained")


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    ticket = Ticket(
        stream=draw(TEXT),
        group=draw(st.integers(0, 10**9)),
        member=draw(st.integers(0, 100)),
        group_size=draw(st.integers(1, 100)),
        task=Task(env=draw(TEXT), split=draw(TEXT), index=draw(st.integers(0, 10**9))),
        seed=draw(st.integers(0, 2**63 - 1)),
        temperature=draw(FLOAT),
    )
    played = draw(st.lists(steps(), max_size=3))
    return Trajectory(
        ticket=ticket,
        steps=tuple(
            dataclasses.replace(step, extends=draw(st.integers(-1, number - 1))) for number, step in enumerate(played)
        ),
        facts=draw(FACTS),
        actor=draw(TEXT),
        started_at=draw(FLOAT),
        finished_at=draw(FLOAT),
        final_anchor=draw(st.none() | TEXT),
    )


HEADER = b"ANC\x02"

STEP = Step(
    prompt_ids=np.array([1, 2, 3], dtype=np.int32),
    response_ids=np.array([4, 5], dtype=np.int32),
    logprobs=np.array([-0.5, -1.5], dtype=np.float32),
    versions=(VersionSpan(3, 1), VersionSpan(4, 1)),
    anchor="a",
    observation="o",
    prompt="p",
    response="r",
    action="go",
    reward=1.0,
    valid=True,
)
TICKET = Ticket(group=1, member=0, group_size=2, task=Task(env="e", split="s", index=0), seed=7)
TRAJECTORY = Trajectory(TICKET, (STEP,), facts={"won": True})


def plain(trajectory: Trajectory) -> dict[str, Any]:
    """Everything that equality should see, arrays by dtype and bytes."""

    def step(value: Step) -> dict[str, Any]:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {k: (v.dtype, v.tobytes()) if isinstance(v, np.ndarray) else v for k, v in fields.items()}

    fields = {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)}
    return fields | {"steps": [step(value) for value in trajectory.steps]}


def document() -> dict[str, Any]:
    raw = zstandard.ZstdDecompressor().decompress(encode(TRAJECTORY)[4:])
    unpacked: dict[str, Any] = msgpack.unpackb(raw)
    return unpacked


def packed(content: object) -> bytes:
    return HEADER + zstandard.ZstdCompressor().compress(msgpack.packb(content))


@given(trajectories())
def test_round_trip(trajectory: Trajectory) -> None:
    assert plain(decode(encode(trajectory))) == plain(trajectory)


def test_documents_without_the_column_of_finished_responses_still_decode() -> None:
    older = document()
    del older["steps"]["finished"]
    assert plain(decode(packed(older))) == plain(TRAJECTORY)
    assert decode(packed(older)).steps[0].finished


def test_documents_without_the_column_of_truncated_prompts_still_decode() -> None:
    older = document()
    del older["steps"]["prompt_truncated"]
    assert plain(decode(packed(older))) == plain(TRAJECTORY)
    assert decode(packed(older)).steps[0].prompt_truncated is False


@pytest.mark.parametrize(("column", "default"), [("turn", -1), ("trained", True), ("extends", -1), ("tool_calls", "")])
def test_documents_without_the_columns_of_agents_still_decode(column: str, default: object) -> None:
    older = document()
    del older["steps"][column]
    assert plain(decode(packed(older))) == plain(TRAJECTORY)
    assert getattr(decode(packed(older)).steps[0], column) is default or default == -1


def test_documents_without_the_final_state_still_decode() -> None:
    older = document()
    del older["final_anchor"]
    assert plain(decode(packed(older))) == plain(TRAJECTORY)
    assert decode(packed(older)).final_anchor is None


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)


def fits(column: str, value: object) -> bool:
    """Whether a column of one step may have this content."""
    if not isinstance(value, list):
        return value is None
    if len(value) != 1:
        return False
    if column == "trained":
        return isinstance(value[0], bool)
    return type(value[0]) is int and (value[0] == -1 or (column == "turn" and value[0] >= 0))


@given(st.sampled_from(["turn", "trained", "extends"]), ODD | st.lists(ODD, max_size=3))
def test_a_column_of_agents_with_odd_content_is_refused_in_one_line(column: str, value: object) -> None:
    content = document()
    content["steps"][column] = value
    try:
        raw = packed(content)
    except OverflowError:  # msgpack has no such integer
        return
    if fits(column, value):
        decode(raw)
        return
    with pytest.raises(CodecError) as refused:
        decode(raw)
    assert "\n" not in str(refused.value)


def test_decoded_arrays_are_writable() -> None:
    decode(encode(TRAJECTORY)).steps[0].logprobs[0] = 0.0


def test_starts_with_magic_and_version() -> None:
    assert encode(TRAJECTORY).startswith(HEADER)


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    for prefix in (b"", HEADER):
        with pytest.raises(CodecError):
            decode(prefix + data)


@given(st.binary(max_size=60))
def test_noise_inside_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(HEADER + zstandard.ZstdCompressor().compress(data))


@given(st.data())
def test_every_damaged_byte_is_noticed(data: st.DataObject) -> None:
    encoded = bytearray(encode(TRAJECTORY))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = decode(bytes(encoded))
    except CodecError:
        return
    assert plain(decoded) == plain(TRAJECTORY)  # a bit without meaning in the frame header


@given(st.integers(0, len(encode(TRAJECTORY)) - 1))
def test_truncation_is_refused(length: int) -> None:
    with pytest.raises(CodecError):
        decode(encode(TRAJECTORY)[:length])


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(CodecError):
        decode(encode(TRAJECTORY) + b"x")


def test_another_schema_version_is_named() -> None:
    with pytest.raises(CodecError, match="schema version, expected 2"):
        decode(b"ANC\x01" + encode(TRAJECTORY)[4:])


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(TRAJECTORY)
    monkeypatch.setattr(codec, "MAX_RAW_BYTES", 16)
    with pytest.raises(CodecError, match="declare a size"):
        decode(encoded)
    with pytest.raises(CodecError, match=r"too large: .* at most 16"):
        encode(TRAJECTORY)


def test_a_frame_without_a_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(CodecError, match="declare a size"):
        decode(HEADER + compressor.compress(msgpack.packb(document())))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("steps", "logprobs"), b"\0" * 4),
        (("steps", "logprobs"), b"\0" * 7),
        (("steps", "prompt_ids"), [1, 2]),
        (("steps", "prompt_tokens"), [2]),
        (("steps", "prompt_tokens"), [3, 0]),
        (("steps", "prompt_tokens"), [4, -1]),
        (("steps", "response_tokens"), [1]),
        (("steps", "spans"), [1]),
        (("steps", "span_tokens"), [1, 2]),
        (("steps", "span_tokens"), [2]),
        (("steps", "span_tokens"), [3, -1]),
        (("steps", "reward"), ["1"]),
        (("steps", "reward"), []),
        (("steps", "reward"), [float("nan")]),
        (("steps", "reward"), [float("-inf")]),
        (("steps", "logprobs"), np.array([-0.5, -np.inf], dtype="<f4").tobytes()),
        (("steps", "logprobs"), np.array([np.nan, -0.5], dtype="<f4").tobytes()),
        (("ticket", "temperature"), float("inf")),
        (("started_at",), float("nan")),
        (("facts", "won"), "no"),
        (("facts", "won"), 1),
        (("facts", "won"), float("nan")),
        (("facts", "score"), float("inf")),
        (("facts", "parts"), {"price": [1.0, float("nan")]}),
        (("steps", "valid"), [1]),
        (("steps", "turn"), [True]),
        (("steps", "turn"), [-2]),
        (("steps", "turn"), []),
        (("steps", "turn"), [0, 1]),
        (("steps", "trained"), [1]),
        (("steps", "trained"), []),
        (("steps", "extends"), [0]),
        (("steps", "extends"), [1]),
        (("steps", "extends"), [-2]),
        (("steps", "extends"), ["0"]),
        (("steps", "surplus"), [1]),
        (("steps",), None),
        (("ticket", "group"), "1"),
        (("ticket", "task"), None),
        (("facts", "won"), b"bytes"),
        (("facts", "won"), msgpack.ExtType(5, b"x")),
        (("actor",), 3),
        (("final_anchor",), 3),
        (("final_anchor",), ["a"]),
    ],
)
def test_a_document_off_schema_is_refused(path: tuple[Any, ...], value: object) -> None:
    content = document()
    assert plain(decode(packed(content))) == plain(TRAJECTORY)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CodecError):
        decode(packed(content))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": np.array([1], dtype=np.int64)},
        {"prompt_ids": np.zeros((1, 1), dtype=np.int32)},
        {"logprobs": np.array([-0.5, -1.5])},
        {"logprobs": np.array([-0.5], dtype=np.float32)},
        {"versions": (VersionSpan(3, 1),)},
        {"versions": ()},
        {"reward": "1"},
        {"turn": -2},
        {"turn": 0.5},
        {"trained": 1},
        {"extends": 0},
        {"observation": "\ud800"},
        {"reward": float("nan")},
        {"reward": float("inf")},
        {"logprobs": np.array([-0.5, -np.inf], dtype=np.float32)},
        {"logprobs": np.array([np.nan, -0.5], dtype=np.float32)},
    ],
)
def test_a_step_off_schema_is_not_stored(change: dict[str, Any]) -> None:
    with pytest.raises(CodecError):
        encode(dataclasses.replace(TRAJECTORY, steps=(dataclasses.replace(STEP, **change),)))


@pytest.mark.parametrize("value", [object(), b"bytes", {1: 2}, 2**70, np.float32(1), {"a": {2: 3}}])
def test_facts_that_json_cannot_hold_are_not_stored(value: object) -> None:
    with pytest.raises(CodecError, match="cannot encode"):
        encode(dataclasses.replace(TRAJECTORY, facts={"fact": value}))


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"won": float("nan")}, "facts.won"),
        ({"won": "no"}, "facts.won"),
        ({"won": 0}, "facts.won"),
        ({"score": float("-inf")}, "facts.score"),
        ({"parts": [{"price": float("nan")}]}, "facts.parts.0.price"),
    ],
)
def test_a_fact_that_is_no_number_or_no_truth_is_named(facts: dict[str, Any], named: str) -> None:
    with pytest.raises(CodecError, match=named):
        encode(dataclasses.replace(TRAJECTORY, facts=facts))


def test_rewards_that_add_up_to_infinity_are_not_stored() -> None:
    huge = dataclasses.replace(STEP, reward=1e308)
    with pytest.raises(CodecError, match="sum of the rewards"):
        encode(dataclasses.replace(TRAJECTORY, steps=(huge, huge)))
