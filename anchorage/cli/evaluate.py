"""`anchorage eval`: plays the evaluation panels with policies and baselines and prints what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from anchorage.checks.preflight import Start, preflight
from anchorage.cli.export import policy_of
from anchorage.cli.output import literal_console, require_writable, write_text
from anchorage.cli.progress import bar, play_summary
from anchorage.runs.baselines import BASELINES, evaluate_baseline
from anchorage.runs.stack import Stack, stop_on_signals, watched
from services.codec import CodecError
from services.config import ConfigError, load_config
from services.config.load import parse_config
from services.config.tree import Config
from services.errors import ModelUnavailable, did_you_mean
from services.model_folder import check_model_folder
from services.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, WARMSTART_NAME, run_of

if TYPE_CHECKING:
    from learner.evaluation import EvaluationResult, Rate
    from services.buffer import Buffer

LOAD_TIMEOUT_S = 180.0
PUBLISHED_NAMES = {
    "pick_and_place_simple": "Pick",
    "look_at_obj_in_light": "Look",
    "pick_clean_then_place_in_recep": "Clean",
    "pick_heat_then_place_in_recep": "Heat",
    "pick_cool_then_place_in_recep": "Cool",
    "pick_two_obj_and_place": "Pick2",
}
"""ALFWorld's task types as the papers' tables call them."""


def evaluation_config(
    recipe: Path | None, overrides: Sequence[str], policies: Sequence[str], env: str | None = None
) -> Config:
    """The recipe's tree, or without a recipe the one that the first of `policies` (none: `model.path`) was made with.

    `env` is the environment to play, one of `envs` where the tree has several. The evaluation is a run of its own,
    beside the one that it may be of.

    Raises:
        ConfigError: nothing says how a policy is to be asked, or `env` is none of the tree's.
    """
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        recipe, overrides = None, [str(recipe), *overrides]  # without a recipe the first override stands in its place
    models = [Path(policy) for policy in policies if policy not in BASELINES]
    if recipe is None and not policies:
        models = [load_config(None, overrides).model.path]
    config = _own_config(models, overrides) if recipe is None and models else load_config(recipe, overrides)
    if env is not None:
        config = _playing(config, env)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-eval"})})


def _own_config(policies: Sequence[Path], overrides: Sequence[str]) -> Config:
    """Of the run that a policy is of, or of the warm start that made it: the first there is."""
    for policy in policies:
        for run in (policy, run_of(policy)):
            if run is not None and (run / CONFIG_NAME).is_file():
                return load_config(run / CONFIG_NAME, overrides)
        try:
            made = json.loads((policy / WARMSTART_NAME).read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return parse_config(made, overrides)
    raise ConfigError(
        f"{policies[0]} is no run and does not say how it was trained, so its prompts are not known: "
        "give a recipe, as in anchorage eval configs/demo.yaml --policy …"
    )


def _playing(config: Config, name: str) -> Config:
    """With the environment of that name alone."""
    if not config.envs:
        return config.model_copy(update={"env": config.env.model_copy(update={"name": name})})
    chosen = next((env for env in config.envs if env.name == name), None)
    if chosen is None:
        raise ConfigError(f"--env {name}: the run's environments are {', '.join(env.name for env in config.envs)}")
    return config.model_copy(update={"env": chosen, "envs": ()})


def run_evaluation(
    config: Config,
    policies: Sequence[str],
    *,
    json_file: Path | None,
    markdown_file: Path | None,
    console: Console,
) -> bool:
    """Evaluate each of `policies` (none: `model.path`); answers whether all panels were played to their end.

    A policy is a Hugging Face folder, a run's folder (its newest checkpoint), a checkpoint's, or a baseline's name.

    Raises:
        ModelUnavailable: a policy is none of these.
        AnchorageError: a file cannot be written; found out before anything is played.
    """
    require_writable(json_file, markdown_file)
    chosen = {name: _model_of(name) for name in policies or [str(config.model.path)]}
    models = [model for model in chosen.values() if model is not None]
    preflight(Start(config, models=models, plays_panels=True))
    results: dict[str, EvaluationResult] = {}
    with stop_on_signals() as stopped:
        for name, model in chosen.items():
            results[name] = _evaluate(name, model, config, console, stopped)
            if stopped():
                break
    console.print(results_table(results))
    if json_file is not None:
        write_text(json_file, json.dumps({name: as_json(r) for name, r in results.items()}, indent=1) + "\n")
    if markdown_file is not None:
        write_text(markdown_file, _markdown(results_table(results)))
    return not stopped()


def _model_of(policy: str) -> Path | None:
    """The folder of the policy's weights; None for a baseline."""
    if policy in BASELINES:
        return None
    folder = Path(policy)
    if not folder.is_dir():
        hint = did_you_mean(policy, BASELINES)
        raise ModelUnavailable(
            f"no such policy: {policy} is neither a folder nor a baseline ({', '.join(BASELINES)}){hint}"
        )
    if (folder / CHECKPOINTS_NAME).is_dir() and not any((folder / CHECKPOINTS_NAME).glob("[0-9]*")):
        raise ModelUnavailable(f"the run in {folder} has no checkpoint yet")
    if (folder / CHECKPOINTS_NAME).is_dir() or (folder / "policy").is_dir():
        folder = policy_of(folder)
    check_model_folder(folder)
    return folder


def _evaluate(
    name: str, model: Path | None, config: Config, console: Console, should_stop: Callable[[], bool]
) -> EvaluationResult:
    if model is None:
        total = config.evaluation.most_episodes
        with bar(console, name, total, "episodes") as tell:
            return evaluate_baseline(name, config, lambda done, won: tell(done, play_summary(won, done)))
    from learner.rank.parity import check_small_folder

    config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
    check_small_folder(model, config)
    with Stack(config, announce=console.print) as stack:
        stack.publish_initial()
        _check_sampler(stack, console, watched(stack, should_stop))
        return evaluate_on(stack, name, 0, console=console, should_stop=should_stop)


