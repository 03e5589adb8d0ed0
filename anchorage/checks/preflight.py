"""Finds what is wrong before anything starts: all problems at once, within seconds.

A check takes a `Start` and yields its problems, one line each: what is wrong, with the value; then what to do. To add
a check, write such a function and add it to `CHECKS`.

Invariants
- Every check of `CHECKS` runs, whatever the others found. Those of `LAST` wait for servers that may still be starting,
  so they run only where nothing else is wrong.
- A check starts no process, leaves no file behind, and imports neither torch nor Ray nor vLLM, unless a plug-in, a
  trained adapter or the number of GPUs needs it. Each of its requests has a timeout.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.engine import arguments
from actors.engine.vllm import MOST_SEQUENCES
from anchorage.checks.agent import agent_problems
from anchorage.checks.capacity import capacity_problems, cards_here, memory_here
from anchorage.checks.cards import driver_problem
from anchorage.checks.model_shape import engine_is_on_cpu, shape_problems
from anchorage.checks.tokenizer import tokenizer_problems
from anchorage.planning.host import BYTES_IN_CHECKPOINT
from anchorage.runs.environments import environment_class, info_of, make_data_known, require_playable
from services import tracking
from services.config.references import is_reference
from services.config.tree import Config, EnvConfig
from services.errors import (
    AnchorageError,
    EnvironmentUnavailable,
    ModelUnavailable,
    PreflightFailed,
    RedisUnavailable,
)
from services.folders import folder_problem, nearest_folder
from services.model_folder import check_model_folder, check_tokenizer, stored_parameters
from services.plugins import PluginError, make_importable
from services.run_folder import CHECKPOINTS_NAME
from services.tasks import split_key, split_size, tasks_of_split

RAY_PATIENCE_S = 20.0
"""Time that a Ray cluster, started together with the run, may need before it accepts connections."""
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Start:
    """What is about to start.

    Attributes:
        config: configuration of the run.
        models: folders of the policies that will be served; empty for baselines alone.
        trains: the run plays training tasks and writes checkpoints.
        plays_panels: the run plays evaluation panels.
        builds_prompts: prompts are built for a model that is none of `models`.
    """

    config: Config
    models: Sequence[Path] = ()
    trains: bool = False
    plays_panels: bool = False
    builds_prompts: bool = False


Check = Callable[[Start], Iterator[str]]


def preflight(start: Start) -> None:
    """Run every check.

    Raises:
        PreflightFailed: one line for each problem.
    """
    for checks in (CHECKS, LAST):
        problems = [problem for check in checks for problem in check(start)]
        if problems:
            raise PreflightFailed("\n".join(dict.fromkeys(problems)))


def run_folder(start: Start) -> Iterator[str]:
    """Check that the run's folder, or the nearest existing folder above it, is writable."""
    problem = folder_problem(start.config.run.folder)
    if problem is not None:
        yield f"cannot write the run's folder {start.config.run.folder}: {problem} (run.dir, run.name)"


def outputs(start: Start) -> Iterator[str]:
    """Check what is written outside the run's folder: the weights of a channel."""
    config = start.config
    folder = config.weights.directory
    if start.models and config.weights.channel == "directory" and folder is not None:
        problem = folder_problem(folder)
        if problem is not None:
            yield f"cannot write the weights to {folder}: {problem} (weights.directory)"


def disk_space(start: Start) -> Iterator[str]:
    """Check the disk space for the checkpoints that are kept, and for the one written before the oldest is removed."""
    if not start.trains:
        return
    config = start.config
    try:
        parameters = stored_parameters(config.model.path)
    except ModelUnavailable:
        return  # reported by `models`
    trained = 0 if config.model.lora is not None else parameters
    size = BYTES_IN_CHECKPOINT * trained + parameters * (2 if config.model.dtype == "bfloat16" else 4)
    there = len([*(config.run.folder / CHECKPOINTS_NAME).glob("[0-9]*")])
    needed = size * max(1, config.checkpoint.keep + 1 - there)
    free = shutil.disk_usage(nearest_folder(config.run.folder)).free
    if free < needed:
        yield (
            f"not enough disk space for checkpoints in {config.run.dir}: {free / 2**20:,.0f} MiB are free and "
            f"{needed / 2**20:,.0f} MiB are needed; free some, lower checkpoint.keep, or move run.dir"
        )


