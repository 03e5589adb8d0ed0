"""The algorithm on one page does what its page says: it learns, and its step level pays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "examples" / "gigpo_single_file.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gigpo_single_file", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gigpo_finds_shorter_ways_than_grpo(page: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {}
    for algorithm in ("gigpo", "grpo"):
        curve = np.array(page.train(algorithm, updates=30))
        assert curve[0, 0] < 0.5 < 0.9 < curve[-5:, 0].mean()
        ends[algorithm] = curve[-5:, 1].mean()
    assert ends["gigpo"] < 0.6 * ends["grpo"]
    assert "update  30" in capsys.readouterr().out


def test_an_update_raises_what_was_better_and_lowers_what_was_worse(page: ModuleType) -> None:
    policy = np.zeros((1, 6, 6, 2, 4))
    states = np.array([(0, 1, 1, 0), (0, 1, 1, 0)])
    after = page.softmax(page.update(policy, states, np.array([0, 1]), np.array([1.0, -1.0]))[0, 1, 1, 0])
    assert after[0] > 0.25 > after[1]
    assert after[2] == pytest.approx(after[3])


def test_the_clip_ends_the_gradient_beyond_its_bound(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LEARNING_RATE", 10.0)  # the first of the two steps goes far beyond the clip
    monkeypatch.setattr(page, "KL", 0.0)
    states, actions = np.array([(0, 1, 1, 0)]), np.array([0])
    after = page.update(np.zeros((1, 6, 6, 2, 4)), states, actions, np.array([1.0]))[0, 1, 1, 0]
    assert after == pytest.approx(10.0 * (np.eye(4)[0] - 0.25))
