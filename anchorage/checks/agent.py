"""Checks the section `agent` before anything starts: its program, its address and token, the model's chat template.

The chat template is probed with transformers, as the actors will; torch is not needed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from services.config.agent import AgentConfig
from services.control.settings import SHORTEST_TOKEN, ControlRefused, is_loopback, token_from
from services.errors import AnchorageError, ModelUnavailable

TOKEN_VARIABLE = "ANCHORAGE_AGENT_TOKEN"
"""Variable, or with `_FILE` at its end the file, of the token that outside services need."""


def agent_token() -> str | None:
    """The run's agent token; None if there is none.

    Raises:
        ControlRefused: its file cannot be read, or both variables are set.
    """
    token = token_from(TOKEN_VARIABLE)
    return None if token is None else token.get_secret_value()


def agent_problems(agent: AgentConfig, models: Sequence[Path]) -> Iterator[str]:
    """Yield a line for each problem of the section.

    Args:
        agent: the section.
        models: folders of the policies that will be served.
    """
    from actors.harness.command import command_problem

    if agent.command is not None and (problem := command_problem(agent.command)) is not None:
        yield problem
    yield from _address_problems(agent)
    for folder in models:
        yield from _template_problems(agent, folder)


def _address_problems(agent: AgentConfig) -> Iterator[str]:
    try:
        token = agent_token()
    except ControlRefused as error:
        yield str(error)
        return
    if token is not None and len(token) < SHORTEST_TOKEN:
        yield f"{TOKEN_VARIABLE} must have at least {SHORTEST_TOKEN} characters"
    host = agent.listen.rpartition(":")[0].strip("[]")
    if token is None and agent.service:
        yield f"agent.service requires a token: set {TOKEN_VARIABLE} (openssl rand -hex 24), here and for the services"
    elif token is None and not is_loopback(host):
        yield f"agent.listen={agent.listen} requires a token: set {TOKEN_VARIABLE}, or listen on 127.0.0.1"


def _template_problems(agent: AgentConfig, folder: Path) -> Iterator[str]:
    from actors.gateway.read import AnswerReader
    from actors.gateway.render import Renderer
    from actors.prompts import load_tokenizer

    try:
        renderer = Renderer(load_tokenizer(folder), template_kwargs=agent.template_kwargs, history=agent.history)
        AnswerReader(renderer, agent.reader_name)
    except ModelUnavailable as error:
        yield f"{error}"
        return
    except AnchorageError as error:
        yield str(error)
        return
    if agent.reader != "text" and not renderer.facts.tools:
        yield (
            f"the chat template of {folder} takes no tools: choose another model, or set agent.reader=text for an "
            "agent that declares none"
        )
