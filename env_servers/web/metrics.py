"""Prometheus metrics of one server, in a registry of its own.

Invariants
- Labels come from closed sets: the server's own routes and HTTP statuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from env_servers.sessions.table import SessionTable

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class TableCollector(Collector):
    """Exports the counts of a session table, read at every scrape."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    def collect(self) -> Iterable[Metric]:
        counts = self._table.counts
        yield GaugeMetricFamily("anchorage_env_sessions", "Live sessions.", self._table.live)
        yield CounterMetricFamily("anchorage_env_resets", "Sessions opened.", counts.resets)
        yield CounterMetricFamily("anchorage_env_steps", "Actions taken.", counts.steps)
        yield CounterMetricFamily("anchorage_env_repeats", "Repeated steps.", counts.repeats)
        yield CounterMetricFamily("anchorage_env_expired", "Idle sessions closed.", counts.expired)
        yield CounterMetricFamily("anchorage_env_faults", "Failures of the environment.", counts.faults)
        yield GaugeMetricFamily(
            "anchorage_env_hung_calls", "Abandoned calls that still hold a thread.", self._table.hung
        )


class ServerMetrics:
    """Metrics of a server's requests and sessions.

    Args:
        table: the table whose counts are exported.
        routes: paths with a label of their own; all others share one.

    Attributes:
        registry: Prometheus registry of these metrics.
    """

    def __init__(self, table: SessionTable, routes: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(TableCollector(table))
        self._errors = Counter(
            "anchorage_env_errors", "Requests that got a problem document.", ["status"], registry=self.registry
        )
        latency = Histogram(
            "anchorage_env_request_seconds",
            "Time from a request to its response.",
            ["route"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._latency = {route: latency.labels(route) for route in routes}
        self._other = latency.labels("other")

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Record one request."""
        self._latency.get(path, self._other).observe(seconds)
        if status >= 400:
            self._errors.labels(str(status)).inc()


def merge(pages: Sequence[str]) -> bytes:
    """Combine the metrics pages of several processes by adding up their values."""
    registry = CollectorRegistry()
    registry.register(_Merged(pages))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, pages: Sequence[str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        totals: dict[str, Metric] = {}
        sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for page in self._pages:
            for family in text_string_to_metric_families(page):
                if family.name.endswith("_created"):
                    continue
                totals.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                values = sums.setdefault(family.name, {})
                for sample in family.samples:
                    key = (sample.name, tuple(sample.labels.items()))
                    values[key] = values.get(key, 0.0) + sample.value
        for name, metric in totals.items():
            for (sample_name, labels), value in sums[name].items():
                metric.add_sample(sample_name, dict(labels), value)
            yield metric
