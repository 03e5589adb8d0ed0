"""Measure whether the learner computes a model's own function, on the loaded weights.

Random rows go through the model's own forward pass, each alone, and through the learner's routes
(`learner.rank.policy.Route`). `measure` selects the fastest route that agrees, gives the reason against faster ones, or
refuses the model. It costs about twenty forward passes, four of them over a row of the longest length that the run can
produce, so that windows and position limits show whatever a configuration calls them. The decision is made in float32
if the device has room for a float32 copy of the weights; bfloat16 weights are restored bit for bit.

Invariants
- Measured numbers decide. Nothing here depends on the architecture.
- Ignored arguments of attention layers do not depend on the measurement: `learner.rank.attention` refuses them itself,
  because a soft cap does not show while the numbers that it caps are small.

Example: the starter policy (Qwen2, float32) on a CPU. Largest difference in nats of each case, in order of measurement:

    repeated      0        the same pass again: the model is a function
    causal        0        other tokens after those compared change nothing
    prefixes      1.9e-6   the beginning of the longest row scores as it does by itself
    halves        0        the head on the body's hidden states
    packed alone  0        one row in a line
    packed        0        three rows in a line
    shared        6.7e-6   four rows that share prefixes -> Route(packed=True)

A small Gemma 2 fails at `packed alone` ("its attention has softcap"), so each of its rows goes through it alone. A BERT
shows 0.055 in `causal` and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from learner.batching import MIN_SHARED, Ids, Row, plan
from learner.rank.attention import PackingUnsupported
from learner.rank.forward import Forward
from learner.rank.policy import Policy, Route, inputs, load_policy
from services.config.tree import Config
from services.errors import ModelUnavailable, first_line
from services.model_folder import WEIGHT_PATTERNS

Packing = Literal["auto", "packed", "rows"]

BOUND = 1e-3
"""Nats, bound of the largest difference in float32. Rounding causes 1e-6 to 1e-4, by size and depth of the model."""
ROUNDING = 2.0
"""bfloat16: the mean distance from the float32 function may be this many times that of the model's own forward pass.
Two exact ways to compute the same numbers round differently, but by equally much on average."""
MEAN_FLOOR = 1e-3
"""bfloat16: mean distance in nats that is always allowed."""
MEAN_BFLOAT16 = 0.03
"""Nats, bound of the mean without memory for the float32 function. bfloat16 rounds logits between 8 and 32 to multiples
of 1/16 to 1/8: single tokens are off by as much although nothing is wrong."""
RUN_BFLOAT16 = 0.1
"""Nats, likewise, bound of the mean over any `RUN` tokens in a row: a leak between rows shows in the first tokens."""
RUN = 8
SHARE_OF_EFFECT = 0.002
"""An error must be at most this share of the context's effect on the log-probabilities: in a model that hardly attends
to anything, such as a new one, a leak between rows is small in nats too."""
FLOOR = 1e-5
"""Nats. A smaller error is rounding, whatever the effect of the context (float32)."""
LEAST_EFFECT = 1e-4
"""Nats. If the context changes scores by less, a leak between rows is indistinguishable from rounding."""
SCORED = 256
"""Most tokens compared in a row: its last ones."""
PREFIX = 24
"""Leading tokens of the longest row that are scored without the rest of it."""
SEED = 20260
SMALL_BYTES = 256 * 2**20
"""Most weights that a command loads to measure them. Larger models are measured by the ranks that load them anyway."""


@dataclass(frozen=True, slots=True)
class Case:
    """Log-probabilities of one case compared with the model's own forward pass on each row alone.

    Attributes:
        name: `repeated`: the same pass again. `causal`: with other tokens after those compared. `prefixes`: without the
            tokens after them. `halves`: body and head separately, each row alone. `packed alone`, `packed`, `shared`:
            a line of one row, of several, of several that share prefixes.
        largest: largest absolute difference in nats; NaN if the case failed.
        mean: mean absolute difference in nats; NaN if the case failed.
        failure: why the case failed, one line; empty if it did not.
        run: largest mean absolute difference over `RUN` tokens in a row, in nats.
    """

    name: str
    largest: float
    mean: float
    failure: str = ""
    run: float = math.nan


@dataclass(frozen=True, slots=True)
class Parity:
    """Result of a measurement.

    Attributes:
        architecture: class name of the model.
        dtype: in which the cases were measured; `float32` if there is memory for it.
        bound: largest difference allowed, in nats; in bfloat16 largest mean.
        cases: in the order of measurement.
        route: selected for the rows.
        reasons: against faster routes, one line each.
        refusal: why the model cannot be trained at all, one line; None: it can.
    """

    architecture: str
    dtype: str
    bound: float
    cases: tuple[Case, ...]
    route: Route
    reasons: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def path(self) -> Literal["packed", "rows"]:
        """`packed`: rows go through the model in lines; `rows`: each alone."""
        return "packed" if self.route.packed else "rows"

    @property
    def largest(self) -> float:
        """Largest error of the selected route, in nats."""
        chosen = ("packed alone", "packed", "shared") if self.route.packed else ("halves",)
        return max((case.largest for case in self.cases if case.name in chosen and not case.failure), default=0.0)

    def line(self) -> str:
        """The result as one line for people."""
        if self.refusal is not None:
            return self.refusal
        how = {"packed": "packed rows", "rows": "each row alone"}[self.path]
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"{self.architecture}: {how}{why}; largest error {self.largest:.1e} nats against its own forward pass"


class _Refused(Exception):
    """The model cannot be trained; the message is the reason, as part of a sentence about it."""


def measure(policy: Policy, packing: Packing, max_tokens: int) -> Parity:
    """Measure the model of a policy and set the policy's route.

    A model that cannot be trained is not an error here, see `Parity.refusal`.

    Args:
        policy: its route is changed, its weights are not.
        packing: `learner.packing`.
        max_tokens: longest row that the run can produce.

    Example: a Llama gets `Route(packed=True)`; a Gemma 2 gets `Route(packed=False)` and the reason "its attention has
    softcap"; a BERT gets the refusal "... is not causal ...".
    """
    if next(policy.parameters()).dtype == torch.float32:
        return _Measurement(policy, max_tokens).run(packing)
    try:
        with _in_float32(policy):
            exact = _Measurement(policy, max_tokens)
            parity = exact.run(packing)
    except torch.OutOfMemoryError:
        return _Measurement(policy, max_tokens).run(packing)
    if parity.refusal is None and parity.route.packed:
        return _Measurement(policy, max_tokens).check_rounding(exact, parity, packing)
    return parity


@contextmanager
def _in_float32(policy: Policy) -> Iterator[None]:
    """A context in which parameters and buffers of lower precision are float32; restores them bit for bit."""
    named = [*policy.named_parameters(), *policy.named_buffers()]
    lower = [(tensor, tensor.dtype) for _, tensor in named if tensor.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, _ in lower:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in lower:
            tensor.data = tensor.data.to(dtype)


def measure_folder(folder: Path, dtype: str, max_tokens: int, packing: Packing = "auto") -> Parity:
    """Measure the model in a folder, on the CPU. Arguments as for `measure`.

    Raises:
        ModelUnavailable: it cannot be loaded.
    """
    return measure(load_policy(folder, dtype, 1.0, route=Route(packed=False)), packing, max_tokens)


def check_small_folder(folder: Path, config: Config) -> None:
    """Apply `require_exact` to a folder if its weights take at most `SMALL_BYTES`; others take longer than seconds.

    Raises:
        ModelUnavailable: the model cannot be loaded, or the learner would train another function than it computes.
    """
    if sum(file.stat().st_size for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)) > SMALL_BYTES:
        return
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    policy = load_policy(folder, config.model.dtype, 1.0, route=Route(packed=False))
    require_exact(policy, config.learner.packing, context)


def require_exact(policy: Policy, packing: Packing, max_tokens: int) -> Parity:
    """Measure a model that is to be trained. Arguments as for `measure`.

    Raises:
        ModelUnavailable: it cannot be trained, or not with this `learner.packing`.
    """
    parity = measure(policy, packing, max_tokens)
    if parity.refusal is not None:
        raise ModelUnavailable(parity.refusal)
    return parity


class _Measurement:
    """One measurement in the model's current dtype.

    Attributes:
        expected: log-probabilities of each row under the model's own forward pass.
    """

    def __init__(self, policy: Policy, max_tokens: int) -> None:
        self._policy = policy
        self._forward = Forward(policy.lm)
        self._device = next(policy.parameters()).device
        self._name = type(policy.lm).__name__
        dtype = next(policy.parameters()).dtype
        self._dtype = str(dtype).removeprefix("torch.")
        self._exact = dtype == torch.float32
        self._tokens = _Tokens(self._forward, max_tokens)
        self._cases: list[Case] = []
        self._reasons: list[str] = []
        self._effect = float("inf")
        self.expected: list[Tensor] = []

    @torch.no_grad()
    def run(self, packing: Packing) -> Parity:
        """Measure and decide."""
        try:
            self._require_own_forward()
            route = self._choose(packing)
        except _Refused as refusal:
            return self._parity(Route(packed=False), f"{self._name} cannot be trained: {refusal}")
        return self._chosen(route, packing)

    @torch.no_grad()
    def check_rounding(self, exact: _Measurement, parity: Parity, packing: Packing) -> Parity:
        """Decide whether packed lines in lower precision are as close to the float32 function as the model's own pass.

        Args:
            exact: the measurement in float32.
            parity: its result.
            packing: `learner.packing`.

        Returns:
            `parity`, with further cases and possibly another route.
        """
        self._cases, self._reasons = list(parity.cases), list(parity.reasons)
        expected = torch.cat([exact.expected[number] for number in _LINES["shared"][0]])
        try:
            self._policy.route = Route(packed=False, halves=False)
            own = torch.cat([self._plain(self._tokens.rows[number]) for number in _LINES["shared"][0]])
            noise = self._compare(f"own forward pass, {self._dtype}", own, expected)
        except _Refused as refusal:
            return self._parity(Route(packed=False), f"{self._name} cannot be trained: {refusal}")
        lines = self._try(f"packed, {self._dtype}", Route(), _LINES["shared"], expected)
        route = parity.route
        if lines.failure or lines.mean > max(MEAN_FLOOR, ROUNDING * noise.mean):
            off = (
                f"{self._dtype}: packed rows are off by {lines.mean:.2g} nats, its own forward pass by {noise.mean:.2g}"
            )
            self._reasons.append(lines.failure or off)
            route = Route(packed=False)
        return replace(self._chosen(route, packing), dtype=parity.dtype, bound=parity.bound)

    def _chosen(self, route: Route, packing: Packing) -> Parity:
        self._policy.route = route
        if packing == "packed" and not route.packed:
            return self._parity(route, f"learner.packing=packed is not exact for {self._name}: {self._reasons[-1]}")
        return self._parity(route)

    def _parity(self, route: Route, refusal: str | None = None) -> Parity:
        cases, reasons = tuple(self._cases), tuple(self._reasons)
        bound = BOUND if self._exact else MEAN_BFLOAT16
        return Parity(self._name, self._dtype, bound, cases, route, reasons, refusal)

    def _require_own_forward(self) -> None:
        """Check that the model's own forward pass works, depends on earlier tokens only, and does not change weights.

        Raises:
            _Refused: it does not.
        """
        self._policy.route = Route(packed=False, halves=False)
        versions = [parameter._version for parameter in self._policy.parameters()]
        row, longest = self._tokens.rows[1], self._tokens.rows[-1]
        self.expected = [self._plain(row) for row in self._tokens.rows]
        if versions != [parameter._version for parameter in self._policy.parameters()]:
            raise _Refused("its forward pass rewrites its own weights")
        again = self._compare("repeated", self._plain(row), self.expected[1])
        if not self._agrees(again):
            raise _Refused(f"what it scored before changes what it scores now, by {again.largest:.2g} nats")
        half = len(row) // 2
        other = np.concatenate([self._tokens.draw(half), row[half:]])
        # The effect of the context: what replacing the first half of a row changes in the scores of its second half.
        self._effect = float((self._plain(other)[half:] - self.expected[1][half:]).abs().mean())
        other = np.concatenate([row[:half], self._tokens.draw(len(row) - half)])
        early = self._plain(other)[: half - 1]
        causal = self._compare("causal", early, self.expected[1][: half - 1])
        if not self._agrees(causal):
            raise _Refused(f"it is not causal: later tokens change the score of earlier ones by {causal.largest:.2g}")
        # A short row against the longest: a length at which something changes lies between the two.
        cut = longest[:PREFIX]
        begun = self._plain(longest, range(len(cut) - 1))
        self._prefixes = self._agrees(self._compare("prefixes", self._plain(cut), begun))

    def _choose(self, packing: Packing) -> Route:
        """Select the fastest route that agrees; add the reasons against faster ones."""
        if not self._prefixes:
            self._reasons.append("its function of a row's beginning depends on the row's length")
        halves = self._agrees(self._try("halves", Route(packed=False, halves=True), [[0], [1], [2]]))
        if not halves:
            self._reasons.append(self._why("body and head apart"))
        if self._effect < LEAST_EFFECT:
            self._reasons.append(
                f"other contexts change its scores by only {self._effect:.1g} nats, too little to detect a leak"
            )
        if packing == "rows" or self._reasons:
            return Route(packed=False, halves=halves, prefixes=self._prefixes)
        for name, numbers in _LINES.items():
            if not self._agrees(self._try(name, Route(), numbers)):
                self._reasons.append(self._why("packed rows"))
                return Route(packed=False)
        return Route()

    def _why(self, what: str) -> str:
        last = self._cases[-1]
        return last.failure or f"{what} are off by {last.largest:.2g} nats ({last.name})"

    def _try(self, name: str, route: Route, lines: Sequence[Sequence[int]], expected: Tensor | None = None) -> Case:
        """Run the rows of each line through the policy on a route; record and return the case."""
        try:
            self._policy.route = route
            found = {number: value for line in lines for number, value in self._scored(line).items()}
        except PackingUnsupported as error:
            case = Case(name, math.nan, math.nan, str(error))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # depends on the model, which is called in a way its author did not intend
            case = Case(name, math.nan, math.nan, f"{type(error).__name__}: {first_line(error)[:160]}")
        else:
            wanted = torch.cat([self.expected[number] for number in found]) if expected is None else expected
            return self._compare(name, torch.cat(list(found.values())), wanted)
        self._cases.append(case)
        return case

    def _scored(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Log-probabilities of rows that go through the policy together, by row."""
        rows = []
        for number in numbers:
            tokens = self._tokens.rows[number]
            zeros = np.zeros(min(SCORED, len(tokens) - 1), np.float32)
            # The advantage carries the row's number through the plan, to sort the scores by.
            rows.append(Row(tokens.astype(np.int32), zeros, advantage=float(number)))
        ((batch,),) = plan(rows, 1, sum(len(row.tokens) for row in rows) * 2)
        logprob = self._policy(*inputs(batch, self._device))[0]
        owner = torch.tensor(batch.advantage, device=self._device)
        return {number: logprob[owner == number] for number in numbers}

    def _plain(self, tokens: Ids, places: range | None = None) -> Tensor:
        """Log-probabilities of a row's tokens under the model's own forward pass.

        Args:
            tokens: the row.
            places: whose next tokens are scored; None: of the last `SCORED`.

        Raises:
            _Refused: the forward pass fails, or a log-probability is not finite.
        """
        ids = torch.tensor(tokens, dtype=torch.long, device=self._device)
        places = places or range(max(0, len(tokens) - 1 - SCORED), len(tokens) - 1)
        positions = torch.arange(places.start, places.stop, device=self._device)
        try:
            logits = self._forward.whole(ids[None], positions)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # depends on the architecture
            raise _Refused(
                f"its forward pass fails on a row of {len(tokens)} tokens: {type(error).__name__}: "
                f"{first_line(error)[:160]}"
            ) from error
        logs = (logits.float() / self._policy.temperature).log_softmax(-1)
        chosen = logs.gather(1, ids[positions + 1, None])[:, 0]
        if not bool(chosen.isfinite().all()):
            raise _Refused("its log-probabilities are not finite")
        return chosen

    def _compare(self, name: str, found: Tensor, expected: Tensor) -> Case:
        """Record and return a case of log-probabilities [T] each. NaN counts as an infinite difference."""
        off = (found - expected).abs().nan_to_num(math.inf)
        runs = off.unfold(0, min(RUN, len(off)), 1).mean(1)
        case = Case(name, float(off.max()), float(off.mean()), run=float(runs.max()))
        self._cases.append(case)
        return case

    def _agrees(self, case: Case) -> bool:
        """Whether a case is within the bounds.

        Example, in float32: with a context effect of 2 nats an error of 1e-3 is allowed (`BOUND`); with 0.1 nats 2e-4
        (`SHARE_OF_EFFECT`); with 0.001 nats 1e-5 (`FLOOR`).
        """
        if case.failure:
            return False
        allowed = SHARE_OF_EFFECT * self._effect
        if self._exact:
            return case.largest <= min(BOUND, max(FLOOR, allowed))
        return case.mean <= min(MEAN_BFLOAT16, max(MEAN_FLOOR, allowed)) and case.run <= RUN_BFLOAT16


