"""Makes a small starter policy, tokenizer included, by imitating scripted players: `anchorage warmstart`.

Reinforcement learning needs a policy that sometimes succeeds. Scripted players play episodes through the environment's
API; a tokenizer is trained on their texts, and the model learns to respond as they act. Phases follow one another,
each with its own data and learning rate. In configs/starter.yaml:

    phases 1 to 3   own_play 0     scripted experts play, which act at random now and then (`noise`)
    phase 4         own_play 0.8   the model itself plays four of five episodes, and learns what the expert would
                                   have done in the states that it reached (DAgger, arXiv 1011.0686)

With a section `agent` the run's agent program plays them, through the gateway (`imitation.py`).

Invariants
- The data are computed from `run.seed`: the same configuration sees the same episodes in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from actors.engine.vllm import CPU_HEAD_SIZES
from anchorage.checks.model_shape import engine_is_on_cpu, shape_problems
from anchorage.checks.tokenizer import tokenizer_problems
from anchorage.runs.environments import environment_class, make_data_known
from services.config.agent import AgentConfig
from services.config.load import portable_config
from services.config.tree import Config, WarmstartPhase
from services.errors import EnvironmentUnavailable, ModelUnavailable, PreflightFailed, first_line
from services.folders import folder_problem
from services.model_folder import check_model_folder
from services.plugins import make_importable
from services.run_folder import WARMSTART_NAME
from services.schemas import Task
from services.tasks import split_size

_TOKENIZER_EPISODES = 600
_TOKENIZER_AGENT_EPISODES = 96
_AT_ONCE = 64


def make_starter(
    config: Config,
    out: Path,
    on_progress: Callable[[int, float], None],
    start: Path | None = None,
    first_phase: int = 1,
) -> dict[str, object]:
    """Train a starter policy, write it to `out`, and return the content of its recipe file.

    Args:
        start: folder that earlier phases have written; training continues from it with phase number `first_phase`.
        on_progress: gets the tokens done so far and the mean loss of the last responses.

    Raises:
        PreflightFailed: the environment, a split, `start`, `out` or the shape of the model is wrong.
        ModelUnavailable: the warm start cannot train the model in `start`.

    Example:
        # configs/starter.yaml has four phases; here the first three are done, and models/three holds the result.
        make_starter(config, Path("models/mine"), print, start=Path("models/three"), first_phase=4)
    """
    make_importable(config.plugins.folders)
    make_data_known(config.env)
    if problems := [*_problems(config, out, start, first_phase)]:
        raise PreflightFailed("\n".join(problems))
    import torch

    from actors.prompts import make_prompts
    from learner import warmstart

    torch.set_num_threads(config.warmstart.threads)
    tokenizer, model = _fresh(config) if start is None else _continued(config, start)
    figures = [] if start is None else _earlier_phases(start)
    prompts = None
    if config.agent is None:
        prompts = make_prompts(config.prompt, tokenizer, config.model.max_prompt_tokens)
    tokens = 0
    for number, phase in enumerate(config.warmstart.phases[first_phase - 1 :], start=first_phase):
        began = time.time()

        def note(progress: Any, before: int = tokens) -> None:
            on_progress(before + progress.tokens, progress.response_loss)

        with contextlib.closing(_examples(config, phase, f"phase {number}", prompts, tokenizer, model)) as examples:
            last = warmstart.fit(model, examples, phase, config.warmstart.batch_tokens, note)
        tokens += last.tokens
        figures.append(_figures(number, time.time() - began, last))
    warmstart.save(model, tokenizer, out)
    recipe = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "phases": figures,
        "config": portable_config(config),
    }
    (out / WARMSTART_NAME).write_text(json.dumps(recipe, indent=1) + "\n")
    return recipe


def _fresh(config: Config) -> tuple[Any, Any]:
    """Return a tokenizer trained on scripted play, and a model with random weights."""
    from actors.templates import load_template
    from learner import warmstart

    chat = config.agent is not None or load_template(config.prompt).chat is not None
    shape, texts = config.warmstart, [*_texts(config, chat)]
    tokenizer = warmstart.train_tokenizer(texts, shape.vocab_size, chat, shape.phrases)
    if config.agent is not None:
        texts += _agent_texts(config, config.agent, tokenizer)
        tokenizer = warmstart.train_tokenizer(texts, shape.vocab_size, chat, shape.phrases)
    limit = max(1024, config.model.max_prompt_tokens + config.model.max_response_tokens)
    model = warmstart.new_model(config.warmstart, len(tokenizer), tokenizer.eos_token_id, limit, config.run.seed)
    return tokenizer, model


def _continued(config: Config, start: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the model that earlier phases have written."""
    from actors.prompts import load_tokenizer
    from learner import warmstart

    return load_tokenizer(start), warmstart.load(start, config)


