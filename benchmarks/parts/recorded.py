"""Episodes as a real run recorded them: how long they took and how large they were, by their number of steps.

Source: the newest 40 updates (2,560 episodes) of the first 63 in the archive of `make demo` on 2026-11-30, on the
machine of docs/STATUS.md with other work beside it: ALFWorld's generated games, at most 20 steps, the starter policy,
one actor with 64 episodes in flight. `bytes` is the size as stored in Redis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.schemas import Step, Ticket, Trajectory, VersionSpan

_WORDS = [
    "you",
    "see",
    "a",
    "go",
    "to",
    "open",
    "take",
    "put",
    "heat",
    "cool",
    "clean",
    "examine",
    "with",
    "in",
    "shelf",
    "drawer",
    "mug",
    "lamp",
    "desk",
    "cabinet",
    "apple",
]
_VOCABULARY = 2048
_RESPONSE_TOKENS = 4
_TOKENS_A_STEP = 16
_FIRST_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Kind:
    """Episodes with the same number of steps.

    Attributes:
        steps: that number.
        episodes: how many were recorded.
        seconds: from lease to store, on average.
        nbytes: of an encoded trajectory, on average.
    """

    steps: int
    episodes: int
    seconds: float
    nbytes: int


RECORDED = (
    Kind(3, 81, 1.60, 1033),
    Kind(4, 75, 2.35, 1158),
    Kind(5, 135, 2.38, 1261),
    Kind(6, 135, 3.14, 1434),
    Kind(7, 159, 3.44, 1553),
    Kind(8, 180, 3.78, 1654),
    Kind(9, 113, 3.95, 1753),
    Kind(10, 98, 4.50, 1838),
    Kind(11, 64, 4.55, 1940),
    Kind(12, 43, 5.16, 2061),
    Kind(13, 42, 5.54, 2084),
    Kind(14, 31, 5.54, 2225),
    Kind(15, 40, 7.15, 2346),
    Kind(16, 34, 7.22, 2453),
    Kind(17, 29, 7.09, 2475),
    Kind(18, 32, 7.78, 2615),
    Kind(19, 32, 8.24, 2660),
    Kind(20, 1237, 8.52, 2767),
)
_EPISODES = sum(kind.episodes for kind in RECORDED)
MEAN_SECONDS = sum(kind.episodes * kind.seconds for kind in RECORDED) / _EPISODES
MEAN_BYTES = sum(kind.episodes * kind.nbytes for kind in RECORDED) / _EPISODES
_SHARES = np.array([kind.episodes for kind in RECORDED]) / _EPISODES


def kind_of(ticket: Ticket) -> Kind:
    """The kind of the episode that this ticket becomes, always the same one, each as often as it was recorded."""
    return RECORDED[int(np.random.default_rng(ticket.seed).choice(len(RECORDED), p=_SHARES))]


def episode(ticket: Ticket, actor: str, version: int) -> Trajectory:
    """A trajectory of that kind, whose texts and tokens need as many bytes as recorded ones."""
    rng = np.random.default_rng(ticket.seed)
    steps = kind_of(ticket).steps
    tokens = rng.integers(0, _VOCABULARY, _FIRST_TOKENS + steps * _TOKENS_A_STEP).astype(np.int32)
    words = rng.choice(_WORDS, 40 + 5 * steps)
    played = []
    for number in range(steps):
        seen = " ".join(words[: 40 + 5 * number])
        action = " ".join(words[40 + 5 * number : 43 + 5 * number])
        end = _FIRST_TOKENS + number * _TOKENS_A_STEP
        played.append(
            Step(
                prompt_ids=tokens[:end],
                response_ids=tokens[end : end + _RESPONSE_TOKENS],
                logprobs=rng.uniform(-3, 0, _RESPONSE_TOKENS).astype(np.float32),
                versions=(VersionSpan(version, _RESPONSE_TOKENS),),
                anchor=seen,
                observation=seen[-80:],
                prompt=seen,
                response=action,
                action=action,
                reward=float(number == steps - 1),
                valid=True,
                terminated=number == steps - 1,
            )
        )
    return Trajectory(ticket, tuple(played), facts={"won": True, "task_type": "look"}, actor=actor)
