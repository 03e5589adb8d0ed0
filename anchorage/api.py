"""The functions of the Python API: configure, train, evaluate, demonstrate. See docs/python-api.md.

Invariants
- They print nothing, configure no logging and install no signal handler: progress goes to `on_progress`, and
  `should_stop` ends a run in order.
- They work off the main thread and in a notebook, whose thread runs an event loop.
- One run a process at a time: a process connects to one Ray cluster.
- Whatever is wrong is an `AnchorageError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anchorage.rows import Rows
from anchorage.runs.progress import OnProgress, ShouldStop, ignore, never
from anchorage.runs.run import Run
from services.config import load
from services.config.load import ConfigError
from services.config.tree import Config
from services.errors import EnvironmentUnavailable

if TYPE_CHECKING:
    from anchorage.api_models.settings import ApiOptions
    from anchorage.runs.demo import DemoResult
    from env_servers.environment import Environment
    from learner.evaluation import EvaluationResult

Recipe = str | os.PathLike[str] | Mapping[str, Any]
Override = str | Mapping[str, Any]
Policy = str | os.PathLike[str] | Run


def load_config(recipe: Recipe | None = None, *overrides: Override) -> Config:
    """Return the configuration tree of a recipe, with overrides applied in their order.

    Args:
        recipe: path of a recipe (YAML), or the name of one that comes with the package, such as `"demo"`; or the tree
            itself as a mapping. None: the defaults.
        overrides: texts as on the command line (`"learner.updates=20"`), or mappings, whose keys may be dotted
            (`{"learner.updates": 20}`) and whose values may be sections (`{"learner": {"updates": 20}}`).

    Raises:
        ConfigError: with one line for each mistake: unknown keys, values out of range, a missing recipe.

    Example:
        load_config("demo", "algorithm=grpo", {"run.name": "first", "learner": {"updates": 20}})
    """
    return load.load_config(recipe if recipe is None or isinstance(recipe, Mapping) else Path(recipe), overrides)


def train(
    config: Config | Recipe,
    *,
    resume: bool | Literal["auto"] = False,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> Run:
    """Train a policy to the end of the run, and return the run. Blocks.

    Args:
        config: the configuration, or a recipe as of `load_config`.
        resume: resume the run from its newest checkpoint; `"auto"`: start it where it does not exist.
        on_progress: gets a `Progress` for each part that is started and for each update; from this thread.
        should_stop: asked often, from this thread; once it returns True, the run finishes the current update, writes a
            checkpoint and ends. `Run.updates` is the number of updates done.

    Raises:
        ConfigError: the recipe is wrong. PreflightFailed: something is known to be wrong before anything is started.
        CheckpointFailed: there is no run to resume, or one is in the way of a new run.
        AnchorageError: the run failed; what was started is stopped, and the run may be resumed.

    Example:
        run = train("demo", on_progress=lambda progress: print(progress.text))
    """
    from anchorage.runs.resume import Resume
    from anchorage.runs.training import run_training

    config = _config(config)
    if resume not in (True, False, "auto"):
        raise ConfigError(f'resume: must be True, False or "auto", got {resume!r:.80}')
    choice = Resume.AUTO if resume == "auto" else Resume.YES if resume else Resume.NO
    run_training(config, resume=choice, on_progress=on_progress or ignore, should_stop=should_stop or never)
    return Run(config.run.folder)


class Evaluations(dict[str, "EvaluationResult"]):
    """Results of an evaluation by policy, in the order of the policies.

    Example:
        results["random"].success.value
        results.rows().to_pandas()
    """

    def rows(self) -> Rows:
        """Return a row a policy and, where there were several splits, one a policy and split.

        Columns: `policy`, `split`, `won`, `episodes`, `success_rate` with the ends of its 95 % interval `success_low`
        and `success_high`, `mean_score` (None where the environment has no score), `mean_steps`, `valid_fraction`,
        `cancelled` (episodes that could not be played), `complete` (False: cut short by a stop), `tokens_in`,
        `tokens_out` and `cost` (of an API model; None of other policies, and without a price).
        """
        return Rows(_row(policy, part) for policy, result in self.items() for part in (result, *result.splits.values()))


def evaluate(
    config: Config | Recipe | None = None,
    policies: Policy | Iterable[Policy] = (),
    *,
    env: str | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
    api: ApiOptions | None = None,
) -> Evaluations:
    """Play the evaluation panels with each policy, all on the same tasks, and return the results by policy. Blocks.

    Args:
        config: the configuration, or a recipe as of `load_config`. None: the one that the first policy was made with.
        policies: each a run or its folder (of its newest checkpoint), a checkpoint's folder, a Hugging Face folder, or
            a baseline: `"random"`, `"expert"`, or a model behind an API: `"api:NAME"`. Empty: the policy of
            `model.path`.
        env: the environment to play, one of `envs` where the configuration has several.
        on_progress, should_stop: as of `train`. A stop leaves out the policies after the current one, whose result is
            not `complete`.
        api: where API models are and how they are played with; None: `OPENAI_BASE_URL` and the defaults. The key is
            `OPENAI_API_KEY`.

    Raises:
        ConfigError: the recipe is wrong, the prompts of a policy are unknown, or an API has no valid URL or key.
        ModelUnavailable: there is no such policy.
        AnchorageError: the evaluation failed.

    Example:
        evaluate("demo", [run, "random"])["random"].success.interval
    """
    from anchorage.runs import evaluation

    named = [policies] if isinstance(policies, str | os.PathLike | Run) else list(policies)
    names = [str(policy.folder) if isinstance(policy, Run) else os.fspath(policy) for policy in named]
    if config is None:
        tree = evaluation.evaluation_config(None, (), names, env)
    else:
        tree = evaluation.as_evaluation(_config(config), env)
    results = evaluation.evaluate_policies(
        tree, names, on_progress=on_progress or ignore, should_stop=should_stop or never, api=api
    )
    return Evaluations(results)


def demo(
    *overrides: Override, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
) -> DemoResult | None:
    """Evaluate the starter policy, train it, and evaluate it again: the demo, about ten minutes on two cores. Blocks.

    Args:
        overrides: as of `load_config`, over the demo's recipe.
        on_progress, should_stop: as of `train`.

    Returns:
        What was measured; None where `should_stop` ended it. What an earlier demo left is moved to `NAME.previous`.

    Raises:
        AnchorageError: as of `train`.

    Example:
        demo("algorithm=grpo").figures["gain_points"]
    """
    from anchorage.runs.demo import default_recipe, run_demo

    config = load_config(default_recipe(), *overrides)
    return run_demo(config, on_progress=on_progress or ignore, should_stop=should_stop or never)


def read_episodes(file: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a file that `anchorage export --episodes` or `Run.export_episodes` wrote.

    Each is a dict as described in docs/episodes-format.md. The file is read as the episodes are taken.

    Raises:
        EpisodesUnavailable: the file is missing or invalid, or is Parquet and pyarrow is not installed.

    Example:
        rewards = [episode["reward"] for episode in read_episodes("episodes.jsonl")]
    """
    from anchorage.runs import episodes

    return episodes.read_episodes(Path(file))


