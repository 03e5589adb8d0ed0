"""Prometheus metrics of one actor's gateway, in a registry of its own, and their summary for heartbeats.

Invariants
- Labels come from closed sets: statuses, parts of a call, causes.
"""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.schemas import Step
from services.turns import short_states, turns_of

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATE_S = 30.0


class GatewayMetrics:
    """Counts of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = self._counter("calls", "Model calls that were answered, by status.", "code")
        self.refused = self._counter("refused", "Requests that were refused, by reason.", "code")
        self.imposed = self._counter("imposed", "Fields of requests whose value is the run's.", "field")
        self.broken = self._counter("prefix_broken", "Prompts that continue no earlier call.", "reason")
        self.retries = self._counter("retries", "Requests that got the answer of an earlier one.", "kind")
        self.episodes = self._counter("episodes", "Episodes that ended.", "outcome", "cause")
        self.exits = self._counter("agent_exit", "Agent processes that ended, by exit code.", "code")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.orphaned = self._counter("orphaned_calls", "Answers that no client received.")
        self.unreadable = self._counter("unreadable", "Answers whose tool calls could not be read.")
        self.special = self._counter("special_text", "Control tokens in messages that were made text.")
        self.unknown = self._counter("unknown_fields", "Fields of requests that were ignored.")
        self.extended = self._counter("extended_calls", "Calls whose prompt continues an earlier one.")
        self.turns = self._counter("turns", "Turns of stored episodes.")
        self.short_anchors = self._counter("short_anchor_turns", "Turns whose state was told in a few characters.")
        self.in_flight = Gauge(
            "anchorage_agent_calls_in_flight", "Model calls without an answer.", registry=self.registry
        )
        self.seconds = Histogram(
            "anchorage_agent_call_seconds",
            "Time of the parts of a call.",
            ["part"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._answered: deque[float] = deque(maxlen=10_000)
        self.totals = {"calls": 0, "extended": 0, "turns": 0, "steps": 0, "unreadable": 0, "short": 0}

    def answered(self, *, extends: bool, follows: bool, readable: bool) -> None:
        """Count an answer.

        Args:
            extends: its prompt continues an earlier call.
            follows: it is not the first call of its conversation.
            readable: its tool calls could be read.
        """
        self._answered.append(time.monotonic())
        self.totals["calls"] += follows
        self.totals["extended"] += extends
        if extends:
            self.extended.inc()
        if not readable:
            self.unreadable.inc()
            self.totals["unreadable"] += 1

    def stored(self, steps: tuple[Step, ...]) -> None:
        """Count the turns of an episode that goes to the learner."""
        turns, short = len(turns_of(steps)), short_states(steps)
        self.turns.inc(turns)
        self.short_anchors.inc(short)
        self.totals["turns"] += turns
        self.totals["steps"] += sum(1 for step in steps if step.trained)
        self.totals["short"] += short

    def summary(self) -> dict[str, object]:
        """Figures for heartbeats."""
        now, totals = time.monotonic(), self.totals
        recent = sum(1 for at in self._answered if now - at <= RATE_S)

        def share(part: str, whole: str) -> float | None:
            return round(totals[part] / totals[whole], 4) if totals[whole] else None

        return {
            "calls_per_s": round(recent / RATE_S, 2),
            "extended_fraction": share("extended", "calls"),
            "calls_per_turn": share("steps", "turns"),
            "short_anchor_fraction": share("short", "turns"),
        }

    def page(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"anchorage_agent_{name}", text, labels, registry=self.registry)
