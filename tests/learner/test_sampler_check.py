"""The sampler is compared with the learner before a run dispatches anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from learner.batching import Row
from learner.sampler_check import EPISODES, STEPS, STREAM, require_agreement
from services.buffer import Buffer
from services.config.tree import Config
from services.errors import ModelUnavailable, RunStalled
from services.schemas import Task, Ticket
from tests.learner.synthetic import play

TASKS = [Task(env="alfworld", split="train", index=index) for index in range(EPISODES)]


class Scorer:
    """Gives a gap, and keeps the rows."""

    def __init__(self, largest: float, mean: float) -> None:
        self.answer = (largest, mean)
        self.rows: list[Row] = []

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        self.rows = list(rows)
        return self.answer


def configured(run_name: str, dtype: str = "float32", timeout_s: float = 30.0) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run_name},
            "model": {"path": "models/mine", "dtype": dtype},
            "learner": {"group_timeout_s": timeout_s},
        }
    )


@pytest.fixture
def buffer(redis_url: str, run_name: str) -> Iterator[Buffer]:
    buffer = Buffer.connect(redis_url, run_name, configured(run_name).buffer, max_attempts=1)
    yield buffer
    buffer.close()


@contextmanager
def actors(buffer: Buffer, broken: Callable[[Ticket], bool] = lambda ticket: False) -> Iterator[list[Ticket]]:
    """A thread that plays what is issued; the tickets that it saw."""
    seen: list[Ticket] = []
    finished = threading.Event()

    def run() -> None:
        while not finished.wait(0.01):
            for ticket in buffer.lease("actor", 4, 30.0):
                seen.append(ticket)
                if broken(ticket):
                    buffer.fail("actor", ticket.id, "broken game")
                else:
                    buffer.store(play(ticket, steps=ticket.max_steps))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        finished.set()
        thread.join()


def test_short_episodes_are_scored_and_leave_nothing_behind(buffer: Buffer, run_name: str) -> None:
    scorer = Scorer(5e-4, 1e-5)
    with actors(buffer) as seen:
        require_agreement(configured(run_name), buffer, TASKS, scorer)
    assert [ticket.task for ticket in seen] == TASKS
    assert {(ticket.stream, ticket.max_steps, ticket.temperature) for ticket in seen} == {(STREAM, STEPS, 1.0)}
    assert len(scorer.rows) == EPISODES * STEPS
    episode = play(seen[0], steps=STEPS)
    first = next(row for row in scorer.rows if row.logprobs.tolist() == episode.steps[0].logprobs.tolist())
    assert first.tokens.tolist() == [*episode.steps[0].prompt_ids, *episode.steps[0].response_ids]
    assert not buffer.known(STREAM)


@pytest.mark.parametrize(
    ("dtype", "largest", "mean", "agrees"),
    [
        ("float32", 9e-4, 1e-4, True),
        ("float32", 2e-3, 1e-4, False),
        ("float32", float("nan"), float("nan"), False),
        ("bfloat16", 0.5, 0.02, True),
        ("bfloat16", 0.5, 0.04, False),
        ("bfloat16", float("inf"), float("inf"), False),
    ],
)
def test_bounds(buffer: Buffer, run_name: str, dtype: str, largest: float, mean: float, agrees: bool) -> None:
    with actors(buffer):
        if agrees:
            require_agreement(configured(run_name, dtype), buffer, TASKS[:2], Scorer(largest, mean))
            return
        with pytest.raises(ModelUnavailable, match=r"models/mine: vLLM's log-probabilities differ from"):
            require_agreement(configured(run_name, dtype), buffer, TASKS[:2], Scorer(largest, mean))
    assert not buffer.known(STREAM)


def test_episodes_that_cannot_be_played_are_left_out(buffer: Buffer, run_name: str) -> None:
    scorer = Scorer(0.0, 0.0)
    with actors(buffer, broken=lambda ticket: ticket.group > 0):
        require_agreement(configured(run_name), buffer, TASKS[:3], scorer)
    assert len(scorer.rows) == STEPS


def test_it_ends(buffer: Buffer, run_name: str) -> None:
    with pytest.raises(RunStalled, match=r"no episode finished for 0\.5 s"):
        require_agreement(configured(run_name, timeout_s=0.5), buffer, TASKS, Scorer(0.0, 0.0))
    scorer = Scorer(9.0, 9.0)
    require_agreement(configured(run_name), buffer, TASKS, scorer, should_stop=lambda: True)
    assert scorer.rows == []
    assert not buffer.known(STREAM)


def test_a_model_on_disk_is_scored_by_its_own_forward_pass(tmp_path: Path) -> None:
    import numpy as np
    import torch

    from anchorage.checks.local_scorer import LocalScorer, fits
    from tests.actors.engine.many_models import make, write

    model = make("granite")
    folder = write(tmp_path, model)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logs = (model(ids).logits[0] / 0.7).log_softmax(-1)
    exact = logs[7:11].gather(1, ids[0, 8:, None])[:, 0].numpy()
    row = Row(ids[0].numpy().astype(np.int32), exact + np.array([0.0, 0.5, 0.0, 0.0], np.float32), 0.0)
    largest, mean = LocalScorer(folder, "float32", 0.7).gap([row])
    assert largest == pytest.approx(0.5, abs=1e-4)
    assert mean == pytest.approx(0.125, abs=1e-4)
    assert fits(folder, "float32")
