"""The judgement of sampled responses: wrong log-probabilities, weights and seeds fail, right ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine.interface import Sample
from benchmarks.gpu_check import engine
from benchmarks.gpu_check.models import folder_of
from benchmarks.gpu_check.settings import Settings
from services.schemas import VersionSpan

Samples = list[tuple[list[int], Sample]]


def failures(difference: list[float], bound: float = 0.01) -> set[str]:
    rows = engine.judge_gap("gap", np.array(difference), bound)
    return {row.name.split(", ")[1] for row in rows if row.verdict == "failed"}


def test_the_gap_is_judged_by_its_mean_its_tail_and_k3() -> None:
    assert not failures([0.009, -0.009] * 100)
    assert failures([0.011, -0.011] * 100) == {"mean"}
    assert failures([0.0] * 195 + [0.15] * 5) == {"p99"}
    assert failures([0.0] * 199 + [3.0]) == {"mean", "k3"}
    assert failures([math.nan, *[0.0] * 500]) == {"mean", "k3"}
    assert failures([math.inf, *[0.0] * 500]) == {"mean", "k3"}


def test_k3_is_that_of_two_distributions() -> None:
    old, new = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = np.repeat([0, 1, 2], [500, 300, 200])
    rows = {row.name: row.value for row in engine.judge_gap("gap", np.log(new / old)[drawn], 1.0)}
    assert rows["gap, k3, nats"] == pytest.approx(float((old * np.log(old / new)).sum()))


def sample(ids: list[int], logprobs: list[float] | None = None) -> Sample:
    return Sample(ids, logprobs or [-1.0] * len(ids), (VersionSpan(0, len(ids)),), "", True)


def test_a_seed_without_effect_and_one_that_does_not_repeat_are_noticed() -> None:
    one: Samples = [([1], sample([number, 2])) for number in range(20)]
    other: Samples = [([1], sample([number, 3])) for number in range(20)]

    def verdicts(*of: Samples) -> list[str]:
        return [row.verdict for row in engine.judge_repeated(*of)]

    assert verdicts(one, one, other) == ["ok", "ok"]
    assert verdicts(one, other, other) == ["failed", "ok"]
    assert verdicts(one, one, one) == ["ok", "failed"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(dry=True, model="tiny-64", folder=tmp_path_factory.mktemp("gpu-check"))


@torch.no_grad()
def drawn(folder: Path, temperature: float = engine.TEMPERATURE, *, shifted: bool = False) -> Samples:
    """Responses drawn by the model itself; `shifted`: each token has the log-probability of its neighbour."""
    policy = engine.load_policy(folder, "float32", 1.0, route=engine.Route(packed=False))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, 1127, (8, 40), generator=generator)
    ids, logprobs = prompts, []
    for _ in range(10):
        logs = (policy.lm(ids).logits[:, -1] / temperature).log_softmax(-1)
        chosen = torch.multinomial(logs.exp(), 1, generator=generator)
        ids, logprobs = torch.cat([ids, chosen], 1), [*logprobs, logs.gather(1, chosen)]
    scored = torch.cat(logprobs, 1).roll(1 if shifted else 0, 1)
    responses = ids[:, prompts.shape[1] :]
    return [
        (prompt, sample(response, own))
        for prompt, response, own in zip(prompts.tolist(), responses.tolist(), scored.tolist(), strict=True)
    ]


def test_right_log_probabilities_pass_and_changed_weights_would_not(settings: Settings) -> None:
    folder = folder_of(settings)
    rows = {row.name: row for row in engine.gap(settings, folder, drawn(folder))}
    assert {row.verdict for row in rows.values()} == {"measured", "ok"}
    assert rows["gap of changed weights, mean, nats"].verdict == "ok"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda folder: drawn(folder, 1.0),
        lambda folder: drawn(folder, shifted=True),
        lambda folder: [(prompt[1:], response) for prompt, response in drawn(folder)],
    ],
    ids=["another temperature", "another place", "another prompt"],
)
def test_wrong_log_probabilities_fail(settings: Settings, wrong: Callable[[Path], Samples]) -> None:
    folder = folder_of(settings)
    rows = {row.name: row.verdict for row in engine.gap(settings, folder, wrong(folder))}
    assert rows["gap to the learner, mean, nats"] == rows["gap to float32, mean, nats"] == "failed"


def test_a_model_on_which_changed_weights_do_not_show_is_noticed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "change", lambda lm: None)
    folder = folder_of(settings)
    rows = {row.name: row.verdict for row in engine.gap(settings, folder, drawn(folder))}
    assert rows["gap of changed weights, mean, nats"] == "failed"
