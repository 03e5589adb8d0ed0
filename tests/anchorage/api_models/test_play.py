"""API models on the panels: the same tasks as everybody's, whatever the server does."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console

import anchorage
from actors.episode import play
from actors.prompts import PromptBuilder, load_tokenizer
from anchorage.api_models import client
from anchorage.api_models.client import ApiModel
from anchorage.api_models.play import EpisodePlayer
from anchorage.api_models.prompts import ApiPrompts, EstimatingTokenizer
from anchorage.api_models.settings import ApiOptions, Price, endpoint
from anchorage.cli.evaluate import run_evaluation
from anchorage.cli.main import main
from anchorage.runs.evaluation import as_record, evaluate_policies, evaluation_config
from env_servers.clients.local import LocalClient
from services.backoff import Backoff
from services.config.tree import Config
from services.errors import ModelUnavailable, RunStalled
from services.schemas import Task, Ticket
from tests.actors.scripted_engine import ScriptedEngine, tokenizer_folder
from tests.anchorage.api_models.foreign_api import Asked, ForeignApi, fails, foreign_api, says
from tests.env_servers.counting import Counting
from tests.processes import ROOT

DEMO = ROOT / "configs" / "demo.yaml"
KEY = "sk-secret-0123456789"
SMALL = ("evaluation.episodes=6", "env.max_steps=8", "prompt.template=think", "evaluation.temperature=0")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", Backoff(0.01, 0.05))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of the counting environment, with a tokenizer alone for a model."""
    return Config.model_validate(
        {
            "model": {"path": tokenizer_folder(tmp_path), "max_prompt_tokens": 200, "max_response_tokens": 12},
            "env": {"name": "counting", "max_steps": 12},
            "prompt": {"template": "compact"},
        }
    )


def chosen(asked: Asked) -> str:
    """One of the admissible actions that the prompt lists, always the same for the same prompt."""
    listed = re.findall(r"'([^']*)'", asked.last.rpartition("Your admissible actions are: [")[2].partition("].")[0])
    return random.Random(asked.last).choice(listed)


async def acts(asked: Asked) -> web.StreamResponse:
    return says(f"<think>Let us see.</think><action>{chosen(asked)}</action>")


async def fails_in_every_way(asked: Asked) -> web.StreamResponse:
    """Every second answer is right."""
    match asked.number % 14:
        case 1:
            return fails(429, "slow down", {"Retry-After": "0.02"})
        case 3:
            await asked.hold.wait()
        case 5:
            return says(None, refusal="I cannot help with that.")
        case 7:
            return web.Response(text="<html>Bad gateway</html>", status=502)
        case 9:
            return web.Response(body=b'{"choices": [{"message": {"content": NaN')
        case 11:
            return says("")
        case 13:
            return says("What a lovely day.", usage={"prompt_tokens": float("inf")})
    return await acts(asked)


def played(api: ForeignApi, *overrides: str, policies: Sequence[str] = ("api:gpt",), **options: object):  # type: ignore[no-untyped-def]
    given = ApiOptions(url=api.url, **options)  # type: ignore[arg-type]
    config = evaluation_config(DEMO, [*SMALL, *overrides], policies)
    return evaluate_policies(config, policies, on_progress=lambda _: None, should_stop=lambda: False, api=given)


def test_a_server_that_fails_in_every_way_plays_the_tasks_that_chance_plays(tmp_path: Path) -> None:
    file, figures = tmp_path / "episodes.jsonl", tmp_path / "eval.json"
    file.write_text("of an earlier evaluation\n")
    console = Console(record=True, width=200)
    with foreign_api(fails_in_every_way) as api:
        options = ApiOptions(url=api.url, at_once=3, timeout_s=3.0, prices={"gpt": Price(1.0, 100.0)}, transcripts=file)
        policies = ["api:gpt", "random"]
        config = evaluation_config(DEMO, SMALL, policies)
        assert run_evaluation(config, policies, json_file=figures, markdown_file=None, console=console, api=options)
    table = console.export_text()
    assert "api:gpt" in table
    assert re.search(r"all tasks .*% \(\d+–\d+\), n = \d .*% \(\d+–\d+\), n = 6", table)
    assert "≥ " in table
    written = json.loads(figures.read_text())
    model, chance = written["api:gpt"], written["random"]
    assert model["success"]["episodes"] + model["cancelled"] == chance["success"]["episodes"] == 6
    assert model["success"]["episodes"] >= 3  # three hanging requests in a row cancel an episode
    assert 0.3 < model["valid_fraction"] < 1
    assert chance["usage"] is None

    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    assert [episode["index"] for episode in sorted(episodes, key=lambda e: e["group"])] == [*range(6)]
    steps = [step for episode in episodes for step in episode["steps"]]
    usage = model["usage"]
    assert usage["requests"] == len(steps)
    assert usage["uncounted"] == sum(step["tokens_in"] is None for step in steps) > 0
    assert usage["tokens_in"] == sum(step["tokens_in"] or 0 for step in steps)
    assert usage["cost"] == pytest.approx(usage["tokens_in"] / 1e6 + usage["tokens_out"] / 1e4)
    refused = [step for step in steps if step["refused"]]
    assert {step["refused"] for step in refused} == {"the model refused: I cannot help with that.", "an empty response"}
    assert not any(step.get("valid") for step in refused)
    assert all(step["response"] == "" for step in refused)
    for episode in episodes:
        assert episode["cancelled"] or episode["won"] == (episode["steps"][-1]["reward"] > 0)
    assert KEY not in file.read_text() + figures.read_text() + table


