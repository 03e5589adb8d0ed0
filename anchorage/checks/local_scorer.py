"""Scores in this process what vLLM sampled, by the model's own forward pass, where no learner runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.errors import ModelUnavailable, first_line
from services.model_folder import stored_parameters

if TYPE_CHECKING:
    from learner.batching import Row
    from learner.rank.policy import Policy

BYTES = {"float32": 4, "bfloat16": 2}
ROOM = 1.5
"""Memory for loading and scoring, as a multiple of that of the weights."""


class LocalScorer:
    """The model of a folder, on the CPU.

    Raises:
        ModelUnavailable: the model cannot be loaded, or its forward pass fails.
    """

    def __init__(self, folder: Path, dtype: str, temperature: float) -> None:
        from learner.rank.policy import Route, load_policy

        self._policy = load_policy(folder, dtype, temperature, route=Route(packed=False, halves=False))

    def gap(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Return the largest and the mean difference (nats) between the rows' log-probabilities and the model's."""
        return gap(self._policy, rows)


def gap(policy: Policy, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the largest and the mean difference (nats) between the rows' log-probabilities and the policy's.

    Each row goes through the policy alone.

    Raises:
        ModelUnavailable: the forward pass fails.
    """
    differences = [off for row in rows for off in _differences(policy, row)]
    return max(differences, default=0.0), sum(differences) / max(1, len(differences))


def fits(folder: Path, dtype: str) -> bool:
    """Return whether this machine has enough free memory for the folder's model."""
    needed = stored_parameters(folder) * BYTES[dtype] * ROOM
    return needed < _available_bytes()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Let transformers load models without a bar on standard error; its setting is put back afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _differences(policy: Policy, row: Row) -> list[float]:
    import torch

    from learner.batching import plan
    from learner.rank.policy import inputs

    ((batch,),) = plan([row], 1, len(row.tokens))
    try:
        with torch.no_grad():
            scored, _ = policy(*inputs(batch, next(policy.parameters()).device))
    except Exception as error:  # any error that an architecture raises
        raise ModelUnavailable(f"the model's forward pass fails: {first_line(error)[:200]}") from error
    off: list[float] = (scored.cpu() - torch.tensor(batch.behaviour)).abs().nan_to_num(math.inf).tolist()
    return off


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