def register(name: str, environment: str | type[Environment]) -> None:
    """Make an environment of your own known in this process: a run with `env.name=NAME` then starts a server for it.

    Args:
        name: the environment's, which is also the class attribute `name`.
        environment: the class, or `"module:Class"`. Its module must be importable by another process, so a class that
            is defined in a notebook's cell or in a script is refused.

    Raises:
        EnvironmentUnavailable: it is not a class derived from `Environment`, or the name is taken.

    Example:
        register("rock_paper", "rock_paper.environment:RockPaper")
    """
    from env_servers import registry
    from env_servers.errors import ServerError

    try:
        registry.register(name, environment)
    except ServerError as error:
        raise EnvironmentUnavailable(str(error)) from None


def _config(config: Config | Recipe) -> Config:
    return config if isinstance(config, Config) else load_config(config)


def _row(policy: str, result: EvaluationResult) -> dict[str, Any]:
    (low, high), usage = result.success.interval, result.usage
    return {
        "policy": policy,
        "split": result.split,
        "won": result.success.won,
        "episodes": result.success.episodes,
        "success_rate": result.success.value,
        "success_low": low,
        "success_high": high,
        "mean_score": None if result.score is None else result.score.value,
        "mean_steps": result.mean_steps,
        "valid_fraction": result.valid_fraction,
        "cancelled": result.cancelled,
        "complete": result.complete,
        "tokens_in": None if usage is None else usage.tokens_in,
        "tokens_out": None if usage is None else usage.tokens_out,
        "cost": None if usage is None else usage.cost,
    }