def test_every_answer_of_a_good_server_is_valid_and_nothing_else_is_sent() -> None:
    with foreign_api(acts) as api:
        result = played(api)["api:gpt"]
    assert result.complete
    assert result.success.episodes == 6
    assert result.valid_fraction == 1.0
    assert result.usage is not None
    assert result.usage.requests == len(api.asked) == round(result.mean_steps * 6)
    assert (result.usage.tokens_in, result.usage.tokens_out) == (100 * len(api.asked), 7 * len(api.asked))
    assert result.usage.cost is None
    assert {asked.body["temperature"] for asked in api.asked} == {0.0}
    assert {asked.body["max_tokens"] for asked in api.asked} == {12}
    assert all(len(asked.body["messages"]) == 1 for asked in api.asked)


def test_a_transcript_template_is_a_chat() -> None:
    async def looks(asked: Asked) -> web.StreamResponse:
        return says(" look")

    with foreign_api(looks) as api:
        played(api, "prompt.template=compact", "evaluation.episodes=1")
    assert [len(asked.body["messages"]) for asked in api.asked] == [2 * step + 1 for step in range(8)]
    longest = api.asked[-1].body["messages"]
    assert [message["role"] for message in longest] == ["user", "assistant"] * 7 + ["user"]
    assert {message["content"] for message in longest[1::2]} == {" look"}


def test_a_model_that_leaves_cancels_its_episodes_and_keeps_what_was_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.001)

    async def leaves(asked: Asked) -> web.StreamResponse:
        return await acts(asked) if asked.number < 20 else fails(500, "gone")

    with foreign_api(leaves) as api:
        result = played(api, at_once=1, transcripts=tmp_path / "t.jsonl")["api:gpt"]
    assert result.complete
    assert result.success.episodes == 2
    assert result.cancelled == 4
    episodes = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(episodes) == 6
    reasons = [episode["cancelled"] for episode in episodes if episode["cancelled"]]
    assert len(reasons) == 4
    assert all("status 500: gone" in reason for reason in reasons)


def test_splits_and_parameters_that_are_not_accepted() -> None:
    async def particular(asked: Asked) -> web.StreamResponse:
        if "temperature" in asked.body:
            return fails(400, "Unsupported value: temperature", param="temperature")
        return await acts(asked)

    console = Console(record=True, width=200)
    with foreign_api(particular) as api:
        overrides = [*SMALL, "evaluation.episodes=2", "evaluation.split=[valid_seen, valid_unseen]"]
        config = evaluation_config(DEMO, overrides, ["api:gpt"])
        options = ApiOptions(url=api.url)
        run_evaluation(config, ["api:gpt"], json_file=None, markdown_file=None, console=console, api=options)
    table = console.export_text()
    assert re.search(r"not accepted\s.*temperature\s.*temperature", table)
    with foreign_api(acts) as api:
        record = as_record(
            played(api, "evaluation.episodes=2", "evaluation.split=[valid_seen, valid_unseen]")["api:gpt"]
        )
    parts = [part["usage"] for part in record["splits"].values()]  # type: ignore[attr-defined]
    assert sum(part["requests"] for part in parts) == record["usage"]["requests"]  # type: ignore[index]
    assert all(part["requests"] for part in parts)


def test_a_stop_ends_the_episodes_in_flight() -> None:
    async def hangs(asked: Asked) -> web.StreamResponse:
        if asked.number < 2:
            return await acts(asked)
        await asked.hold.wait()
        return says("late")

    config = evaluation_config(DEMO, SMALL, ["api:gpt"])
    with foreign_api(hangs) as api:
        options = ApiOptions(url=api.url, timeout_s=600.0, at_once=2)
        results = evaluate_policies(
            config,
            ["api:gpt", "random"],
            on_progress=lambda _: None,
            should_stop=lambda: len(api.asked) >= 4,
            api=options,
        )
    assert results.keys() == {"api:gpt"}
    assert not results["api:gpt"].complete
    assert results["api:gpt"].success.episodes == 0


