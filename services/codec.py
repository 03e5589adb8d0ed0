"""The binary format of trajectories, in which they are stored and transported.

    b"ANC"   version   zstd frame with checksum
    3 bytes  1 byte    └─ msgpack document: ticket, steps, facts, actor, started_at, finished_at, final_anchor

The steps are stored in columns: one list per field, and one vector for the tokens of all steps (little-endian int32
token ids, float32 log-probabilities), which encodes about three times as fast as one document per step.

Example: two steps with prompts of 3 and 5 tokens and responses of 2 and 4 tokens; policy version 7 wrote the first
response and the first token of the second, version 8 the rest.

    prompt_tokens    [3, 5]                  lengths: how to split prompt_ids
    prompt_ids       8 x int32 = 32 bytes
    response_tokens  [2, 4]                  how to split response_ids and logprobs
    response_ids     6 x int32
    logprobs         6 x float32
    spans            [1, 2]                  how to split the next two
    span_versions    [7, 7, 8]
    span_tokens      [2, 1, 3]               the sums 2 and 1 + 3 equal response_tokens
    action           ["look", "take key"]    and so on for every plain field

Invariants
- `decode(encode(t))` equals `t`, and nothing else decodes: lengths, types and version spans are checked both ways.
- Every float is finite, including the sum of the rewards, and `won`, if present, is true or false.
- A document never unpacks to more than `MAX_RAW_BYTES`, whatever its header claims.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeInt,
    ValidationError,
    field_validator,
)

from services.numbers import not_finite
from services.schemas import Step, Ticket, Trajectory, VersionSpan

MAGIC = b"ANC"
SCHEMA_VERSION = 2
MAX_RAW_BYTES = 256 * 2**20

_HEADER = MAGIC + bytes([SCHEMA_VERSION])
_LEVEL = 3
_PLAIN = (
    "anchor",
    "observation",
    "prompt",
    "response",
    "action",
    "reward",
    "valid",
    "terminated",
    "truncated",
    "finished",
    "prompt_truncated",
    "turn",
    "trained",
    "extends",
    "tool_calls",
)
"""Fields of a step that are stored unchanged, in the order of `Step`'s arguments after the arrays."""


_LATER = ("finished", "prompt_truncated", "turn", "trained", "extends", "tool_calls")
"""Columns that older documents of this schema version do not have: their steps have the defaults of `Step`."""
_DEFAULTS = {field.name: field.default for field in fields(Step) if field.name in _LATER}


class CodecError(ValueError):
    """The bytes are not a trajectory of this schema version, or the trajectory violates the schema."""


class _WireSteps(BaseModel):
    """The S steps of a trajectory in columns.

    `prompt_tokens`, `response_tokens` and `spans` are the lengths of each step's part of the vectors and span lists.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt_tokens: list[NonNegativeInt]
    response_tokens: list[NonNegativeInt]
    spans: list[NonNegativeInt]
    prompt_ids: bytes
    response_ids: bytes
    logprobs: bytes
    span_versions: list[int]
    span_tokens: list[NonNegativeInt]
    anchor: list[str]
    observation: list[str]
    prompt: list[str]
    response: list[str]
    action: list[str]
    reward: list[FiniteFloat]
    valid: list[bool]
    terminated: list[bool]
    truncated: list[bool]
    finished: list[bool] | None = None
    """None in documents that are older than this column; so are the next ones, see `_LATER`."""
    prompt_truncated: list[bool] | None = None
    turn: list[Annotated[int, Field(ge=-1)]] | None = None
    trained: list[bool] | None = None
    extends: list[Annotated[int, Field(ge=-1)]] | None = None
    tool_calls: list[str] | None = None


class _WireTrajectory(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    ticket: Ticket
    steps: _WireSteps
    facts: dict[str, JsonValue]
    actor: str
    started_at: FiniteFloat
    finished_at: FiniteFloat
    final_anchor: str | None = None
    """Missing in documents that are older than this field."""

    @field_validator("facts")
    @classmethod
    def _finite(cls, facts: dict[str, JsonValue]) -> dict[str, JsonValue]:
        problem = not_finite(facts, "facts")
        if problem is not None:
            raise ValueError(f"{problem}, must be finite")
        won = facts.get("won")
        if won is not None and not isinstance(won, bool):
            raise ValueError(f"facts.won must be true or false, got {won!r:.60}")
        return facts


class _Contexts(threading.local):
    """zstd's working memory, one per thread: allocating it takes as long as compressing an episode."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def encode(trajectory: Trajectory) -> bytes:
    """Encode a trajectory.

    Raises:
        CodecError: wrong dtype or shape of an array, inconsistent lengths, facts that JSON cannot represent, a number
            that is not finite, or more than `MAX_RAW_BYTES` of content.
    """
    try:
        wire = _WireTrajectory(
            ticket=trajectory.ticket,
            steps=_to_wire(trajectory.steps),
            facts=dict(trajectory.facts),  # type: ignore[arg-type]  # pydantic checks the values
            actor=trajectory.actor,
            started_at=trajectory.started_at,
            finished_at=trajectory.finished_at,
            final_anchor=trajectory.final_anchor,
        )
        raw: bytes = msgpack.packb(wire.model_dump())
    except CodecError:
        raise
    except ValidationError as error:
        raise CodecError(f"cannot encode the trajectory: {_first(error)}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise CodecError(f"cannot encode the trajectory: {error}") from None
    if len(raw) > MAX_RAW_BYTES:
        raise CodecError(f"trajectory too large: {len(raw)} bytes, at most {MAX_RAW_BYTES} are allowed")
    return _HEADER + _contexts.compressor.compress(raw)


def decode(data: bytes) -> Trajectory:
    """Decode a trajectory. Its arrays are writable views of one vector per column.

    Raises:
        CodecError: the bytes cannot come from `encode` of this schema version.
    """
    raw = _decompress(data)
    try:
        document = msgpack.unpackb(raw)
        wire = _WireTrajectory.model_validate(document, strict=True)
        return Trajectory(
            ticket=wire.ticket,
            steps=_from_wire(wire.steps),
            facts=wire.facts,
            actor=wire.actor,
            started_at=wire.started_at,
            finished_at=wire.finished_at,
            final_anchor=wire.final_anchor,
        )
    except CodecError:
        raise
    except ValidationError as error:
        raise CodecError(f"not a trajectory document: {_first(error)}") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"not a trajectory document: {error}") from None


