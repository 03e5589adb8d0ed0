"""Plays the evaluation panels with any player: what `anchorage eval` and `anchorage.evaluate` do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anchorage.api_models.settings import ApiOptions, Endpoint, endpoint, model_name
from anchorage.api_models.transcripts import Transcripts
from anchorage.checks.preflight import Start, preflight
from anchorage.runs.baselines import BASELINES, evaluate_baseline
from anchorage.runs.export import policy_of
from anchorage.runs.progress import OnProgress, Progress, ShouldStop, announcer, play_summary
from anchorage.runs.stack import Stack, watched
from services import packaged
from services.buffer import FROM_THE_START
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


def evaluation_config(
    recipe: Path | None, overrides: Sequence[str], policies: Sequence[str], env: str | None = None
) -> Config:
    """Return the recipe's tree; without a recipe, the one that the first of `policies` was made with.

    Without policies that is the policy of `model.path`. `env` is the environment to play, one of `envs` where the tree
    has several. The evaluation is a run of its own, beside the run that the policy may come from.

    Raises:
        ConfigError: the prompts of the policy are unknown, or the tree has no environment `env`.
    """
    models = [packaged.find(Path(policy)) for policy in policies if policy not in BASELINES and not model_name(policy)]
    if recipe is None and not policies:
        models = [load_config(None, overrides).model.path]
    config = _own_config(models, overrides) if recipe is None and models else load_config(recipe, overrides)
    return as_evaluation(config, env)


def as_evaluation(config: Config, env: str | None = None) -> Config:
    """Return the tree of the evaluation run `NAME-eval`, which plays `env` alone where that is given.

    Raises:
        ConfigError: the tree has no environment `env`.
    """
    if env is not None:
        config = _playing(config, env)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-eval"})})


def _own_config(policies: Sequence[Path], overrides: Sequence[str]) -> Config:
    """Return the configuration of the run, or the warm start, that made the first policy of which there is one."""
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
        f"{policies[0]} is no run and does not say how it was trained, so its prompts are unknown: "
        "give a recipe, as in anchorage eval configs/demo.yaml --policy …"
    )


def _playing(config: Config, name: str) -> Config:
    """Return the tree with the environment of that name alone."""
    if not config.envs:
        return config.model_copy(update={"env": config.env.model_copy(update={"name": name})})
    chosen = next((env for env in config.envs if env.name == name), None)
    if chosen is None:
        known = ", ".join(env.name for env in config.envs)
        raise ConfigError(f"no environment {name!r} in this run; its environments are {known}")
    return config.model_copy(update={"env": chosen, "envs": ()})


def evaluate_policies(
    config: Config,
    policies: Sequence[str],
    *,
    on_progress: OnProgress,
    should_stop: ShouldStop,
    api: ApiOptions | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate each of `policies` (none: `model.path`) and return the results by name, in the order of `policies`.

    A policy is a Hugging Face folder, a run's folder (its newest checkpoint), a checkpoint's, a baseline's name, or an
    API model, `api:NAME`, which `api` has the options for. API models play first: whether they can be reached, and
    know the name and the key, shows at their first request.
    A stop ends the current policy's evaluation, whose result is then not `complete`, and leaves out the others.

    Raises:
        ConfigError: the URL or the key of an API is missing or invalid.
        ModelUnavailable: a policy is none of these.
        PreflightFailed: something is known to be wrong before anything is played.
        AnchorageError: as the stack and the evaluation raise it.
    """
    api = api or ApiOptions()
    chosen = {name: model_of(name) for name in policies or [str(config.model.path)]}
    models = [model for model in chosen.values() if model is not None]
    served = [name for name in chosen if model_name(name)]
    where = endpoint(api) if served else None
    preflight(Start(config, models=models, plays_panels=True, builds_prompts=bool(served)))
    results: dict[str, EvaluationResult] = {}
    with Transcripts(api.transcripts if served else None) as transcripts:
        for name in sorted(chosen, key=lambda name: name not in served):
            if where is not None and name in served:
                results[name] = _evaluate_api(name, config, api, where, transcripts, on_progress, should_stop)
            else:
                results[name] = _evaluate(name, chosen[name], config, on_progress, should_stop)
            if should_stop():
                break
    return {name: results[name] for name in chosen if name in results}


def model_of(policy: str) -> Path | None:
    """Return the folder of the policy's weights; None for a baseline and for an API model.

    Raises:
        ConfigError: an API model without a name.
        ModelUnavailable: there is no such policy.
        CheckpointFailed: its checkpoints are damaged.
    """
    if policy in BASELINES or model_name(policy):
        return None
    folder = packaged.find(Path(policy))
    if not folder.is_dir():
        hint = did_you_mean(policy, BASELINES)
        raise ModelUnavailable(
            f"no such policy: {policy} is neither a folder, a baseline ({', '.join(BASELINES)}) nor api:NAME{hint}"
        )
    if (folder / CHECKPOINTS_NAME).is_dir() and not any((folder / CHECKPOINTS_NAME).glob("[0-9]*")):
        raise ModelUnavailable(f"the run in {folder} has no checkpoint yet")
    if (folder / CHECKPOINTS_NAME).is_dir() or (folder / "policy").is_dir():
        folder = policy_of(folder)
    check_model_folder(folder)
    return folder