def models(start: Start) -> Iterator[str]:
    """Check that each model folder is complete, and that its tokenizer, vLLM and the configured lengths fit it."""
    for folder in start.models:
        try:
            check_model_folder(folder)
            check_tokenizer(folder)
            stored_parameters(folder)
        except ModelUnavailable as error:
            yield str(error)
            continue
        yield from tokenizer_problems(folder)
        yield from shape_problems(folder, start.config)


def chat_templates(start: Start) -> Iterator[str]:
    """Check each model's chat template where the prompts are messages; it decides what becomes of earlier thoughts."""
    from actors import prompts, templates

    make_importable(start.config.plugins.folders)
    try:
        if templates.load_template(start.config.prompt).chat is None:
            return
    except PluginError:  # reported by `plugins`
        return
    for folder in start.models:
        try:
            tokenizer = prompts.load_tokenizer(folder)
            prompts.make_prompts(start.config.prompt, tokenizer, start.config.model.max_prompt_tokens)
        except PluginError:
            return
        except AnchorageError as error:
            yield str(error)


def engine(start: Start) -> Iterator[str]:
    """Check `rollout.engine` against the arguments of the installed vLLM."""
    if start.models:
        sequences = min(start.config.rollout.episodes_in_flight, MOST_SEQUENCES)
        yield from arguments.problems(start.config.rollout.engine, sequences, on_cpu=engine_is_on_cpu())


def agent(start: Start) -> Iterator[str]:
    """Check the agent's program, the gateway's address and token, and what the chat template needs to be told."""
    if start.config.agent is not None and start.models:
        found = [folder for folder in start.models if not _lacks_tokenizer(folder)]
        yield from agent_problems(start.config.agent, tuple(found))


def adapters(start: Start) -> Iterator[str]:
    """Every target of `model.lora` is a layer of the model."""
    lora = start.config.model.lora
    if not start.trains or lora is None:
        return
    from learner.rank.lora import check_targets

    try:
        check_targets(start.config.model.path, lora.targets)
    except ModelUnavailable as error:
        yield str(error)


def machine(start: Start) -> Iterator[str]:
    """Check this machine's memory and devices for a Ray cluster of the run's own; other clusters are not checked."""
    config = start.config
    if start.models and os.environ.get("RAY_ADDRESS") and config.rollout.share_gpus == "turns":
        yield (
            "rollout.share_gpus=turns: learner and actor take turns on the GPUs of one machine, not of the cluster at "
            "RAY_ADDRESS: unset it, or give them GPUs of their own (rollout.share_gpus=false)"
        )
    if not start.models or os.environ.get("RAY_ADDRESS"):
        return
    cores = os.cpu_count() or 1
    if start.trains and config.learner.ranks > cores:
        yield (
            f"learner.ranks={config.learner.ranks}, and this machine has {cores} processor core(s): lower it, or set "
            "RAY_ADDRESS to a cluster with more"
        )
    if not engine_is_on_cpu():
        return
    if config.weights.channel in ("nccl", "ipc"):
        channel = config.weights.channel
        yield f"weights.channel={channel} needs GPUs, and this machine's vLLM is for CPUs: use ray, directory or gloo"
    asked = config.rollout.actors * config.rollout.kv_cache_mib * 2**20
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if asked > memory:
        yield (
            f"rollout.actors={config.rollout.actors} with rollout.kv_cache_mib={config.rollout.kv_cache_mib} need "
            f"{asked / 2**20:,.0f} MiB, and the machine has {memory / 2**20:,.0f} MiB: lower one of them"
        )


def capacity(start: Start) -> Iterator[str]:
    """Check that the run fits this machine's GPUs, or its memory; machines of another cluster are not checked."""
    if not start.trains or not start.models or os.environ.get("RAY_ADDRESS"):
        return
    if driver_problem() is not None:  # reported by `driver`; PyTorch would raise where it reads the cards' memory
        return
    cards = cards_here()
    here = cards.count > 0 or engine_is_on_cpu()
    # More ranks than cores are reported by `machine`.
    if here and start.config.learner.ranks <= (os.cpu_count() or 1):
        yield from capacity_problems(start.config, cards, memory_here())


