"""Trajectories as bytes: the one binary format in which they are stored and travel.

Layout: the magic `ANC`, one byte of schema version, one zstd frame (with checksum) around a msgpack document. Token ids
are little-endian int32, log-probabilities little-endian float32.

Invariants
- `decode(encode(t))` equals `t`; nothing else decodes: lengths, types and version spans are checked on both ways.
- A document never unpacks to more than `MAX_RAW_BYTES`, whatever its header claims.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from services.schemas import Step, Ticket, Trajectory, VersionSpan

MAGIC = b"ANC"
SCHEMA_VERSION = 1
MAX_RAW_BYTES = 256 * 2**20

_HEADER = MAGIC + bytes([SCHEMA_VERSION])
_LEVEL = 3


class CodecError(ValueError):
    """The bytes are not a trajectory of this schema version, or the trajectory breaks the schema."""


class _WireStep(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt_ids: bytes
    response_ids: bytes
    logprobs: bytes
    span_versions: list[int]
    span_tokens: list[int]
    anchor: str
    observation: str
    prompt: str
    response: str
    action: str
    reward: float
    valid: bool
    terminated: bool
    truncated: bool


class _WireTrajectory(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    ticket: Ticket
    steps: list[_WireStep]
    facts: dict[str, JsonValue]
    actor: str
    started_at: float
    finished_at: float


def encode(trajectory: Trajectory) -> bytes:
    """The stored form of a trajectory.

    Raises:
        CodecError: an array of the wrong dtype or shape, lengths that disagree, facts that JSON cannot hold, or more
            than `MAX_RAW_BYTES` of content.
    """
    try:
        wire = _WireTrajectory(
            ticket=trajectory.ticket,
            steps=[_to_wire(step) for step in trajectory.steps],
            facts=dict(trajectory.facts),  # type: ignore[arg-type]  # pydantic checks the values
            actor=trajectory.actor,
            started_at=trajectory.started_at,
            finished_at=trajectory.finished_at,
        )
        raw: bytes = msgpack.packb(wire.model_dump())
    except CodecError:
        raise
    except ValidationError as error:
        raise CodecError(f"the trajectory cannot be stored: {_first(error)}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise CodecError(f"the trajectory cannot be stored: {error}") from None
    if len(raw) > MAX_RAW_BYTES:
        raise CodecError(f"the trajectory has {len(raw)} bytes, more than the {MAX_RAW_BYTES} a document may have")
    return _HEADER + zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(raw)


def decode(data: bytes) -> Trajectory:
    """The trajectory that `encode` stored; its arrays own their memory.

    Raises:
        CodecError: anything that `encode` of this schema version cannot have written.
    """
    raw = _decompress(data)
    try:
        document = msgpack.unpackb(raw)
        wire = _WireTrajectory.model_validate(document, strict=True)
        return Trajectory(
            ticket=wire.ticket,
            steps=tuple(_from_wire(step) for step in wire.steps),
            facts=wire.facts,
            actor=wire.actor,
            started_at=wire.started_at,
            finished_at=wire.finished_at,
        )
    except CodecError:
        raise
    except ValidationError as error:
        raise CodecError(f"not a trajectory document: {_first(error)}") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CodecError(f"not a trajectory document: {error}") from None


def _decompress(data: bytes) -> bytes:
    if data[: len(MAGIC)] != MAGIC:
        raise CodecError("not a trajectory document: it does not begin with the magic bytes")
    if data[len(MAGIC) : len(_HEADER)] != _HEADER[len(MAGIC) :]:
        raise CodecError(f"the trajectory document is not of schema version {SCHEMA_VERSION}")
    frame = data[len(_HEADER) :]
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= MAX_RAW_BYTES:
            raise CodecError(f"the trajectory document does not declare a size of at most {MAX_RAW_BYTES} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"the trajectory document is damaged: {error}") from None


def _to_wire(step: Step) -> _WireStep:
    if len(step.logprobs) != len(step.response_ids):
        raise CodecError(f"{len(step.logprobs)} log-probabilities for {len(step.response_ids)} response tokens")
    _check_spans(step.versions, len(step.response_ids))
    return _WireStep(
        prompt_ids=_to_bytes(step.prompt_ids, np.int32, "prompt_ids"),
        response_ids=_to_bytes(step.response_ids, np.int32, "response_ids"),
        logprobs=_to_bytes(step.logprobs, np.float32, "logprobs"),
        span_versions=[span.version for span in step.versions],
        span_tokens=[span.tokens for span in step.versions],
        anchor=step.anchor,
        observation=step.observation,
        prompt=step.prompt,
        response=step.response,
        action=step.action,
        reward=step.reward,
        valid=step.valid,
        terminated=step.terminated,
        truncated=step.truncated,
    )


def _from_wire(wire: _WireStep) -> Step:
    response_ids = _from_bytes(wire.response_ids, np.int32)
    logprobs = _from_bytes(wire.logprobs, np.float32)
    if len(logprobs) != len(response_ids):
        raise CodecError(f"{len(logprobs)} log-probabilities for {len(response_ids)} response tokens")
    versions = tuple(VersionSpan(*span) for span in zip(wire.span_versions, wire.span_tokens, strict=True))
    _check_spans(versions, len(response_ids))
    return Step(
        prompt_ids=_from_bytes(wire.prompt_ids, np.int32),
        response_ids=response_ids,
        logprobs=logprobs,
        versions=versions,
        anchor=wire.anchor,
        observation=wire.observation,
        prompt=wire.prompt,
        response=wire.response,
        action=wire.action,
        reward=wire.reward,
        valid=wire.valid,
        terminated=wire.terminated,
        truncated=wire.truncated,
    )


def _check_spans(versions: tuple[VersionSpan, ...], tokens: int) -> None:
    if any(span.tokens < 0 for span in versions) or sum(span.tokens for span in versions) != tokens:
        raise CodecError(f"the version spans do not add up to the {tokens} response tokens")


def _to_bytes(array: NDArray[Any], dtype: type[np.generic], name: str) -> bytes:
    if array.dtype != dtype or array.ndim != 1:
        raise CodecError(f"{name} must be a {np.dtype(dtype)} vector, not {array.dtype} {list(array.shape)}")
    return array.astype(_little_endian(dtype)).tobytes()


def _from_bytes(data: bytes, dtype: type[np.generic]) -> NDArray[Any]:
    return np.frombuffer(data, dtype=_little_endian(dtype)).astype(dtype)


def _little_endian(dtype: type[np.generic]) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