def _decompress(data: bytes) -> bytes:
    if data[: len(MAGIC)] != MAGIC:
        raise CodecError("not a trajectory document: no magic bytes at its start")
    if data[len(MAGIC) : len(_HEADER)] != _HEADER[len(MAGIC) :]:
        raise CodecError(f"trajectory document of another schema version, expected {SCHEMA_VERSION}")
    frame = data[len(_HEADER) :]
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= MAX_RAW_BYTES:
            raise CodecError(f"the trajectory document must declare a size of at most {MAX_RAW_BYTES} bytes")
        return _contexts.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"the trajectory document is damaged: {error}") from None


def _to_wire(steps: Sequence[Step]) -> _WireSteps:
    for step in steps:
        if len(step.logprobs) != len(step.response_ids):
            raise CodecError(f"{len(step.logprobs)} log-probabilities for {len(step.response_ids)} response tokens")
    spans = [span for step in steps for span in step.versions]
    wire = _WireSteps(
        prompt_tokens=[len(step.prompt_ids) for step in steps],
        response_tokens=[len(step.response_ids) for step in steps],
        spans=[len(step.versions) for step in steps],
        prompt_ids=_to_bytes([step.prompt_ids for step in steps], np.int32, "prompt_ids"),
        response_ids=_to_bytes([step.response_ids for step in steps], np.int32, "response_ids"),
        logprobs=_to_bytes([step.logprobs for step in steps], np.float32, "logprobs"),
        span_versions=[span.version for span in spans],
        span_tokens=[span.tokens for span in spans],
        **{name: [getattr(step, name) for step in steps] for name in _PLAIN},
    )
    _check_spans(wire)
    _check_finite(wire)
    _check_order(wire)
    return wire


def _from_wire(wire: _WireSteps) -> tuple[Step, ...]:
    _check_spans(wire)
    _check_finite(wire)
    _check_order(wire)
    for name in _LATER:
        if getattr(wire, name) is None:
            setattr(wire, name, [_DEFAULTS[name]] * len(wire.spans))
    columns = (
        _split(_from_bytes(wire.prompt_ids, np.int32), wire.prompt_tokens),
        _split(_from_bytes(wire.response_ids, np.int32), wire.response_tokens),
        _split(_from_bytes(wire.logprobs, np.float32), wire.response_tokens),
        _split(tuple(map(VersionSpan, wire.span_versions, wire.span_tokens)), wire.spans),
        *(getattr(wire, name) for name in _PLAIN),
    )
    if any(len(column) != len(wire.spans) for column in columns):
        raise CodecError("not a trajectory document: its columns differ in length")
    return tuple(map(Step, *columns))


def _check_spans(wire: _WireSteps) -> None:
    if len(wire.span_versions) != len(wire.span_tokens) or len(wire.spans) != len(wire.response_tokens):
        raise CodecError("not a trajectory document: its columns differ in length")
    for own, tokens in zip(_split(wire.span_tokens, wire.spans), wire.response_tokens, strict=True):
        if sum(own) != tokens:
            raise CodecError(f"the version spans do not add up to {tokens} response tokens")


def _check_finite(wire: _WireSteps) -> None:
    logprobs = _from_bytes(wire.logprobs, np.float32)
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if len(wrong):
        raise CodecError(f"log-probability of response token {wrong[0]} must be finite, got {logprobs[wrong[0]]}")
    if not math.isfinite(sum(map(abs, wire.reward))):
        raise CodecError("the sum of the rewards must be finite")


def _check_order(wire: _WireSteps) -> None:
    for number, extended in enumerate(wire.extends or ()):
        if extended >= number:
            raise CodecError(f"step {number} must extend an earlier step, got step {extended}")


def _split(whole: Any, lengths: Sequence[int]) -> list[Any]:
    """Split a vector or list into consecutive parts of these lengths. CodecError if they do not add up to all of it."""
    bounds = list(accumulate(lengths, initial=0))
    if bounds[-1] != len(whole):
        raise CodecError(f"the steps account for {bounds[-1]} of the {len(whole)} entries of a column")
    return [whole[begin:end] for begin, end in pairwise(bounds)]


def _to_bytes(arrays: Sequence[NDArray[Any]], dtype: type[np.generic], name: str) -> bytes:
    for array in arrays:
        if array.dtype != dtype or array.ndim != 1:
            raise CodecError(f"{name} must be a {np.dtype(dtype)} vector, got {array.dtype} {list(array.shape)}")
    return np.concatenate(arrays).astype(_little_endian(dtype), copy=False).tobytes() if arrays else b""


def _from_bytes(data: bytes, dtype: type[np.generic]) -> NDArray[Any]:
    return np.frombuffer(data, dtype=_little_endian(dtype)).astype(dtype)


def _little_endian(dtype: type[np.generic]) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