def driver(start: Start) -> Iterator[str]:
    """Check the NVIDIA driver of this machine; the machines of an existing cluster check theirs themselves."""
    if start.models and not os.environ.get("RAY_ADDRESS") and (problem := driver_problem()) is not None:
        yield problem


def environments(start: Start) -> Iterator[str]:
    """Check that each environment is known or reachable, and has the tasks that are configured."""
    sizes: dict[str, int] = {}
    unknown = False
    for env in start.config.environments:
        try:
            splits = environment_splits(env)
        except EnvironmentUnavailable as error:
            unknown = True
            yield str(error)
            continue
        sizes |= {split_key(start.config, env.name, split): size for split, size in splits.items()}
        if start.trains:
            yield from _lacking(splits, env)
    if not unknown and (start.plays_panels or start.config.evaluation.split is not None):
        for split in start.config.evaluation.splits or (None,):
            try:
                tasks_of_split(start.config, sizes, split)
            except EnvironmentUnavailable as error:
                yield f"evaluation.split: {error}"


def environment_splits(env: EnvConfig) -> dict[str, int]:
    """Return the sizes of an environment's splits: from its servers, or its class where the run will start a server.

    Raises:
        EnvironmentUnavailable: no such environment, its data are missing, a server does not respond, or a class of the
            user's own cannot be played.
    """
    if env.addresses:
        return dict(info_of(env, env.addresses).splits)
    make_data_known(env)
    environment = environment_class(env)
    if env.implementation is not None:
        require_playable(env, environment)
    return dict(environment.splits())


def redis(start: Start) -> Iterator[str]:
    """Check that a configured Redis responds within `buffer.reconnect_s`."""
    from services.buffer.connection import Connection

    url = start.config.buffer.redis_url or os.environ.get("REDIS_URL")
    if not url:
        return
    try:
        connection = Connection(url, start.config.buffer)
        try:
            connection.call(connection.client.ping)
        finally:
            connection.close()
    except RedisUnavailable as error:
        yield str(error)


def ray_cluster(start: Start) -> Iterator[str]:
    """Check that the Ray cluster at `$RAY_ADDRESS` accepts connections: Ray itself would retry for minutes silently."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not start.models or address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        yield f"RAY_ADDRESS={address} is not the address of a Ray cluster: use host:6379 or auto, or unset it"
        return
    deadline = time.monotonic() + RAY_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                yield (
                    f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}; start it, or unset "
                    "RAY_ADDRESS for a cluster of the run's own"
                )
                return
        time.sleep(1)


def plugins(start: Start) -> Iterator[str]:
    """Check that each plug-in of the configuration can be loaded, and works on a small example."""
    from actors import templates
    from learner.advantages import loading

    make_importable(start.config.plugins.folders)
    if start.models or start.builds_prompts:
        yield from templates.check(start.config.prompt)
    if start.trains:
        yield from tracking.check(start.config.telemetry)
        yield from loading.check(start.config)
        loss = start.config.loss
        if is_reference(loss.function) or loss.params:
            from learner.rank import losses  # imports torch

            yield from losses.check(loss)


CHECKS: tuple[Check, ...] = (
    *(plugins, run_folder, outputs, models, chat_templates, engine, agent, adapters),
    *(disk_space, machine, driver, capacity, environments),
)
LAST: tuple[Check, ...] = (redis, ray_cluster)


def _lacks_tokenizer(folder: Path) -> bool:
    """Return whether a folder's tokenizer cannot be loaded, which `models` reports."""
    try:
        check_model_folder(folder)
        check_tokenizer(folder)
    except ModelUnavailable:
        return True
    return False


def _lacking(splits: dict[str, int], env: EnvConfig) -> Iterator[str]:
    try:
        split_size(splits, env.split, env.name)
    except EnvironmentUnavailable as error:
        yield f"env.split: {error}"
