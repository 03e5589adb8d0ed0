"""The groups of checks, and how one runs in this process.

A group is a tuple of functions from `Settings` to rows, in a module. Modules are imported when their group runs: the
process that prints the table imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

from benchmarks.gpu_check.rows import Row, failed
from benchmarks.gpu_check.settings import Settings
from services.errors import first_line

HERE = "benchmarks.gpu_check"

Check = Callable[[Settings], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class Group:
    """A group of checks.

    Attributes:
        title: what it checks.
        limit_s: within which its process must end.
        checks: `module:name` of them.
        environment: variables of its process.
    """

    title: str
    limit_s: float
    checks: str
    environment: dict[str, str] = field(default_factory=dict)


GROUPS: MappingProxyType[str, Group] = MappingProxyType(
    {
        "machine": Group("driver, cards, compiler, shared memory, peer-to-peer", 180, f"{HERE}.machine:CHECKS"),
        "packages": Group("versions, imports", 600, f"{HERE}.packages:CHECKS"),
        "kernels": Group("a Triton kernel; packed attention with gradients", 600, f"{HERE}.kernels:CHECKS"),
        "zero-2": Group("a learner rank in ZeRO stage 2", 1500, f"{HERE}.learner:ZERO_2"),
        "resume-2": Group("a restored rank in ZeRO stage 2", 900, f"{HERE}.learner:RESUME_2"),
        "zero-3": Group("a learner rank in ZeRO stage 3", 1500, f"{HERE}.learner:ZERO_3"),
        "resume-3": Group("a restored rank in ZeRO stage 3", 900, f"{HERE}.learner:RESUME_3"),
        "engine": Group("vLLM: start, speed, seeds, gap to the learner", 2400, f"{HERE}.engine:CHECKS"),
        "weights": Group("every weight channel by stage", 1200, f"{HERE}.weights:CHECKS"),
        "two-cards": Group("NCCL, two ranks, two workers of an engine", 1800, f"{HERE}.two_cards:CHECKS"),
        "end-to-end": Group("three updates", 1800, f"{HERE}.end_to_end:CHECKS"),
        "algorithms": Group("GiGPO beside GRPO", 1200, f"{HERE}.algorithms:CHECKS"),
    }
)
"""By name, in the order in which they run."""


def run(checks: str, settings: Settings, report: Callable[[Row], None]) -> None:
    """Run checks, `module:name`, one after the other; each row is reported as soon as it is known.

    A check that raises gives a failed row, and the next one runs.
    """
    module, _, name = checks.partition(":")
    found: Iterable[Check] = getattr(importlib.import_module(module), name)
    for check in found:
        try:
            for row in check(settings):
                report(row)
        except Exception as error:
            traceback.print_exc()  # into the group's log
            report(failed(check.__name__.replace("_", " "), f"{type(error).__name__}: {first_line(error)[:300]}"))