def test_wrong_keys_names_and_addresses_are_one_line_and_nothing_is_played(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def refuses(asked: Asked) -> web.StreamResponse:
        return fails(401, f"Incorrect API key provided: {KEY}")

    earlier = tmp_path / "t.jsonl"
    earlier.write_text("of an earlier evaluation\n")
    with foreign_api(refuses) as api:
        command = ["eval", str(DEMO), *SMALL, "--policy", "random", "--policy", "api:gpt", "--api-url"]
        lines = [
            _failure(capsys, [*command, api.url, "--transcripts", str(earlier)]),
            _failure(capsys, [*command, "http://127.0.0.1:0x1/v1"]),
        ]
    assert earlier.read_text() == "of an earlier evaluation\n"
    lines.append(_failure(capsys, [*command, "here"]))
    monkeypatch.delenv("OPENAI_API_KEY")
    lines.append(_failure(capsys, command[:-1]))
    lines.append(_failure(capsys, [*command, api.url, "--at-once", "0"]))
    lines.append(_failure(capsys, [*command, api.url, "--price", "1"]))
    lines.append(_failure(capsys, [*command, api.url, "--policy", "api:"]))
    for line, wanted in zip(
        lines,
        (
            "OPENAI_API_KEY is not accepted",
            "is no address",
            "is no address",
            "OPENAI_API_KEY is not set",
            "from 1 to 1024",
            "is no price",
            "the model's name is missing",
        ),
        strict=True,
    ):
        assert wanted in line
        assert KEY not in line


def _failure(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code in (1, 2)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_no_episode_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.001)

    async def first_only(asked: Asked) -> web.StreamResponse:
        return await acts(asked) if asked.number == 0 else fails(500, "gone")

    with foreign_api(first_only) as api, pytest.raises(RunStalled, match=r"no episode could be played; .* gone"):
        played(api, at_once=1)


async def test_a_served_policy_plays_the_episodes_of_the_local_one(config: Config) -> None:
    """The same rule behind HTTP and as an engine: the prompts, the cuts and the episodes are the same."""
    task = Task(env="counting", split="train", index=1)
    tickets = [Ticket(group=n, member=0, group_size=1, task=task, seed=n) for n in range(6)]
    for limit in (config.model.max_prompt_tokens, 60):
        model = config.model.model_copy(update={"max_prompt_tokens": limit})
        config = config.model_copy(update={"model": model})
        engine = ScriptedEngine(model.path)
        tokenizer = load_tokenizer(model.path)

        async def serve(asked: Asked, engine: ScriptedEngine = engine) -> web.StreamResponse:
            sample = await engine.generate([], temperature=0.0, max_tokens=12, seed=asked.body["seed"])
            return says(sample.text)

        environment = LocalClient(Counting)
        local = PromptBuilder(config.prompt, tokenizer, limit)
        remote = ApiPrompts(config)
        with foreign_api(serve) as api:
            options = ApiOptions(url=api.url)
            name = ApiModel("gpt", endpoint(options, {}), options, most_tokens=12, thoughts=False)
            async with name as served:
                for ticket in tickets:
                    here = await play(ticket, environment, engine, local, config)
                    there = await play(ticket, environment, EpisodePlayer(served, remote, False), remote, config)
                    assert [step.action for step in there.steps] == [step.action for step in here.steps]
                    assert [step.prompt for step in there.steps] == [step.prompt for step in here.steps]
                    for mine, other in zip(there.steps, here.steps, strict=True):
                        assert mine.prompt_ids.tolist() == other.prompt_ids.tolist()
                        assert mine.prompt_truncated == other.prompt_truncated
        await environment.close()


def test_without_a_tokenizer_lengths_are_estimated(config: Config, tmp_path: Path) -> None:
    nothing = config.model.model_copy(update={"path": tmp_path / "none", "max_prompt_tokens": 10})
    prompts = ApiPrompts(config.model_copy(update={"model": nothing}))
    assert prompts.length_of("four bytes", finished=True) == [0] * 3
    assert EstimatingTokenizer().encode("") == []


def test_neither_torch_nor_ray_nor_vllm_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from anchorage.cli.main import main\n"
        "try:\n main(sys.argv[1:])\n"
        "finally:\n print('loaded:', sorted({'torch', 'ray', 'vllm', 'deepspeed'} & {*sys.modules}))\n"
    )
    with foreign_api(acts) as api:
        command = ["eval", str(DEMO), *SMALL, "evaluation.episodes=2", "--api-url", api.url, "--price", "gpt=1,2"]
        ended = subprocess.run(
            [sys.executable, "-c", code, *command, "--policy", "api:gpt", "--policy", "random"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert "loaded: []" in ended.stdout, ended.stderr
    assert "tokens in" in ended.stdout
    assert "cost" in ended.stdout
    assert ended.stderr == ""


def test_the_python_api_knows_them() -> None:
    with foreign_api(acts) as api:
        options = anchorage.ApiOptions(url=api.url, prices={"": anchorage.Price(1.0, 2.0)})
        config = anchorage.load_config(str(DEMO), *SMALL, "evaluation.episodes=2")
        results = anchorage.evaluate(config, ["api:gpt", "random"], api=options)
    model, chance = results.rows()
    assert model["policy"] == "api:gpt"
    assert model["tokens_in"] == 100 * len(api.asked)
    assert model["cost"] == pytest.approx(len(api.asked) * (100 + 2 * 7) / 1e6)
    assert chance["tokens_in"] is chance["cost"] is None
    with pytest.raises(ModelUnavailable, match="neither a folder, a baseline"):
        anchorage.evaluate(config, "ap:gpt")
