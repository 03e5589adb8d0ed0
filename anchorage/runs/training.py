"""Trains a policy: starts the stack and the learner's ranks, trains to the end, and stops everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from anchorage.checks.preflight import Start, preflight
from anchorage.runs.progress import OnProgress, Progress, ShouldStop, announcer, update_summary
from anchorage.runs.resume import Resume, check_resumption, finished
from anchorage.runs.stack import Stack, watched
from services.config.tree import Config

if TYPE_CHECKING:
    from learner.rank.group import RankGroup
    from learner.report import UpdateReport


def run_training(config: Config, *, resume: Resume, on_progress: OnProgress, should_stop: ShouldStop) -> bool:
    """Train, and return whether the run reached its end. False: it was asked to stop, and left a checkpoint.

    Resuming a run that has reached its end reports that and starts nothing.

    Raises:
        AnchorageError: as `check_resumption`, `preflight`, the stack and the trainer raise it.
    """
    resumes = check_resumption(config, resume)
    announce = announcer(on_progress)
    if resumes and (line := finished(config)) is not None:
        announce(line)
        return True
    plays_panels = config.evaluation.every is not None
    preflight(Start(config, models=(config.model.path,), trains=True, plays_panels=plays_panels))
    from learner.card_turns import start_learner

    with Stack(config, announce, resume=resumes) as stack:
        announce("starting the learner")
        ranks = start_learner(config, stack.buffer)
        announce(ranks.parity.line())
        try:
            train_on(stack, ranks, resume=resumes, on_progress=on_progress, should_stop=should_stop)
        finally:
            ranks.stop()
        return not should_stop()


def train_on(
    stack: Stack,
    ranks: RankGroup,
    *,
    resume: bool,
    on_progress: OnProgress,
    should_stop: ShouldStop,
    on_report: Callable[[UpdateReport], None] = lambda report: None,
) -> int:
    """Train on a running stack and return the policy version reached. `on_report` gets the report of each update."""
    from learner.dispatch import Dispatcher
    from learner.evaluation import evaluate
    from learner.sampler_check import EPISODES, require_agreement
    from learner.trainer import Trainer

    config = stack.config
    stop = watched(stack, should_stop)
    report_update = _update_reporter(config, on_progress)

    def note(report: UpdateReport) -> None:
        report_update(report)
        on_report(report)

    def check_sampler(version: int) -> None:
        order = Dispatcher(config, stack.splits)
        tasks = [order.task(group) for group in range(EPISODES)]
        require_agreement(config, stack.buffer, tasks, ranks, stop)

    def play_panel(version: int, should_stop: ShouldStop) -> Mapping[str, float]:
        stream = f"eval-{version:06d}"
        result = evaluate(config, stack.buffer, stack.splits, stream=stream, version=version, should_stop=should_stop)
        return result.scalars() if result.complete else {}

    trainer = Trainer(
        config,
        stack.buffer,
        stack.channel,
        ranks,
        config.run.folder,
        stack.splits,
        on_start=check_sampler,
        on_update=note,
        evaluate=play_panel,
        should_stop=stop,
    )
    on_progress(Progress("training", "training", 0, config.learner.updates, "updates"))
    trainer.train(resume=resume)
    return trainer.version


def _update_reporter(config: Config, on_progress: OnProgress) -> Callable[[UpdateReport], None]:
    """Return a function that reports an update as progress, with the number of episodes trained on so far."""
    episodes: dict[int, int] = {}  # by update: one that is done again after a failure counts once

    def note(report: UpdateReport) -> None:
        episodes[report.update] = report.episodes
        before = (min(episodes) - 1) * report.episodes  # of a resumed run, whose updates are as large
        text = update_summary(report, before + sum(episodes.values()))
        total = config.learner.updates
        on_progress(Progress("training", "training", report.update, total, "updates", text, report.scalars()))

    return note