_LINES = {"packed alone": [[0], [2], [5]], "packed": [[1, 2, 3]], "shared": [[0, 1, 4, 5]]}
"""By case, the lines, each with the numbers of its rows (see `_Tokens`)."""


class _Tokens:
    """Random rows: 0 and 1 share a prefix, 2 and 3 share nothing, 4 is a prefix of 1, 5 is the longest."""

    def __init__(self, forward: Forward, max_tokens: int) -> None:
        self._random = np.random.default_rng(SEED)
        self._ids = _ordinary_ids(forward)
        opening = self.draw(min(MIN_SHARED + 8, max_tokens // 2))

        def longer(by: int) -> Ids:
            return np.concatenate([opening, self.draw(min(by, max_tokens - len(opening)))])

        first, second = longer(30), longer(45)
        others = [self.draw(min(length, max_tokens)) for length in (60, 50)]
        self.rows = [first, second, *others, second[: -min(6, len(second) - 2)], longer(max_tokens)]

    def draw(self, count: int) -> Ids:
        """Draw token ids, int64 [count]."""
        return self._random.choice(self._ids, count)


def _ordinary_ids(forward: Forward) -> Ids:
    """Token ids without a special meaning to the model, such as that of an image."""
    config = forward.lm.config
    known: dict[str, Any] = {**config.get_text_config().to_dict(), **config.to_dict()}
    special = [value for name, value in known.items() if "token" in name and isinstance(value, int)]
    size = min(forward.vocabulary, forward.lm.get_input_embeddings().weight.shape[0])
    ordinary = np.setdiff1d(np.arange(size), special)
    return ordinary if len(ordinary) else np.arange(size)
