"""A starter policy in miniature: both ways in, and what is left in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.chat import ChatPrompts
from actors.prompts import load_tokenizer, make_prompts
from actors.scripted import PolicyPlayer
from anchorage.runs import warmstart
from anchorage.runs.warmstart import make_starter
from env_servers.alfworld.environment import game_source
from env_servers.protocol import StepResult
from services.config import Config, load_config
from services.config.tree import PromptConfig
from services.errors import PreflightFailed

ROOT = Path(__file__).resolve().parents[3]


PHASES = "[{tokens: 6000, expert_share: 0.5}, {tokens: 6000, imitate: expert, splits: [SPLIT]}]"


def small(recipe: str, phases: str = PHASES) -> Config:
    phases = phases.replace("SPLIT", "train" if "webshop" in recipe else "train_large")
    shape = ["warmstart.hidden_size=64", "warmstart.intermediate_size=32", "warmstart.layers=1", "warmstart.heads=2"]
    return load_config(
        ROOT / "configs" / recipe,
        [f"warmstart.phases={phases}", *shape, "warmstart.kv_heads=2", "warmstart.batch_tokens=1000"],
    )


def test_phases_can_be_done_apart(tmp_path: Path) -> None:
    config = small("starter.yaml")
    told: list[int] = []
    make_starter(config, tmp_path / "first", lambda tokens, loss: told.append(tokens))
    assert told == sorted(told)
    assert told[-1] >= 12_000

    make_starter(config, tmp_path / "second", lambda tokens, loss: None, start=tmp_path / "first", first_phase=2)
    recipe = json.loads((tmp_path / "second" / "warmstart.json").read_text())
    assert [phase["phase"] for phase in recipe["phases"]] == [1, 2, 2]
    assert {path.name for path in (tmp_path / "second").iterdir()} >= {"config.json", "tokenizer.json"}


def test_a_policy_that_chats_gets_a_chat_template(tmp_path: Path) -> None:
    overrides = {"template": "chat", "params": {"admissible": False}}
    config = small("starter.yaml")
    config = config.model_copy(update={"prompt": PromptConfig.model_validate(overrides)})
    make_starter(config, tmp_path / "chat", lambda tokens, loss: None)
    tokenizer = load_tokenizer(tmp_path / "chat")
    prompts = make_prompts(config.prompt, tokenizer, 1000)
    assert isinstance(prompts, ChatPrompts)
    assert (prompts.renderer.facts.stub, prompts.answers.name) == (True, "hermes")
    action = tokenizer.decode(prompts.response_ids("open drawer 2"))
    assert action == '<tool_call>{"name": "act", "arguments": {"action": "open drawer 2"}}</tool_call>'
    assert len(prompts.response_ids("open drawer 2")) < 24


def test_the_shops_expert_makes_data_too(tmp_path: Path) -> None:
    recipe = make_starter(small("webshop-starter.yaml"), tmp_path / "shop", lambda tokens, loss: None)
    assert [phase["phase"] for phase in recipe["phases"]] == [1, 2]


def test_the_data_that_the_recipe_names_are_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", "")  # restored at the end: the folder is made known in the environment
    game_source.cache_clear()
    config = small("starter.yaml")
    config = config.model_copy(update={"env": config.env.model_copy(update={"data": tmp_path})})
    with pytest.raises(PreflightFailed, match=f"no ALFWorld games in {tmp_path}"):
        make_starter(config, tmp_path / "out", lambda tokens, loss: None)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    phases = "[{tokens: 6000, splits: [nowhere]}]"
    with pytest.raises(PreflightFailed, match="no tasks in split 'nowhere'"):
        make_starter(small("starter.yaml", phases), tmp_path / "out", lambda tokens, loss: None)


def test_a_policy_can_make_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmstart, "_AT_ONCE", 4)
    played: list[str] = []
    act = PolicyPlayer.act

    async def noted(self: PolicyPlayer, goal: str | None, result: StepResult) -> str:
        played.append(await act(self, goal, result))
        return played[-1]

    monkeypatch.setattr(PolicyPlayer, "act", noted)
    phases = "[{tokens: 6000}, {tokens: 6000, own_play: 0.5}]"
    recipe = make_starter(small("starter.yaml", phases), tmp_path / "own", lambda tokens, loss: None)
    assert [phase["phase"] for phase in recipe["phases"]] == [1, 2]
    assert len(set(played)) > 4