def _check_sampler(stack: Stack, console: Console, should_stop: Callable[[], bool]) -> None:
    """Compare what the actors sample with the model's own function, where this machine has room for it."""
    from anchorage.checks.local_scorer import LocalScorer, fits
    from learner.evaluation import panel
    from learner.sampler_check import EPISODES, STREAM, require_agreement

    config = stack.config
    if not fits(config.model.path, config.model.dtype):
        console.print("the sampler is not compared with the model: it does not fit into this machine's memory")
        return
    tasks = [ticket.task for ticket in panel(config, stack.splits, STREAM)[:EPISODES]]
    scorer = LocalScorer(config.model.path, config.model.dtype, config.rollout.temperature)
    require_agreement(config, stack.buffer, tasks, scorer, should_stop)


def evaluate_on(
    stack: Stack, title: str, version: int, *, console: Console, should_stop: Callable[[], bool]
) -> EvaluationResult:
    """Play the panels on a running stack with policy `version`, which must have been published."""
    from learner.evaluation import evaluate

    evaluation = stack.config.evaluation
    stack.wait_for_version(version, LOAD_TIMEOUT_S, should_stop)
    stream = f"eval-{version:06d}"
    so_far = _SoFar(stack.buffer, stream)
    with bar(console, title, evaluation.most_episodes, "episodes") as tell:
        return evaluate(
            stack.config,
            stack.buffer,
            stack.splits,
            stream=stream,
            version=version,
            should_stop=watched(stack, should_stop),
            on_progress=lambda done, total: tell(done, so_far.text()),
        )


class _SoFar:
    """How a panel goes while it is played; each episode is read once."""

    def __init__(self, buffer: Buffer, stream: str) -> None:
        self._buffer = buffer
        self._stream = stream
        self._won: dict[int, bool] = {}

    def text(self) -> str:
        for group in set(self._buffer.complete(self._stream)) - self._won.keys():
            with contextlib.suppress(KeyError, CodecError, IndexError):  # lost or damaged meanwhile: it is played again
                self._won[group] = self._buffer.read(self._stream, group)[0].won
        rates = [facts.get("tokens_per_s") for facts in self._buffer.actors().values()]
        tokens_per_s = sum(rate for rate in rates if isinstance(rate, int | float))
        return play_summary(sum(self._won.values()), len(self._won), tokens_per_s)


def results_table(results: Mapping[str, EvaluationResult]) -> Table:
    """Success overall, by task type and by panel; 95 % intervals in brackets.

    A column for each result, or for each split of a result that has several.
    """
    results = {title: part for name, result in results.items() for title, part in _by_split(name, result)}
    table = Table("success", *results)
    for kind in sorted({kind for result in results.values() for kind in result.task_types}):
        name = f"{kind} ({PUBLISHED_NAMES[kind]})" if kind in PUBLISHED_NAMES else kind
        table.add_row(name, *(_percent(result.task_types.get(kind)) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_percent(result.success) for result in results.values()), style="bold")
    if any(len(result.panels) > 1 for result in results.values()):
        table.add_row("panels, mean ± deviation", *(_over(r.panels, "panels") for r in results.values()))
    if any(len(result.seeds) > 1 for result in results.values()):
        table.add_row("seeds, mean ± deviation", *(_over(r.seeds, "seeds") for r in results.values()))
    table.add_section()
    table.add_row("mean score", *(_score(result) for result in results.values()))
    table.add_row("mean steps", *(f"{result.mean_steps:.1f}" for result in results.values()))
    table.add_row("valid actions", *(f"{100 * result.valid_fraction:.1f} %" for result in results.values()))
    return table


def _by_split(name: str, result: EvaluationResult) -> list[tuple[str, EvaluationResult]]:
    """The columns of a result and their titles."""
    return [(f"{name}, {split}", part) for split, part in result.splits.items()] or [(name, result)]


def as_json(result: EvaluationResult) -> dict[str, object]:
    """The result as plain data, rates with their intervals."""
    record = dataclasses.asdict(result)
    record["splits"] = {split: as_json(part) for split, part in result.splits.items()}
    record["success"] = _rate_json(result.success)
    record["panels"] = [_rate_json(rate) for rate in result.panels]
    record["seeds"] = [_rate_json(rate) for rate in result.seeds]
    record["task_types"] = {kind: _rate_json(rate) for kind, rate in result.task_types.items()}
    if result.score is not None:
        record["score"] = {"mean": result.score.value, "interval_95": list(result.score.interval)}
    return record


def _rate_json(rate: Rate) -> dict[str, object]:
    record = {"won": rate.won, "episodes": rate.episodes, "rate": rate.value, "interval_95": list(rate.interval)}
    return record if rate.effective is None else record | {"effective_episodes": rate.effective}


def _percent(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.0f}–{100 * high:.0f}), n = {rate.episodes}"


def _over(parts: Sequence[Rate], what: str) -> str:
    from learner.evaluation import mean

    rates = mean([100 * rate.value for rate in parts])
    return f"{rates.value:.1f} ± {rates.error * rates.count**0.5:.1f} %, {rates.count} {what}"


def _score(result: EvaluationResult) -> str:
    if result.score is None:
        return "–"
    low, high = result.score.interval
    return f"{100 * result.score.value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _markdown(table: Table) -> str:
    table.box = box.MARKDOWN
    text = io.StringIO()
    literal_console(text, 400).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip("|- \n")) + "\n"
