"""Runs to look at: a finished one as a folder, and a live one in Redis. Some of their texts are hostile on purpose."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from learner.prepare import prepare
from learner.record import group_records, record_algorithm
from services.archive import GroupArchive
from services.buffer import Buffer
from services.config.load import dump_config
from services.config.tree import Config
from services.schemas import Step, Task, Ticket, Trajectory, VersionSpan
from services.telemetry import MetricsWriter

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
TASK_TYPES = ("pick_and_place_simple", "look_at_obj_in_light")
PLACES = ("desk 1", "shelf 2", "drawer 3", "bed 1")
GROUP_SIZE = 4
UPDATES = 6


def make_config(runs: Path, name: str, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "dir": str(runs)},
            "learner": {"group_size": GROUP_SIZE, "groups_per_update": 2, "updates": 20},
            **sections,
        }
    )


def make_finished(runs: Path, name: str = "finished", *, updates: int = UPDATES, **sections: Any) -> Config:
    """A run that has ended: metrics with two evaluations, a ledger, kept groups, a checkpoint, no Redis."""
    config = make_config(runs, name, **sections)
    folder = config.run.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    record_algorithm(folder, config)
    archive = GroupArchive(folder, 2**24)
    with MetricsWriter(folder) as metrics, (folder / "ledger.jsonl").open("w") as ledger:
        metrics.write(0, evaluation(0))
        for update in range(1, updates + 1):
            groups = {group: play_group(group, update - 1) for group in (2 * update - 2, 2 * update - 1)}
            archive.append(update, group_records(groups, prepare(list(groups.values()), config, update - 1), config))
            metrics.write(update, scalars(update))
            for group in groups:
                versions = [[max(0, update - 2)]] * GROUP_SIZE
                ledger.write(json.dumps({"update": update, "group": group, "versions": versions}) + "\n")
        metrics.write(updates, evaluation(updates))
    checkpoint = folder / "checkpoints" / f"{updates:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"version": updates, "seconds": 61.5}))
    return config


def make_agents(runs: Path, name: str = "agents") -> Config:
    """A finished run of an agent program with one group: some turns took several calls, one call was not trained on."""
    config = make_config(runs, name)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    record_algorithm(config.run.folder, config)
    group = [_by_an_agent(episode) for episode in play_group(0, 0)]
    GroupArchive(config.run.folder, 2**24).append(1, group_records({0: group}, prepare([group], config, 0), config))
    return config


def _by_an_agent(episode: Trajectory) -> Trajectory:
    """The episode with a frozen call and a plan before its first action: steps 1 to 3 are of its first state.

    The plan calls two tools, one of them hostile; the others act by text.
    """
    first, *later = episode.steps
    frozen = replace(first, trained=False, reward=0.0)
    tools = [{"name": "find", "arguments": '{"what": "pen"}'}, {"name": HOSTILE, "arguments": HOSTILE}]
    plan = replace(first, turn=0, action="think", reward=0.0, extends=0, tool_calls=json.dumps(tools))
    facts = {
        **episode.facts,
        "agent": {"cause": "crash", "calls": len(later) + 4, "exit": 3, "refused": 2, "orphaned": 1},
    }
    return replace(episode, steps=(frozen, plan, replace(first, turn=0), *later), facts=facts)


def make_live(runs: Path, name: str, redis_url: str) -> tuple[Config, Buffer]:
    """The same, and its Redis: tickets that wait, that are leased, a complete group, an actor."""
    make_finished(runs, name)
    config = make_config(runs, name, buffer={"redis_url": redis_url})
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    buffer = Buffer.connect(redis_url, name, config.buffer)
    buffer.set_state("running")
    buffer.issue([ticket(group, member) for group in (100, 101, 102) for member in range(GROUP_SIZE)])
    for leased in buffer.lease(f"{name}-rollout-0", GROUP_SIZE, 600.0):
        buffer.store(play(leased, 5))
    buffer.lease(f"{name}-rollout-0", 3, 600.0)
    buffer.cancel("train", 102, HOSTILE)
    beat(buffer, name)
    return config, buffer


def beat(buffer: Buffer, name: str) -> None:
    facts: dict[str, object] = {"state": "playing", "version": 5, "episodes": 3, "tokens_per_s": 812.5, "kv_use": 0.25}
    facts |= {"stored": 4, "host": HOSTILE, "agents": agents()}
    buffer.heartbeat(f"{name}-rollout-0", facts, 600.0)


def agents() -> dict[str, object]:
    """What an actor's heartbeat says of its agent programs."""
    counts: dict[str, object] = {"playing": 3, "waiting": 0, "processes": 4, "calls_per_s": 12.5, "calls_per_turn": 1.5}
    shares = {"extended_fraction": 0.995, "short_anchor_fraction": None}
    return {"gateway": "http://127.0.0.1:8100", "template": ["tools: yes", HOSTILE], **counts, **shares}


