"""Torch's threads while weights are copied."""

from __future__ import annotations

import os

import pytest
import torch

from services.weights.processors import MOST, all_processors


def test_threads_are_as_many_as_processors_meanwhile_and_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(KeyError):
            _fails_meanwhile()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _fails_meanwhile() -> None:
    with all_processors():
        assert torch.get_num_threads() == min(MOST, len(os.sched_getaffinity(0)))
        raise KeyError


def test_more_threads_than_that_are_left_as_they_are() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(MOST + 1)
    try:
        with all_processors():
            assert torch.get_num_threads() == MOST + 1
    finally:
        torch.set_num_threads(before)