def _evaluate_api(
    name: str,
    config: Config,
    api: ApiOptions,
    where: Endpoint,
    transcripts: Transcripts,
    on_progress: OnProgress,
    should_stop: ShouldStop,
) -> EvaluationResult:
    from anchorage.api_models.play import evaluate_api_model

    total = config.evaluation.most_episodes
    on_progress(Progress("evaluation", name, 0, total, "episodes"))

    def note(done: int, text: str) -> None:
        on_progress(Progress("evaluation", name, done, total, "episodes", text))

    return evaluate_api_model(name, config, api, where, transcripts, note, should_stop)


def _evaluate(
    name: str, model: Path | None, config: Config, on_progress: OnProgress, should_stop: ShouldStop
) -> EvaluationResult:
    if model is None:
        total = config.evaluation.most_episodes

        def note(done: int, won: int) -> None:
            on_progress(Progress("evaluation", name, done, total, "episodes", play_summary(won, done)))

        return evaluate_baseline(name, config, note, should_stop)
    from anchorage.checks.local_scorer import without_progress_bars
    from learner.rank.parity import check_small_folder

    config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
    with without_progress_bars():
        check_small_folder(model, config)
    with Stack(config, announcer(on_progress)) as stack:
        stack.channel.announce_initial()
        _check_sampler(stack, on_progress, watched(stack, should_stop))
        return evaluate_on(stack, name, 0, on_progress=on_progress, should_stop=should_stop)


def _check_sampler(stack: Stack, on_progress: OnProgress, should_stop: ShouldStop) -> None:
    """Compare what the actors sample with the model's own forward pass, where this machine has room for it."""
    from anchorage.checks.local_scorer import LocalScorer, fits, without_progress_bars
    from learner.evaluation import panel
    from learner.sampler_check import EPISODES, STREAM, require_agreement

    config = stack.config
    if not fits(config.model.path, config.model.dtype):
        announcer(on_progress)(
            "the sampler is not compared with the model, which does not fit into this machine's memory"
        )
        return
    tasks = [ticket.task for ticket in panel(config, stack.splits, STREAM)[:EPISODES]]
    with without_progress_bars():
        scorer = LocalScorer(config.model.path, config.model.dtype, config.rollout.temperature)
    require_agreement(config, stack.buffer, tasks, scorer, should_stop)


def evaluate_on(
    stack: Stack, title: str, version: int, *, on_progress: OnProgress, should_stop: ShouldStop
) -> EvaluationResult:
    """Play the panels on a running stack with policy `version`, which must have been published."""
    from learner.evaluation import evaluate

    total = stack.config.evaluation.most_episodes
    on_progress(Progress("evaluation", title, 0, total, "episodes"))
    stack.wait_for_version(version, LOAD_TIMEOUT_S, should_stop)
    stream = f"eval-{version:06d}"
    so_far = SuccessSoFar(stack.buffer, stream)

    def note(done: int, episodes: int) -> None:
        on_progress(Progress("evaluation", title, done, total, "episodes", so_far.text()))

    return evaluate(
        stack.config,
        stack.buffer,
        stack.splits,
        stream=stream,
        version=version,
        should_stop=watched(stack, should_stop),
        on_progress=note,
    )


class SuccessSoFar:
    """The success of a panel while it is played; each episode is read once."""

    def __init__(self, buffer: Buffer, stream: str) -> None:
        self._buffer = buffer
        self._stream = stream
        self._won: dict[int, bool] = {}
        self._upto = FROM_THE_START

    def text(self) -> str:
        """Return the success and the actors' tokens/s in a few words."""
        news = self._buffer.closed(self._stream, self._upto)
        self._upto = news.upto
        for group in news.complete:
            # An episode may be lost or damaged meanwhile: it is played again.
            with contextlib.suppress(KeyError, CodecError, IndexError):
                self._won[group] = self._buffer.read(self._stream, group)[0].won
        rates = [facts.get("tokens_per_s") for facts in self._buffer.actors().values()]
        tokens_per_s = sum(rate for rate in rates if isinstance(rate, int | float))
        return play_summary(sum(self._won.values()), len(self._won), tokens_per_s)


def as_record(result: EvaluationResult) -> dict[str, object]:
    """Return the result as plain data, rates with their 95 % intervals."""
    record = dataclasses.asdict(result)
    record["splits"] = {split: as_record(part) for split, part in result.splits.items()}
    record["success"] = _rate_record(result.success)
    record["panels"] = [_rate_record(rate) for rate in result.panels]
    record["seeds"] = [_rate_record(rate) for rate in result.seeds]
    record["task_types"] = {kind: _rate_record(rate) for kind, rate in result.task_types.items()}
    if result.score is not None:
        record["score"] = {"mean": result.score.value, "interval_95": list(result.score.interval)}
    return record


def _rate_record(rate: Rate) -> dict[str, object]:
    record = {"won": rate.won, "episodes": rate.episodes, "rate": rate.value, "interval_95": list(rate.interval)}
    return record if rate.effective is None else record | {"effective_episodes": rate.effective}