def _figures(number: int, seconds: float, last: Any) -> dict[str, object]:
    """Return the record of a phase; `last` is its last progress."""
    return {
        "phase": number,
        "seconds": round(seconds, 1),
        "steps": last.step,
        "tokens": last.tokens,
        "response_loss": round(last.response_loss, 4),
    }


def _problems(config: Config, out: Path, start: Path | None, first_phase: int) -> Iterator[str]:
    """Yield a line for each problem that is known before anything is played or computed."""
    phases, shape = config.warmstart.phases, config.warmstart
    if first_phase > len(phases):
        yield f"--first-phase must be <= {len(phases)}, the number of warmstart.phases, got {first_phase}"
    if (problem := folder_problem(out)) is not None:
        yield f"cannot write {out}: {problem}"
    if config.agent is not None:
        yield from _agent_problems(config.agent)
    try:
        sizes = environment_class(config.env).splits()
        for split in dict.fromkeys(split for phase in phases for split in phase.splits or (config.env.split,)):
            split_size(sizes, split, config.env.name)
    except EnvironmentUnavailable as error:
        yield str(error)
    if start is not None:
        try:
            check_model_folder(start)
            _earlier_phases(start)
        except ModelUnavailable as error:
            yield str(error)
            return
        yield from tokenizer_problems(start)
        yield from shape_problems(start, config)
    elif shape.hidden_size % shape.heads or shape.heads % shape.kv_heads:
        yield (
            f"warmstart.hidden_size must be a multiple of warmstart.heads, and that of warmstart.kv_heads, got "
            f"{shape.hidden_size}, {shape.heads} and {shape.kv_heads}"
        )
    elif engine_is_on_cpu() and shape.hidden_size // shape.heads not in CPU_HEAD_SIZES:
        yield (
            f"warmstart.hidden_size / warmstart.heads = {shape.hidden_size // shape.heads}: "
            f"vLLM on CPU supports heads of size {', '.join(map(str, CPU_HEAD_SIZES))}"
        )


def _agent_problems(agent: AgentConfig) -> Iterator[str]:
    """Yield a line for each reason why the agent cannot play against a scripted player."""
    from actors.harness.command import command_problem

    if agent.command is None:
        yield "a warm start requires agent.command: it starts the agents itself"
    elif (problem := command_problem(agent.command)) is not None:
        yield problem
    if agent.environment != "bound":
        yield "a warm start requires agent.environment=bound: the scripted player asks the environment's expert"


