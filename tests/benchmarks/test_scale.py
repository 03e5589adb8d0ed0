"""A run of simulated actors: every trajectory is taken once, no lease is lost, and what is counted adds up."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.parts.collecting import SPLITS, Collecting
from benchmarks.parts.crowd import Figures, TimedBuffer
from benchmarks.parts.recorded import MEAN_BYTES, MEAN_SECONDS, episode, kind_of
from benchmarks.scale import EPISODES, GROUP, Load, Run, costs, main
from learner.dispatch import Dispatcher
from learner.dynamic_sampling import Collected
from services.buffer import Buffer, Stored
from services.codec import decode, encode
from services.config.tree import BufferConfig
from services.schemas import Task, Ticket

TASK = Task(env="e", split="train", index=0)


def test_a_run_of_a_few_actors_balances(tmp_path: Path) -> None:
    with Run(Load(2, 0.4), tmp_path) as run:
        found = run.measure(4.0)  # raises where the books do not balance
    assert found["leases_lost"] == 0
    assert found["trajectories"] > 0
    assert found["updates"] > 0
    assert found["readers"] == 2  # of a version that was announced meanwhile
    assert 0 < found["store_p50_ms"] <= found["store_p99_ms"]
    assert {name: value for name, value in found.items() if not (np.isfinite(value) and value >= 0)} == {}


def test_trajectories_that_are_stored_at_the_same_time_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Slow(Counter[str]):
        """Gives another thread the time to read the same count."""

        def __missing__(self, name: str) -> int:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.3)  # broken where the other one has to wait its turn
            return 0

    monkeypatch.setattr(Buffer, "store", lambda self, trajectory: Stored.STORED)
    buffer = TimedBuffer.__new__(TimedBuffer)
    buffer.figures = Figures(results=Slow())
    ticket = Ticket(group=0, member=0, group_size=1, task=TASK, seed=0)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(buffer.store, [episode(ticket, "a", 0)] * 2))
    assert buffer.figures.results.total() == 2


def test_a_trajectory_that_is_taken_twice_or_in_another_order_is_noticed(
    tmp_path: Path, redis_url: str, run_name: str
) -> None:
    config = Load(1, 1.0).config(tmp_path)
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    learner = Collecting(config, buffer)
    tickets = Dispatcher(config, SPLITS).tickets([0])
    groups = {0: [episode(ticket, "a", 0) for ticket in tickets]}
    learner._check(Collected(groups), [])
    assert learner.tickets == {ticket.id for ticket in tickets}
    with pytest.raises(ValueError, match="were taken before"):
        learner._check(Collected(groups), [])
    with pytest.raises(ValueError, match="other groups"):
        learner._check(Collected(groups), [1])
    with pytest.raises(ValueError, match="other trajectories"):
        learner._check(Collected({1: groups[0]}), [])
    with pytest.raises(ValueError, match="left groups out"):
        learner._check(Collected(groups, stale=1), [])
    buffer.close()


def test_simulated_episodes_are_as_long_and_as_large_as_recorded_ones() -> None:
    tickets = [Ticket(group=n, member=0, group_size=1, task=TASK, seed=7919 * n) for n in range(400)]
    documents = [encode(episode(ticket, "scale-rollout-17", 3)) for ticket in tickets]
    assert np.mean([len(document) for document in documents]) == pytest.approx(MEAN_BYTES, rel=0.1)
    assert np.mean([kind_of(ticket).seconds for ticket in tickets]) == pytest.approx(MEAN_SECONDS, rel=0.1)
    again = decode(documents[0])
    assert len(again.steps) == kind_of(tickets[0]).steps
    assert again.ticket == tickets[0]


def test_loads_are_no_larger_than_offered_and_no_faster_than_recorded() -> None:
    assert Load.of(1, 100.0).pace == 1.0
    assert Load.of(1000, 100.0).offered == pytest.approx(100.0)
    for actors in (1, 10, 1000):
        learner = Load.of(actors, 100.0).config(Path("runs")).learner
        assert (learner.max_staleness + 1) * learner.groups_per_update * GROUP >= 2.9 * actors * EPISODES


def test_costs_are_those_that_the_rows_were_made_of() -> None:
    rows = []
    for stored, actors in ((10.0, 1), (100.0, 10), (100.0, 100), (90.0, 1000)):
        row = {"stored_per_s": stored, "actors": float(actors)}
        rows.append(
            row
            | {f"{name}_processors": 2e-3 * stored + 3e-4 * actors + 0.01 for name in ("redis", "learner", "actors")}
        )
    found = costs(rows)
    assert found["redis_us_per_trajectory"] == pytest.approx(2000)
    assert found["actors_us_per_actor_and_s"] == pytest.approx(300)
    assert found["learner_us_per_s"] == pytest.approx(10_000)


@pytest.mark.parametrize(
    "given",
    [
        *(["--actors", "1,x"], ["--actors", "4,0"], ["--actors", ""], ["--seconds", "0"], ["--seconds", "nan"]),
        *(["--offered", "0"], ["--offered", "inf"], ["--json", "/nowhere/at/all.json"]),
    ],
)
def test_invalid_arguments_are_refused_before_anything_runs(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--short", *given])
    assert f"error: argument {given[0]}: " in capsys.readouterr().err
