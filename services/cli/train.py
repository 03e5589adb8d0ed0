"""`anchorage train`: brings up the stack, starts the ranks, trains to the end, and puts everything away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console

from services.cli.progress import bar, summary
from services.cli.stack import Stack, stop_on_signals, watched
from services.config.tree import Config
from services.model_folder import check_model_folder
from services.run_folder import CHECKPOINTS_NAME


def run_training(config: Config, *, resume: bool, console: Console) -> bool:
    """Train; answers whether the run came to its end (False: it was asked to stop, and left a checkpoint)."""
    from learner.checkpoint import require_none
    from learner.rank_group import start_ranks

    check_model_folder(config.model.path)
    if not resume:
        require_none(config.run.folder / CHECKPOINTS_NAME)
    with stop_on_signals() as stopped, Stack(config, announce=console.print) as stack:
        console.print("starting the learner")
        ranks = start_ranks(config)
        try:
            train_on(stack, ranks, resume=resume, console=console, should_stop=stopped)
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
    from learner.evaluation import evaluate
    from learner.report import UpdateReport
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
            on_update=note,
            evaluate=play_panel,
            should_stop=stop,
        )
        trainer.train(resume=resume)
        return trainer.version