def ticket(group: int, member: int) -> Ticket:
    task = Task(env="alfworld", split="train", index=group)
    return Ticket(group=group, member=member, group_size=GROUP_SIZE, task=task, seed=member)


def play_group(group: int, version: int) -> list[Trajectory]:
    return [play(ticket(group, member), version) for member in range(GROUP_SIZE)]


def play(order: Ticket, version: int) -> Trajectory:
    """An episode in a small house; members of a group meet in the same places. The last step has a hostile thought."""
    rng = np.random.default_rng([order.group, order.member])
    count, won = int(rng.integers(3, 7)), order.member % 2 == 0
    places = ["start", *(PLACES[int(rng.integers(0, len(PLACES)))] for _ in range(count - 1))]
    steps = tuple(
        _step(
            place=place,
            action=f"go to {places[number + 1]}" if number + 1 < count else "take pen 1",
            version=version,
            thought=HOSTILE if number + 1 == count else "the pen may be there",
            reward=10.0 if won and number + 1 == count else 0.0,
            valid=bool(rng.random() < 0.8),
            last=number + 1 == count,
            won=won,
        )
        for number, place in enumerate(places)
    )
    now = time.time()
    facts = {"won": won, "task_type": TASK_TYPES[order.group % 2], "goal": "find a pen", "score": float(won)}
    return Trajectory(order, steps, facts, actor="rollout-0", started_at=now - 2, finished_at=now)


def _step(
    *, place: str, action: str, version: int, thought: str, reward: float, valid: bool, last: bool, won: bool
) -> Step:
    return Step(
        prompt_ids=np.arange(12, dtype=np.int32),
        response_ids=np.arange(4, dtype=np.int32),
        logprobs=np.full(4, -0.5, dtype=np.float32),
        versions=(VersionSpan(version, 4),),
        anchor=place,
        observation=f"You are at {place}.",
        prompt=f"You are at {place}. {HOSTILE}",
        response=f"<think>{thought}</think><action>{action}</action>",
        action=action,
        reward=reward,
        valid=valid,
        terminated=last and won,
        truncated=last and not won,
    )


def scalars(update: int) -> dict[str, float]:
    level = 1 - math.exp(-update / 4)
    shares = {"1": 0.4, "2_to_4": 0.3, "5_to_8": 0.2, "9_up": 0.1}
    return {
        "rollout/success_rate": 0.8 * level,
        "rollout/mean_reward": 8 * level,
        "rollout/valid_fraction": 0.9,
        "rollout/mean_steps": 6.0,
        "advantage/step_group_size": 2.5,
        "advantage/deviation": 1.1,
        **{f"advantage/step_groups_{name}": share for name, share in shares.items()},
        "staleness/mean": 0.5,
        "staleness/max": 1.0,
        "loss/kl": 0.01 * level,
        "loss/clip_fraction": 0.02,
        "loss/entropy": 0.6 - 0.2 * level,
        "loss/grad_norm": float("nan"),
        "update/response_tokens": 640.0,
        "time/tokens_per_second": 9000.0,
        "time/wait_s": 1.0,
        "time/prepare_s": 0.1,
        "time/update_s": 2.0,
        "time/publish_s": 0.1,
    }


def evaluation(update: int) -> dict[str, float]:
    rate = 0.3 + 0.04 * update
    return {
        "evaluation/success_rate": rate,
        "evaluation/success_low": rate - 0.06,
        "evaluation/success_high": rate + 0.06,
    }