def _earlier_phases(start: Path) -> list[dict[str, object]]:
    """Return the records of the phases that made a folder; none where it has no record.

    Raises:
        ModelUnavailable: the record is damaged.
    """
    file = start / WARMSTART_NAME
    try:
        return [dict(phase) for phase in json.loads(file.read_text())["phases"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"cannot read {file}: {first_line(error)}; remove it, or copy it again") from None


def _episodes(config: Config, phase: WarmstartPhase, salt: str) -> Iterator[tuple[Task, random.Random]]:
    """Yield tasks of the phase's splits without end, in a seeded order, each with a random generator of its own.

    The splits take turns. `salt` keeps the orders of two phases apart.

    Example:
        # phase.splits = ("train", "small"), 3 and 2 tasks; the indices are random, the splits are not:
        # train 2, small 0, train 0, small 1, train 2, …
    """
    sizes = environment_class(config.env).splits()
    splits = phase.splits or (config.env.split,)
    order = random.Random(f"warmstart {salt} {config.run.seed}")
    number = 0
    while True:
        split = splits[number % len(splits)]
        task = Task(env=config.env.name, split=split, index=order.randrange(split_size(sizes, split, config.env.name)))
        yield task, random.Random(f"warmstart {salt} {config.run.seed} {number}")
        number += 1


def _turns(
    config: Config, phase: WarmstartPhase, salt: str, own: _OwnPlay | None = None
) -> Generator[list[Any], None, None]:
    """Yield the turns of one episode after the other, without end.

    `_AT_ONCE` episodes are played concurrently, and come out in the order of their tasks: what is yielded depends on
    the seed alone, not on which episode ends first. In each episode, three draws decide:

        expert or habitual player       phase.expert_share
        who acts: the player or `own`   phase.own_play; the scripted player then labels the states
        objects renumbered              phase.renumbered (`desk 1` becomes `desk 7` in all texts of the episode)

    `own` is the policy that plays itself; None: the scripted players act.
    """
    from actors.scripted import HabitualPlayer, NoisyExpert, Player, play_scripted, renumbered
    from env_servers.clients.local import LocalClient

    client = LocalClient(environment_class(config.env))
    low, high = phase.noise

    async def episode(task: Task, rng: random.Random) -> list[Any]:
        expert = rng.random() < phase.expert_share
        player: Player = HabitualPlayer(rng)
        if expert:
            player = NoisyExpert(rng, rng.uniform(low, high), slips=phase.slips, avoid=phase.avoid)
        policy = own.player(rng) if own is not None and rng.random() < phase.own_play else None
        turns = [turn async for turn in play_scripted(client, task, player, config.env.max_steps, policy)]
        return renumbered(turns, rng) if rng.random() < phase.renumbered else turns

    async def episodes(begun: list[tuple[Task, random.Random]]) -> list[list[Any]]:
        return await asyncio.gather(*(episode(task, rng) for task, rng in begun))

    ahead = _episodes(config, phase, salt)
    with asyncio.Runner() as runner:
        if own is not None:
            runner.run(own.engine.start())
        try:
            while True:
                yield from runner.run(episodes([*itertools.islice(ahead, _AT_ONCE)]))
        finally:
            if own is not None:
                runner.run(own.engine.stop())


class _OwnPlay:
    """A policy that plays itself: the engine that serves the model of `folder`, and the players that use it."""

    def __init__(self, config: Config, prompts: Any, folder: Path) -> None:
        from actors.engine.process import EngineProcess

        self._config = config
        self._prompts = prompts
        changes = {"path": folder, "dtype": "float32"}
        rollout = config.rollout.model_copy(update={"episodes_in_flight": _AT_ONCE})
        self.engine = EngineProcess(config.model.model_copy(update=changes), rollout)

    def player(self, rng: random.Random) -> Any:
        from actors.scripted import PolicyPlayer

        form = self._config.env.action_form or environment_class(self._config.env).action_form
        return PolicyPlayer(self.engine, self._prompts, self._config, rng.getrandbits(62), form)


def _texts(config: Config, chat: bool) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: observations and actions of scripted episodes.

    `chat`: actions are arguments of tool calls, with what the chat template writes around them.
    """
    from actors.templates import render_observation, render_opening

    turns = _turns(config, config.warmstart.phases[0], "tokenizer")
    for _ in range(_TOKENIZER_EPISODES):
        for turn in next(turns):
            seen = turn.result.observation
            yield render_observation(seen) if turn.result.step else render_opening(turn.goal, seen)
            yield json.dumps({"name": "act", "arguments": {"action": turn.action}}) if chat else f" {turn.action}"


def _agent_texts(config: Config, agent: AgentConfig, tokenizer: Any) -> Iterator[str]:
    """Yield what the agent and its tools say in conversations, which a preliminary tokenizer writes."""
    from actors.imitation import texts_of
    from anchorage.runs.imitation import agent_rows
    from learner.warmstart import CHAT_MARKERS, END_OF_TEXT

    phase = config.warmstart.phases[0]
    tasks = _episodes(config, phase, "agent's tokenizer")
    with contextlib.closing(agent_rows(config, agent, phase, tasks, tokenizer)) as episodes:
        for rows in itertools.islice(episodes, _TOKENIZER_AGENT_EPISODES):
            yield from texts_of(rows, tokenizer, (*CHAT_MARKERS, END_OF_TEXT))


def _examples(
    config: Config, phase: WarmstartPhase, salt: str, prompts: Any, tokenizer: Any, model: Any
) -> Generator[Any, None, None]:
    """Yield the training rows of a phase without end: those of `phase.episodes` episodes again and again."""
    from actors.imitation import Renumbering

    renumbering = Renumbering(tokenizer)
    rng = random.Random(f"warmstart rows {salt} {config.run.seed}")

    def shown(rows: list[Any]) -> Iterator[Any]:
        # Episodes of templates have been renumbered as texts.
        changes = config.agent is not None and rng.random() < phase.renumbered
        yield from (renumbering(row, rng) if changes else row for row in rows)

    kept: list[list[Any]] = []
    with contextlib.closing(_played(config, phase, salt, prompts, tokenizer, model)) as episodes:
        for rows in itertools.islice(episodes, phase.episodes):
            yield from shown(rows)
            if phase.episodes is not None:
                kept.append(rows)
    while True:
        rng.shuffle(kept)
        for rows in kept:
            yield from shown(rows)


def _played(
    config: Config, phase: WarmstartPhase, salt: str, prompts: Any, tokenizer: Any, model: Any
) -> Generator[list[Any], None, None]:
    """Yield the rows of each episode of a phase. Close the generator: it may hold an engine and agents."""
    from actors.scripted import to_examples
    from anchorage.runs.imitation import agent_rows
    from learner import warmstart

    with tempfile.TemporaryDirectory(prefix="anchorage-starter-") as folder:
        own = None
        if phase.own_play:
            warmstart.save(copy.deepcopy(model), tokenizer, Path(folder))
            own = _OwnPlay(config, prompts, Path(folder))
        if config.agent is not None:
            tasks, engine = _episodes(config, phase, salt), own and own.engine
            with contextlib.closing(agent_rows(config, config.agent, phase, tasks, tokenizer, engine)) as rows:
                yield from rows
            return
        with contextlib.closing(_turns(config, phase, salt, own)) as episodes:
            for turns in episodes:
                yield [*to_examples(turns, prompts, tokenizer, only_experts=phase.imitate == "expert")]
