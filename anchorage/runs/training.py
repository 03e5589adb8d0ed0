"""`anchorage train`: brings up the stack, starts the ranks, trains to the end, and puts everything away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console

from anchorage.checks.preflight import Start, preflight
from anchorage.cli.progress import bar, summary
from anchorage.runs.resume import Resume, check_resumption
from anchorage.runs.stack import Stack, stop_on_signals, watched
from services.config.tree import Config


def run_training(config: Config, *, resume: Resume, console: Console) -> bool:
    """Train; returns whether the run reached its end (False: it was asked to stop, and left a checkpoint).

    Raises:
        AnchorageError: as `check_resumption`, `preflight`, the stack and the trainer raise it.
    """
    going_on = check_resumption(config, resume)
    plays_panels = config.evaluation.every is not None
    preflight(Start(config, models=(config.model.path,), trains=True, plays_panels=plays_panels))
    from learner.rank.group import start_ranks

    with stop_on_signals() as stopped, Stack(config, announce=console.print, resume=going_on) as stack:
        console.print("starting the learner")
        ranks = start_ranks(config)
        console.print(ranks.parity.line(), highlight=False, markup=False)
        try:
            train_on(stack, ranks, resume=going_on, console=console, should_stop=stopped)
        finally:
            ranks.stop()
        return not stopped()


def train_on(
    stack: Stack,
    ranks: object,
    *,
    resume: bool,
    console: Console,
    should_stop: Callable[[], bool],
    on_report: Callable[[object], None] = lambda report: None,
) -> int:
    """Train on a running stack; answers the policy version reached."""
    from learner.dispatch import Dispatcher
    from learner.evaluation import evaluate
    from learner.report import UpdateReport
    from learner.sampler_check import EPISODES, require_agreement
    from learner.trainer import Trainer

    config = stack.config
    stop = watched(stack, should_stop)
    with bar(console, "training", config.learner.updates, "updates") as tell:
        episodes: dict[int, int] = {}  # by update: one that is done again counts once

        def note(report: UpdateReport) -> None:
            episodes[report.update] = report.episodes
            before = (min(episodes) - 1) * report.episodes  # of a run that goes on; its updates are as large
            tell(report.update, summary(report, before + sum(episodes.values())))
            on_report(report)

        def check_sampler(version: int) -> None:
            order = Dispatcher(config, stack.splits)
            tasks = [order.task(group) for group in range(EPISODES)]
            require_agreement(config, stack.buffer, tasks, ranks, stop)  # type: ignore[arg-type]

        def play_panel(version: int, should_stop: Callable[[], bool]) -> Mapping[str, float]:
            stream = f"eval-{version:06d}"
            result = evaluate(
                config, stack.buffer, stack.splits, stream=stream, version=version, should_stop=should_stop
            )
            return result.scalars() if result.complete else {}

        trainer = Trainer(
            config,
            stack.buffer,
            stack.channel,
            ranks,  # type: ignore[arg-type]
            config.run.folder,
            stack.splits,
            on_start=check_sampler,
            on_update=note,
            evaluate=play_panel,
            should_stop=stop,
        )
        trainer.train(resume=resume)
        return trainer.version
